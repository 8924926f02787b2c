"One training from a configuration to a saved result, a report, and the command line around it."
import html
import io
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from processes import alone, run_alone

import largest_margins
from largest_margins import cli
from largest_margins.callbacks import load_file
from largest_margins.cli import main
from largest_margins.margins import class_margin, sample_margins
from largest_margins.study import tables
from largest_margins.study.configurations import LOSSES, ClassifierFields
from largest_margins.study.experiments import Configuration, train
from largest_margins.study.recipes import DEMO, single
from largest_margins.study.tables import make_table, plan, summarise

QUICK = Configuration(loss='cosface', epochs=2, sample_margin=.5, embedding=12)


@pytest.fixture(scope='module')
def result(): return train(QUICK)


# Configurations

@pytest.mark.parametrize('given,message', [
    (dict(loss='cosfarce'), 'loss must be one of ce, focal, normface'),
    (dict(loss='ce', scale=3.), 'scale has no meaning'),
    (dict(loss='normface', margin=.1), 'margin has no meaning'), (dict(scale=-1.), 'scale must be'),
    (dict(loss='arcface', margin=28.), 'margin must be'), (dict(epochs=0), 'epochs'),
    (dict(batch_size=1), 'batch_size'),
    (dict(embedding=2.5), 'embedding'), (dict(learning_rate=0), 'learning_rate'), (dict(ratio=.1), 'ratio'),
    (dict(sample_margin=-.5), 'sample_margin'), (dict(zero_centroid=math.nan), 'zero_centroid'),
    (dict(loss='ce', scale=0.), 'scale has no meaning'), (dict(schedule='never'), 'schedule must be one of one-cycle'),
    (dict(kind='x'), 'kind'), (dict(rotate=-1.), 'rotate must be ≥ 0'), (dict(fixed='no'), 'fixed must be True'),
    (dict(batch_size=2.5), 'batch_size'), (dict(batch_size=-5), 'batch_size'), (dict(seed=-1), 'seed'),
    (dict(margin=35.), 'margin'), (dict(reduction='sum'), 'reduction'), (dict(loss='ldam', margin=50.), 'margin')])
def test_bad_configurations(given, message):
    with pytest.raises((ValueError, TypeError), match=message): Configuration(**given)


@pytest.mark.parametrize('given,label', [
    (dict(loss='ce'), 'CE'), (dict(loss='ce', sample_margin=.5), 'CE + 0.5 R_sm'),
    (dict(loss='arcface', scale=64., margin=.5), 'ArcFace s=64 m=0.5 rad'),
    (dict(loss='lm-softmax', zero_centroid=100.), 'LM-Softmax s=20 + 100 R_w')])
def test_labels(given, label):
    assert Configuration(**given).label == label


@pytest.mark.parametrize('loss', LOSSES)
def test_every_loss_trains(loss):
    found = train(Configuration(loss=loss, epochs=1, embedding=12, ratio=5., zero_centroid=1.))
    assert not found.diverged and found.accuracy > 15 and 0 < found.class_margin <= found.bound


# Results

def test_the_numbers_are_those_of_the_test_split(result):
    assert result.class_margin == pytest.approx(math.degrees(class_margin(result.prototypes)))
    margins = sample_margins(result.cosines, result.targets)
    assert result.mean_sample_margin == pytest.approx(margins.mean().item())
    assert result.min_sample_margin == pytest.approx(margins.min().item())
    assert result.accuracy == pytest.approx(100 * (margins > 0).float().mean().item())
    assert len(result.targets) == 450 and len(result.history) == 2
    assert result.history[-1]['mean_sample_margin'] == pytest.approx(result.mean_sample_margin, abs=1e-6)


def test_the_same_seed_gives_the_same_numbers(result):
    assert torch.equal(train(QUICK).cosines, result.cosines)
    assert not torch.equal(train(replace(QUICK, seed=1)).cosines, result.cosines)


def test_augmentation_is_used_and_seeded():
    turned = replace(QUICK, epochs=1, rotate=20.)
    found, again, plain = (train(c) for c in (turned, turned, replace(turned, rotate=0.)))
    assert torch.equal(found.cosines, again.cosines) and not torch.equal(found.cosines, plain.cosines)


def test_progress_is_told():
    seen = []
    train(QUICK, progress=lambda epoch, margins: seen.append((epoch, margins['class_margin'])))
    assert [epoch for epoch, _ in seen] == [1, 2]


def test_a_diverged_training_is_a_result():
    for loss in ('ce', 'cosface'):
        lost = train(Configuration(loss=loss, learning_rate=1e25, epochs=1))
        assert lost.diverged and math.isnan(lost.class_margin) and all(map(math.isnan, lost.measured.values()))
        assert math.isnan(lost.test_margins['mean']) and math.isnan(lost.class_accuracies.mean())
        with pytest.raises(AttributeError, match='accurracy'): _ = lost.accurracy


# What one run and six leave

def text_of(page): return html.unescape(re.sub('<[^>]+>', ' ', page))


def test_one_training_is_a_table_of_one_row(result, tmp_path):
    heard = []
    assert make_table(single(QUICK), out=tmp_path, seeds=[0], tell=heard.append)
    assert f'| CosFace s=20 m=0.1 + 0.5 R_sm | **{result.accuracy:.2f} ± –** |' in (tmp_path/'table.md').read_text()
    page = (tmp_path/'table.html').read_text()
    text = text_of(page)
    assert f'{result.class_margin:.2f}' in text and '96.38' in text and 'torch' in text and 'digits' in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 2 and all(s.startswith('data:image/png;base64,') for s in sources)
    assert page.count('alt="') == 2 and 'http' not in page and 'color-scheme: light dark' in page
    run, = tmp_path.rglob('seed-0.json')
    assert torch.equal(load_file(run.with_suffix('.pt'))['cosines'], result.cosines)


def test_the_words_follow_the_numbers():
    runs = plan(DEMO)[2:4]
    record = dict(diverged=False, bound=96.38, machine={}, classes=[0], measured=dict(class_margin=80., accuracy=98.,
                                                                                     mean_sample_margin=.5))
    worse = record | dict(measured=dict(class_margin=78.5, accuracy=98., mean_sample_margin=.75))
    note = summarise(DEMO, list(zip(runs, (record, worse)))).notes[0]
    assert '-1.50°' in note and '+0.250' in note and note.startswith('CosFace:')
    assert 'changes' not in summarise(DEMO, [(runs[0], record)]).notes[0]


# The command line

def run(*argv):
    with pytest.raises(SystemExit) as end: main([str(a) for a in argv])
    return end.value.code


def test_prove(capsys, tmp_path):
    assert run('prove', 'L1', 'ME', '--quick', '--json', tmp_path/'e.json') == 0
    out = capsys.readouterr().out
    assert out.count('passed') == 6 and 'difference' in out and '5 of 5 checks passed' in out
    assert "the slides' Lemma 1" in out and 'printed   for k ≤ d+1' in out
    rows = json.loads((tmp_path/'e.json').read_text())
    assert {r['claim'] for r in rows} == {'L1', 'ME'} and all(r['passed'] for r in rows)
    assert {r['kind'] for r in rows} == {'exact', 'certified', 'optimised', 'boundary'}


def test_a_failed_check_exits_with_1():
    status, printed = run_alone(_prove_what_is_false)
    assert status == 1 and 'FAILED' in printed


def _prove_what_is_false():
    ledger = import_module('largest_margins.claims')
    ledger.register(ledger.Claim('X', 'Two', 'holds', 'two is three', 'as printed', 'never',
                                 (ledger.Check('exact arithmetic', lambda: (2, 3), '='),)))
    main(['prove', 'X'])


@pytest.mark.parametrize('argv,message', [
    (['prove', 'T9'], "unknown claim 'T9'"), (['train', '--loss', 'x'], 'loss must be one of'),
    (['train', '--loss', 'ce', '--scale', '20'], 'scale has no meaning'),
    (['train', '--epochs', 'many'], 'invalid int'),
    (['train', '--dataset', 'mnist', '--data', 'nowhere'], 'train-images-idx3-ubyte'),
    (['train', '--dataset', 'nothing'], 'neither a directory nor'), ([], 'required'), (['dance'], 'invalid choice')])
def test_usage_errors_are_one_line_and_2(argv, message, capsys):
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith('largest-margins: ') and err.count('\n') == 1


def test_train_writes_a_table_and_a_record(tmp_path, capsys):
    argv = ('train', '--loss', 'lm-softmax', '--sample-margin', '0.5', '--epochs', '2', '--rotate', '10')
    assert run(*argv, '--out', tmp_path) == 0
    out = capsys.readouterr().out
    assert 'LM-Softmax s=20 + 0.5 R_sm' in out and 'class margin°' in out and 'table.html' in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ['runs', 'table.csv', 'table.html', 'table.md', 'table.tex']
    path, = tmp_path.rglob('seed-0.json')
    before, kept = path.stat().st_mtime_ns, json.loads(path.read_text())
    assert kept['asked']['epochs'] == 2 and kept['asked']['rotate'] == 10
    assert run(*argv, '--out', tmp_path) == 2 and 'finished or begun' in capsys.readouterr().err
    assert run(*argv, '--scale', 30, '--resume', '--out', tmp_path) == 2
    assert 'scale was None, is now 30.0' in capsys.readouterr().err
    assert run(*argv, '--resume', '--out', tmp_path) == 0 and path.stat().st_mtime_ns == before
    assert run('inspect', path.with_suffix('.pt')) == 0
    assert f'{kept["measured"]["class_margin"]:.2f}°' in capsys.readouterr().out


def test_options_are_the_fields_of_a_configuration(monkeypatch):
    asked = []
    monkeypatch.setattr(tables, 'make_table', lambda recipe, *args, **kwargs: asked.append(recipe) or True)
    assert run('train') == 0
    made, = plan(asked[0])
    for f in fields(ClassifierFields): assert getattr(made.configuration, f.name) == f.default


def test_demo(tmp_path, capsys, monkeypatch):
    "Without its proofs, which the page of the command line runs."
    monkeypatch.setattr(import_module('largest_margins.claims'), 'prove', lambda *args, **kwargs: [])
    assert run('demo', '--epochs', '2', '--out', tmp_path) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if '| 96.38' in line]
    assert len(rows) == 6 and sum('+ 0.5 R_sm' in row for row in rows) == 3
    assert 'checks passed' in out and out.count('0.5 R_sm changes the class margin') == 3
    assert (tmp_path/'table.html').read_text().count('<img') == 12
    found = {p.parent.name: json.loads(p.read_text())['measured'] for p in tmp_path.rglob('seed-0.json')}
    for loss in ('ce', 'cosface'):
        for name in ('class_margin', 'mean_sample_margin'): assert found[f'{loss}+rsm'][name] > found[loss][name]
    assert run('demo', '--epochs', '2', '--out', tmp_path) == 2  # nothing finished is trained over
    assert 'checks passed' not in capsys.readouterr().out


@pytest.mark.parametrize('option', ['--epochs 0', '--data /nowhere', '--dataset nothing', '--dataset cifar10 --data .'])
def test_demo_refuses_before_it_proves(option, tmp_path, capsys, monkeypatch):
    def late(*args, **kwargs): raise AssertionError('proofs have begun')
    monkeypatch.setattr(import_module('largest_margins.claims'), 'prove', late)
    assert run('demo', *option.split(), '--out', tmp_path) == 2
    assert 'Six trainings' not in capsys.readouterr().out


def command(*argv, **kwargs):
    tool = Path(sys.executable).with_name('largest-margins')
    return subprocess.Popen([tool, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


TOOL = [sys.executable, '-m', 'largest_margins']
COMMANDS = 'prove', 'train', 'table', 'inspect', 'prototypes', 'demo'


def shell(line, **env):
    "Run a line in bash, `lm` for the command: exit codes of the pipe, output, errors."
    line = f'lm() {{ {shlex.join(TOOL)} "$@"; }}\n{line}\necho "codes ${{PIPESTATUS[@]}}" >&2'
    found = subprocess.run(['bash', '-c', line], capture_output=True, text=True, errors='replace',
                           env={**os.environ, **env})
    *errors, codes = found.stderr.splitlines()
    return codes, found.stdout, '\n'.join(errors)


def test_the_package_is_the_command():
    for how in (['-m', 'largest_margins'], ['-m', 'largest_margins.cli'], [cli.__file__]):
        done = subprocess.run([sys.executable, *how, '--version'], capture_output=True, text=True, check=True)
        assert done.stdout == f'largest-margins {largest_margins.__version__}\n'
    done = subprocess.run([*TOOL, 'trian'], capture_output=True, text=True)
    assert done.returncode == 2 and 'trian' in done.stderr


@pytest.mark.parametrize('encoding', ['cp1252', 'latin-1', 'ascii'])
def test_output_in_every_encoding(encoding, monkeypatch):
    for line in ('--help', *(f'{command} --help' for command in COMMANDS), 'prove ME', 'inspect “x”'):
        shown = io.BytesIO()
        for name in ('stdout', 'stderr'): monkeypatch.setattr(sys, name, io.TextIOWrapper(shown, encoding))
        assert run(*line.split()) == (2 if '“' in line else 0)
        sys.stderr.flush()
        assert len(shown.getvalue()) > 20
    codes, _, err = shell('lm table --help', PYTHONIOENCODING=encoding)
    assert (codes, err) == ('codes 0', '')


def test_a_reader_that_has_enough():
    for line in ('--help | true', 'prove ME JE | head -c 1', 'prototypes 4 3 --out - | true'):
        codes, _, err = shell(f'lm {line}')
        assert codes in ('codes 0 0', 'codes 141 0') and 'Errno' not in err and 'Exception' not in err
    for line in ('prove ME', '--version'):
        codes, _, err = shell(f'lm {line} > /dev/full')
        assert codes == 'codes 2' and err.count('\n') == 0 and 'No space left on device' in err


def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path, capsys):
    assert run('prototypes', 4, 3, '--out', tmp_path/'p.safetensors') == 0
    capsys.readouterr()
    file = tmp_path/'p.safetensors'
    for argv in (['prove', '--json', '.'], ['prove', '--json', ''], ['inspect', file, '--json', '.'],
                 ['inspect', file, '--html', file], ['inspect', file, '--json', 'x', '--html', 'x'],
                 ['inspect', file, '--json', file/'x'], ['train', '--out', file], ['demo', '--out', file],
                 ['prototypes', 4, 3, '--out', tmp_path], ['inspect', tmp_path, '--json', file],
                 ['inspect', file, '--json', 'x', '--html', './x'], ['inspect', file, '--json', '/dev/fd/99']):
        assert run(*argv) == 2
        out, err = capsys.readouterr()
        assert out == '' and err.count('\n') == 1
    assert run('inspect', file, '--json', '/dev/null', '--html', '/dev/null') == 0


def test_standard_output_is_a_file(tmp_path, capfd):
    codes, out, _ = shell('lm prototypes 4 3 --out - | lm inspect - --json >(cat) --html /dev/null | cat')
    assert codes == 'codes 0 0 0' and json.loads(out[out.index('{'):out.rindex('}') + 1])['k'] == 4
    assert Path('/dev/null').is_char_device()
    assert run('prototypes', 4, 3, '--out', tmp_path/'p.safetensors') == 0
    capfd.readouterr()
    with open(tmp_path/'p.safetensors', 'rb') as file:
        assert run('inspect', f'/dev/fd/{file.fileno()}', '--json', '-') == 0
    assert json.loads(capfd.readouterr().out)['class_margin_degrees'] == pytest.approx(109.4712, abs=1e-4)
    assert run('inspect', tmp_path/'p.safetensors', '--json', '/dev/stdout') == 0
    assert json.loads(capfd.readouterr().out)['k'] == 4  # and not a word of the report
    for name in ('-', '/dev/stdout', '/dev/fd/1'):
        assert run('inspect', tmp_path/'p.safetensors', '--json', '-', '--html', name) == 2


def test_closed_streams(monkeypatch, tmp_path):
    "As after `1>&- 2>&-`, and in a program of Windows without a console."
    for name in ('stdout', 'stderr'): monkeypatch.setattr(sys, name, None)
    for line, code in (('--version', 0), ('prove ME', 0), ('inspect nothing', 2)):
        assert run(*line.split()) == code


@pytest.mark.parametrize('seed', ['-1', '1.5', 'x', str(2**32)])
@pytest.mark.parametrize('line', ['train', 'demo', 'prototypes 4 3 --out p.safetensors'])
def test_seeds(line, seed, capsys):
    assert run(*line.split(), '--seed', seed) == 2
    assert 'argument --seed: must be an int from 0 to 2**32 - 1' in capsys.readouterr().err


def test_completion_is_what_the_parser_knows():
    script = shell('lm --completion')[1]
    def complete(*words):
        words = shlex.join(('largest-margins', *words))
        return set(shell(f'{script}\nCOMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n'
                         '_largest_margins; echo "${COMPREPLY[@]}"')[1].split())
    assert complete('') >= set(COMMANDS) | {'--version'} and complete('pro') == {'prove', 'prototypes'}
    assert complete('table', 'sph') == {'sphere'} and '--resume' in complete('table', '2', '--')
    assert complete('inspect', 'x.pth', '--t') == {'--transposed'}


@pytest.mark.parametrize('name,said', [('numpy', 'largest-margins: stopped'), ('argparse', '')])
def test_ctrl_c_during_an_import(tmp_path, name, said):
    "Whatever a library makes of it, it was Ctrl-C."
    (tmp_path/'sitecustomize.py').write_text(
        'import os, signal, sys\nclass Finder:\n def find_spec(self, name, path=None, target=None):\n'
        f'  if name == "{name}":\n   try: os.kill(os.getpid(), signal.SIGINT)\n'
        '   finally: raise ImportError("half imported")\nsys.meta_path.insert(0, Finder())\n')
    codes, _, err = shell('lm prove ME', PYTHONPATH=f'{tmp_path}:{os.environ.get("PYTHONPATH", "")}')
    assert (codes, err) == ('codes 130', said)


def test_an_error_that_nobody_foresaw_is_one_line(monkeypatch, capsys):
    "And not exit code 1, which says that a claim failed."
    def broken(*args, **kwargs): raise RuntimeError('a worker\ndied \x1b[2J')
    monkeypatch.setattr(import_module('largest_margins.claims'), 'prove', broken)
    assert run('prove') == 2
    assert capsys.readouterr().err == 'largest-margins: RuntimeError: a worker died \\x1b[2J\n'


def test_a_full_disk_under_train(tmp_path):
    "No file may be larger than 20 kB: one line, and nothing half."
    status, printed = run_alone(_limited, 20_000, 'train', '--epochs', '1', '--out', str(tmp_path/'out'))
    assert status == 2 and 'File too large' in printed.splitlines()[-1] and 'Traceback' not in printed
    assert not [p for p in (tmp_path/'out').rglob('*') if p.is_file()]


def _limited(size, *argv):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    main(argv)


def test_ctrl_c_keeps_the_finished_rows(tmp_path):
    with alone(_unproved, 'demo', '--epochs', '1', '--out', str(tmp_path)) as (process, printed):
        while len(list(tmp_path.rglob('seed-0.json'))) < 2 and process.is_alive(): time.sleep(.05)
        os.kill(process.pid, signal.SIGINT)
        process.join()
        out = printed.read_text()
    assert process.exitcode == 130 and 'Traceback' not in out
    assert 'of 6 runs complete' in out and (tmp_path/'table.html').exists()


def _unproved(*argv):
    import_module('largest_margins.claims').prove = lambda *args, **kwargs: []  # which takes longer than the rows
    main(argv)


def test_help_is_quick_and_prove_needs_no_fastai(tmp_path):
    blocker = tmp_path/'sitecustomize.py'
    blocker.write_text('import sys\nfor n in ("fastai", "matplotlib", "torchvision", "tqdm"): sys.modules[n] = None\n')
    env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    for argv, code, said in ((['--help'], 0, 'prove'), (['train', '--help'], 0, 'radians'),
                             (['prove', 'ME'], 0, '1 of 1'),
                             (['train', '--epochs', '1'], 2, 'largest_margins[fastai]')):
        process = command(*argv, env=env, cwd=tmp_path)
        out, err = process.communicate()
        assert process.returncode == code and said in out + err and 'Traceback' not in err
