"From recipes to tables: plans, records, resuming after a kill, aggregation, writers, and the command."
import csv
import html
import io
import json
import math
import os
import re
import signal
import time
from dataclasses import replace
from html.parser import HTMLParser

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from processes import alone, run_alone

from largest_margins.cli import main
from largest_margins.data import imbalanced_indices, load
from largest_margins.study.configurations import LOSSES
from largest_margins.study.experiments import Configuration, train
from largest_margins.study.identities import ReIDConfiguration
from largest_margins.study.pages import comma_separated, html_page, latex, markdown
from largest_margins.study.recipes import TABLES, choose, printed, printed_numbers, single
from largest_margins.study.tables import (
    _shown,
    aggregate,
    execute,
    make_table,
    plan,
    read_record,
    run_one,
    summarise,
)
from largest_margins.training.bodies import BODIES, make_body
from largest_margins.training.measures import MEASURES

ONE, TWO = TABLES['1'], TABLES['2']
CHOICE = dict(rows=['ce*'], seeds=2, epochs=1)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A finished table, with two jobs."
    out = tmp_path_factory.mktemp('whole')
    assert make_table(ONE, 'digits', out, jobs=2, **CHOICE, tell=lambda line: None)
    return out


def run(*argv):
    with pytest.raises(SystemExit) as end: main([str(a) for a in argv])
    return end.value.code


def records(out): return {p.relative_to(out).as_posix(): json.loads(p.read_text()) for p in out.rglob('seed-*.json')}


def timeless(found): return {k: v for k, v in found.items() if k not in ('seconds', 'git')}


# Configurations that tables brought

@pytest.mark.parametrize('given,message', [
    (dict(reduction='median'), 'reduction must be one of mean, class-mean'),
    (dict(loss='sample-margin', logit_adjustment=1.), 'no meaning'),
    (dict(logit_adjustment=-1.), 'logit_adjustment'), (dict(reweighted=1.), 'reweighted must be'),
    (dict(loss='focal', fixed=True), 'fixed has no meaning'), (dict(schedule='never'), 'schedule must be one of'),
    (dict(body='resent'), 'body must be one of conv3'), (dict(shift=-1), 'shift'), (dict(weight_decay=-1.), 'weight')])
def test_bad_configurations(given, message):
    with pytest.raises(ValueError, match=message): Configuration(**given)


@pytest.mark.parametrize('name,wrong', [('body', 3), ('dataset', 3), ('data', b'x'), ('loss', []), ('schedule', None),
                                        ('epochs', '9'), ('scale', '9'), ('flip', 1), ('bf16', 'yes'), ('seed', 1.5)])
def test_a_field_of_another_type(name, wrong):
    for kind in (Configuration, ReIDConfiguration) if name != 'bf16' else (Configuration,):
        with pytest.raises(TypeError, match=f'^{name} must be '): kind(**{name: wrong})


def test_the_size_of_a_folder_s_images_and_the_stem_for_it(tmp_path):
    for i in range(8):
        file = tmp_path/str(i % 2)/f'{i}.png'
        file.parent.mkdir(exist_ok=True)
        Image.new('RGB', (90, 70), (20 * i, 0, 0)).save(file)
    c = Configuration(dataset=str(tmp_path), size=80, body='resnet18', loss='ce')
    assert c.images.train_images.shape[1:] == (3, 80, 80)
    strides = [make_body('resnet18', 3, pixels).conv1.stride for pixels in (32, 64, 80)]
    assert strides == [(1, 1), (1, 1), (2, 2)]


@pytest.mark.parametrize('loss', [name for name, entry in LOSSES.items() if entry.prior])
def test_logit_adjustment_is_in_the_loss(loss):
    counts = [50, 5, 500, 20]
    adjusted, plain = (Configuration(loss=loss, logit_adjustment=tau).loss_func(counts) for tau in (1., 0.))
    cosines = torch.tensor([[.5, .1, -.3, .2], [-.2, .6, .3, .1]])
    assert adjusted(cosines, torch.tensor([1, 1])) > plain(cosines, torch.tensor([1, 1]))  # rare: a larger loss
    assert adjusted(cosines, torch.tensor([2, 2])) < plain(cosines, torch.tensor([2, 2]))
    torch.testing.assert_close(adjusted.activation(cosines), plain.activation(cosines))


def test_fixed_prototypes_stay():
    for embedding, angle in ((12, 96.379), (4, None)):
        found = train(Configuration(loss='normface', fixed=True, embedding=embedding, epochs=1))
        if angle: assert found.class_margin == pytest.approx(angle, abs=1e-3)
        assert {round(e['class_margin'], 3) for e in found.history} == {round(found.class_margin, 3)}


def test_reweighting_waits_for_its_epochs():
    c = Configuration(loss='ldam', ratio=20., epochs=4, embedding=12)
    usual, late = train(c).history, train(replace(c, reweighted=.5)).history
    assert [e['train_loss'] for e in usual[:2]] == [e['train_loss'] for e in late[:2]]
    assert usual[2]['train_loss'] != late[2]['train_loss']


@pytest.mark.parametrize('schedule', ['cosine', 'steps'])
def test_sgd_schedules_train(schedule):
    found = train(Configuration(schedule=schedule, learning_rate=.1, weight_decay=1e-4, epochs=3))
    assert not found.diverged and found.accuracy > 50


@pytest.mark.parametrize('name,pixels', [('conv3', 8), ('conv4', 16), ('resnet18', 8), ('resnet34', 8), ('resnet32', 8),
                                         ('resnet10t', 32)])
def test_every_body_has_a_gradient_everywhere(name, pixels):
    if name not in BODIES:
        assert make_body(name, 1) == name
        return
    body = make_body(name, 2)
    body(torch.rand(2, 2, pixels, pixels)).sum().backward()
    assert all(p.grad is not None for p in body.parameters())


# What a result knows about its classes

def test_classes_by_loops():
    found = train(Configuration(loss='ce', ratio=20., kind='step', epochs=2))
    right = found.predictions == found.targets
    by_class = [100 * right[found.targets == c].double().mean().item() for c in range(10)]
    assert found.class_accuracies.tolist() == pytest.approx(by_class)
    assert found.balanced_accuracy == pytest.approx(np.mean(by_class))
    assert min(found.counts[:5]) > 100 and found.counts[5:] == [6] * 5
    assert found.many == pytest.approx(np.mean(by_class[:5])) and math.isnan(found.medium)
    assert found.few == pytest.approx(np.mean(by_class[5:])) and found.rare_accuracy == pytest.approx(found.few)
    assert found.shots(6, 6).tolist() == 5 * [False] + 5 * [True]
    for truth, guess in ((0, 0), (7, 1), (9, 9)):
        both = (found.targets == truth) & (found.predictions == guess)
        assert found.confusion[truth, guess] == both.sum()


# Recipes

def test_rows_of_the_tables():
    assert len(ONE.rows(10)) == 26 and len(TWO.rows(10)) == 30 and len(TWO.settings) == 4
    for recipe in (ONE, TWO):
        names = [row.name for row in recipe.rows(10)]
        assert len(set(names)) == len(names) and not any(re.search(r'[\s/]', name) for name in names)
    c = TWO.configuration('fashion_mnist', TWO.settings[2], choose(TWO.rows(10), ['ldam-drw'])[0], seed=3)
    assert (c.kind, c.ratio, c.loss, c.reweighted, c.seed) == ('step', 100., 'ldam', .2, 3)


def test_all_that_is_printed_is_shown_somewhere():
    found = [printed(t, d, s, row) for t in (ONE, TWO) for d in ('mnist', 'cifar10', 'cifar100')
             if d in t.beside.values() or d in t.beside or d == t.beside['']
             for s in t.settings for row in t.rows(10)]
    cells = [cell for cell in printed_numbers()['cells'] if cell.get('accuracy') is not None]
    assert sum(map(bool, found)) == len(cells) == 20 * 3 - 4 + 12 * 6
    ldam = choose(TWO.rows(10), ['ldam+rw'])[0]
    assert printed(TWO, 'fashion_mnist', TWO.settings[2], ldam) == dict(accuracy=64.99, class_margin=96.04)
    assert printed(TWO, 'digits', TWO.settings[0], choose(TWO.rows(10), ['lm-class-mean'])[0]) == {}


# Records and runs

def test_records(whole):
    found = records(whole)
    assert set(found) == {f'runs/balanced/{row}/seed-{seed}.json' for row in ('ce', 'ce+rsm') for seed in (0, 1)}
    for path, kept in found.items():
        assert kept['asked']['seed'] == int(path[-6]) and not kept['diverged']
        assert set(kept) >= {'measured', 'test_margins', 'train_margins', 'history', 'machine', 'git', 'version',
                             'counts', 'confusion', 'seconds'}
        assert len(kept['history']) == 1 and sum(map(sum, kept['confusion'])) == 450
        assert kept['measured']['class_margin'] <= kept['bound'] and 'data' not in kept['asked']
    assert not [p for p in whole.rglob('.*') if p.is_file()]


def test_jobs_change_nothing(whole, tmp_path):
    runs = plan(ONE, **CHOICE)
    with joblib.parallel_config(backend='threading'):  # what Dask or Ray would be: another backend, the same call
        for _ in execute(runs, tmp_path): pass
    assert {k: timeless(v) for k, v in records(tmp_path).items()} == {
        k: timeless(v) for k, v in records(whole).items()}


def test_a_record_answers_one_question(whole, tmp_path):
    one = plan(ONE, **CHOICE)[0]
    assert read_record(whole/one.path, one.configuration)
    assert read_record(whole/one.path, replace(one.configuration, data='elsewhere'))
    for name, other in dict(seed=1, epochs=2, loss='focal').items():
        with pytest.raises(ValueError, match=f'is of another training.*{name} was .*, is now {other!r}'):
            read_record(whole/one.path, replace(one.configuration, **{name: other}))
    newer = json.loads((whole/one.path).read_text())
    newer['asked']['temperature'] = 3
    for content in (newer, {'asked': 3}, {}, [1], 7):
        (tmp_path/'foreign.json').write_text(json.dumps(content))
        with pytest.raises(ValueError, match='foreign.json is'):
            read_record(tmp_path/'foreign.json', one.configuration)
    record = json.loads((whole/one.path).read_text())
    needed = 'asked', 'diverged', 'measured', 'machine', 'seconds', 'classes', 'bound'
    contents = [json.dumps({**record, name: None}) for name in needed]
    contents += [json.dumps({k: v for k, v in record.items() if k != name}) for name in needed]
    for content in ('', '{"asked": {', '[' * 9999, *contents):
        (tmp_path/'half.json').write_text(content)
        with pytest.raises(ValueError, match='half.json is not the record of a run: remove it'):
            read_record(tmp_path/'half.json', one.configuration)
    os.mkfifo(tmp_path/'fifo.json')
    for other in (tmp_path/'fifo.json', tmp_path):  # which nobody waits for, or reads
        with pytest.raises(ValueError, match='is not the record of a run: remove it'):
            read_record(other, one.configuration)


def test_records_of_before_tasks_are_read(tmp_path):
    "What the first runner wrote, with fewer fields asked and fewer numbers measured."
    run, = plan(ONE, rows=['ce'], epochs=1)
    before = dict(
        asked=dict(dataset='digits', loss='ce', scale=None, margin=None, sample_margin=0., zero_centroid=0., ratio=1.,
                   kind='long-tailed', reduction='mean', logit_adjustment=0., reweighted=0., fixed=False, epochs=1,
                   batch_size=64, learning_rate=.01, schedule='one-cycle', weight_decay=.01, body='conv3', embedding=32,
                   shift=0, flip=False, seed=0),
        diverged=False, measured=dict(accuracy=97.5, class_margin=80., few=None), bound=96.38, seconds=.5,
        classes=list('0123456789'), machine=dict(python='3.11'))
    (tmp_path/run.path).parent.mkdir(parents=True)
    (tmp_path/run.path).write_text(json.dumps(before))
    heard = []
    assert make_table(ONE, 'digits', tmp_path, rows=['ce'], epochs=1, resume=True, tell=heard.append)
    assert heard[0] == '1 of 1 runs are there already' and '| CE | **97.50 ± –** | 99.11 |' in heard[1]
    assert '10 classes, 1 epochs, conv3' in heard[1] and 'exceed 96.38°' in heard[1]


def test_resume_trains_what_is_missing(whole, tmp_path):
    runs, heard = plan(ONE, **CHOICE), []
    run_one(runs[1], tmp_path)
    before = (tmp_path/runs[1].path).stat().st_mtime_ns
    assert make_table(ONE, 'digits', tmp_path, resume=True, **CHOICE, tell=heard.append)
    assert heard[0] == '1 of 4 runs are there already' and sum('Balanced: CE' in line for line in heard) == 3
    assert (tmp_path/runs[1].path).stat().st_mtime_ns == before
    assert (tmp_path/'table.csv').read_text() == (whole/'table.csv').read_text()


def test_no_other_table_is_replaced(whole):
    "Neither that of another recipe, with or without resume, nor somebody's own file."
    before = (whole/'table.md').read_text()
    for recipe, rows in ((TWO, ['ce']), (single(Configuration()), None)):
        for resume in (False, True):
            with pytest.raises(ValueError, match='table.md is another table: # Table 1'):
                make_table(recipe, 'digits', whole, rows=rows, epochs=1, resume=resume, tell=lambda _: None)
    assert (whole/'table.md').read_text() == before


def test_killed_and_resumed(whole, tmp_path):
    "With two jobs until it is killed, with its workers, and then with one."
    argv = 'table', '1', '--rows', 'ce*', '--seeds', '2', '--epochs', '1', '--out', str(tmp_path)
    with alone(_leader, *argv, '--jobs', '2') as (process, _):
        while not list(tmp_path.rglob('seed-*.json')) and process.is_alive(): time.sleep(.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert 1 <= len(records(tmp_path)) < 4 and not (tmp_path/'table.md').exists()
    status, out = run_alone(main, [*argv, '--resume'])
    assert status == 0 and 'Traceback' not in out and 'FutureWarning' not in out
    assert 'of 4 runs are there already' in out
    assert {k: timeless(v) for k, v in records(tmp_path).items()} == {k: timeless(v) for k, v in records(whole).items()}
    assert (tmp_path/'table.csv').read_text() == (whole/'table.csv').read_text()


def _leader(*argv):
    "The command, which its workers are killed with."
    os.setsid()
    main(argv)


def test_ctrl_c_writes_the_table_of_what_is_there(tmp_path):
    with alone(main, ['table', '1', '--epochs', '2', '--out', str(tmp_path)]) as (process, printed):
        while not list(tmp_path.rglob('seed-*.json')) and process.is_alive(): time.sleep(.05)
        os.kill(process.pid, signal.SIGINT)
        process.join()
        out = printed.read_text()
    assert process.exitcode == 130 and 'Traceback' not in out
    assert 'of 26 runs complete' in out and (tmp_path/'table.md').exists()


def test_a_diverged_run_is_recorded_and_the_table_goes_on(tmp_path):
    one, two = plan(ONE, **CHOICE)[::2]
    _, lost = run_one(replace(one, configuration=replace(one.configuration, learning_rate=1e25)), tmp_path)
    assert lost['diverged'] and set(lost['measured'].values()) == {None}
    json.dumps(lost, allow_nan=False)
    line, = aggregate(ONE, [(one, lost), run_one(two, tmp_path)])
    assert (line.runs, line.diverged, len(line.values['accuracy'])) == (2, 1, 1)
    assert 'CE (1 of 2 diverged) |' in markdown(summarise(ONE, [(one, lost), run_one(two, tmp_path)]))
    text = markdown(summarise(ONE, [(one, lost)]))
    assert 'CE (1 of 1 diverged) |' in text and 'nan' not in text


# Aggregation and writers, on made-up runs

@pytest.fixture(scope='module')
def made_up(whole):
    "Table 2 with numbers drawn at random, three seeds, one of which diverged in one row."
    kept, rng, finished = next(iter(records(whole).values())), np.random.default_rng(0), []
    for run in plan(TWO, rows=['ce', 'cosface*', 'lm-class-mean'], seeds=3):
        lost = run.row.name == 'ce' and run.configuration.seed == 1
        numbers = {name: None if lost or name == 'few' else float(rng.uniform(10, 90)) for name in MEASURES}
        finished.append((run, {**kept, 'diverged': lost, 'measured': numbers, 'bound': numbers['bound']}))
    return finished


def test_mean_and_std_are_numpy_s(made_up):
    lines = aggregate(TWO, made_up[::-1])
    assert [(x.setting.name, x.row.name) for x in lines] == [
        (s, r) for s in ('long-tailed-100', 'long-tailed-10', 'step-100', 'step-10')
        for r in ('ce', 'cosface', 'cosface+rw', 'lm-class-mean')]
    for x in lines:
        ours = [f['measured'] for run, f in made_up if (run.setting, run.row) == (x.setting, x.row)]
        for name in MEASURES:
            numbers = [m[name] for m in ours if m[name] is not None]
            if not numbers: assert math.isnan(x.mean(name)) and _shown(x, name) == '—'
            else:
                assert x.mean(name) == pytest.approx(np.mean(numbers)) and x.runs == 3
                assert x.std(name) == pytest.approx(np.std(numbers, ddof=1))
        assert x.diverged == (x.row.name == 'ce')
    single, = aggregate(TWO, made_up[:1])
    assert math.isnan(single.std('accuracy')) and _shown(single, 'accuracy').endswith(' ± –')


class Cells(HTMLParser):
    "The texts of all table cells, bold ones marked."

    def __init__(self, page):
        super().__init__()
        self.rows, self.bold, self.inside = [], False, False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == 'tr': self.rows.append([])
        if tag in ('td', 'th'): self.rows[-1].append('')
        self.bold, self.inside = tag == 'b', tag in ('td', 'th', 'b')

    def handle_endtag(self, tag): self.inside = False

    def handle_data(self, text):
        if self.inside: self.rows[-1][-1] += f'**{text}**' if self.bold else text


def test_the_writers_agree(made_up):
    summary = summarise(TWO, made_up)
    lines = [line for line in markdown(summary).splitlines() if line.startswith('| ') and '---' not in line]
    cells = [[c.strip().replace('\\*', '*') for c in line[1:-1].split('|')] for line in lines]
    assert Cells(html_page(summary)).rows == cells and len(cells) == 4 * 5
    assert cells[0] == ['', 'accuracy %', 'paper, CIFAR-10', 'best epoch % (chosen on test)', 'many %', 'medium %',
                        'rarer half %', 'class margin°', 'paper, CIFAR-10', 'less the optimum°', 'mean sample margin',
                        'runs']  # no few-shot
    rows = list(csv.DictReader(io.StringIO(comma_separated(summary))))
    for row, ours in zip(rows, [c for c in cells if c[0]], strict=True):
        assert ours[0].split(' (')[0] == row['label'] and ours[2] == row['accuracy_paper'].removesuffix('.0')
        mean, std = (float(row[f'accuracy_{what}']) for what in ('mean', 'std'))
        assert ours[1].strip('*') == f'{mean:.2f} ± {std:.2f}' and row['few_mean'] == ''
    body = [line for line in latex(summary).splitlines() if ' & ' in line]
    assert len(body) == len(cells) and all(line.count('&') == 11 and line.endswith(r' \\') for line in body)
    assert not re.search(r'(?<!\\)[%_°±]', ''.join(body)) and latex(summary).count(r'\textbf') == 4 * 7


def test_the_best_is_bold(made_up):
    for _, heads, rows in summarise(TWO, made_up).parts:
        for j in (heads.index('accuracy %'), heads.index('class margin°')):
            values = [float(row[j][0].split()[0]) for row in rows]
            assert [row[j][1] for row in rows] == [v == max(values) for v in values]
        assert not any(row[j][1] for row in rows for j in (0, 2, len(heads) - 1))


# The command

@pytest.mark.parametrize('table, dataset, settings', [
    ('1', 'cifar100', 1), ('2', 'cifar10', 4), ('3', 'market1501', 1), ('2', 'mnist', 4)])
def test_a_dry_run_needs_no_data(table, dataset, settings, tmp_path, capsys):
    command = 'table', table, '--dataset', dataset, '--data', tmp_path/'nowhere', '--rows', 'ce', '--out', tmp_path/'x'
    assert run(*command, '--dry-run', '--seeds', '2') == 0
    printed = capsys.readouterr().out
    assert 'without the data' in printed and f'{2 * settings} runs, {2 * settings} to train' in printed
    assert run(*command) == 2


def test_dry_run(tmp_path, capsys):
    assert run('table', '2', '--rows', 'ce', 'lm-*', '--seeds', '3', '--dry-run', '--out', tmp_path/'x') == 0
    said = capsys.readouterr().out
    assert '132 runs, 132 to train' in said and not (tmp_path/'x').exists()
    data = load('digits')
    for kind in ('long-tailed', 'step'):
        kept = data.subset(imbalanced_indices(data.train_targets, 100., kind))
        assert f'{sum(kept.counts)} training images, by class {kept.counts}' in said
    assert 'LM-Softmax s=20 + 500 R_w' in said and 'conv3, 20 epochs' in said


def test_a_dry_run_estimates_from_an_epoch(tmp_path, capsys):
    argv = 'table', '1', '--rows', 'ce*', '--dry-run', '--out', tmp_path/'x'
    for jobs in (1, 2): assert run(*argv, '--jobs', jobs) == 0
    said = capsys.readouterr().out
    assert said.count('one epoch of ce takes') == 2 and 'all 2 runs' in said and not (tmp_path/'x').exists()


def test_options_change_every_row_that_can_have_them(tmp_path, capsys):
    asked = ['--dataset', 'cifar10', '--data', tmp_path, '--dry-run']
    training = '--scale', '7', '--body', 'conv3', '--batch-size', '50', '--learning-rate', '.5'
    assert run('table', '1', *asked, *training) == 0
    said = capsys.readouterr().out
    assert '10 runs' in said and 'normface-7+rsm' in said and 'CosFace s=7 m=0.1' in said and 's=20' not in said
    assert 'conv3, 250 epochs, batches of 50, cosine, learning rate 0.5' in said
    assert run('table', '2', *asked, '--scale', '7', '--rows', 'ce', 'ldam') == 0
    assert 'LDAM s=7' in capsys.readouterr().out
    assert run('table', 'sphere', '--bf16', '--dry-run') == 2


def test_rows_as_printed():
    for recipe, n in ((ONE, 20), (TWO, 13), (TABLES['3'], 13)):
        rows = choose(recipe.rows(10) + recipe.more(10), ['printed'])
        assert len(rows) == n and not {row.name for row in rows} & {row.name for row in recipe.rows(10)}
        for row in rows:
            if recipe != TWO or row.name == 'printed-ldam-30': continue
            assert printed(recipe, 'cifar10', recipe.settings[0], row)
    rows = {row.name: row for row in TWO.more(100)}
    c = TWO.configuration('cifar100', TWO.settings[0], rows['printed-cosface+rw'])
    assert (c.scale, c.margin, c.zero_centroid, c.body, c.neck, c.epochs, c.rotate) == (
        5., .35, 50_000., 'paper-resnet34', 'none', 250, 20.)
    assert TWO.configuration('cifar10', TWO.settings[0], rows['printed-ldam-30']).scale == 30.
    mnist = ONE.configuration('mnist', ONE.settings[0], ONE.more(10)[0])
    assert (mnist.body, mnist.neck, mnist.batch_size, mnist.schedule) == ('paper-conv', 'none', 256, 'cosine')


def test_every_setting_has_a_source():
    for recipe in (ONE, TWO, TABLES['3']):
        for dataset in ('mnist', 'cifar10', 'market1501', 'digits'):
            for row in recipe.rows(10) + recipe.more(10):
                found = recipe.settings_of(dataset, recipe.settings[0], row).sources
                assert found.keys() >= {'loss', 'body', 'epochs', 'batch_size', 'learning_rate'} and all(found.values())


def test_finished_runs_are_not_repeated(whole, capsys):
    argv = ('table', '1', '--rows', 'ce*', '--seeds', 2, '--epochs', 1, '--out', whole, '--resume')
    assert run(*argv, '--dry-run') == 0 and '4 runs, 0 to train' in capsys.readouterr().out
    assert run(*argv[:-1]) == 2 and 'has 4 of these runs' in capsys.readouterr().err
    other = [2 if x == 1 else x for x in argv]
    assert run(*other) == 2 and 'epochs was 1, is now 2' in capsys.readouterr().err
    assert {kept['asked']['epochs'] for kept in records(whole).values()} == {1}
    assert run(*argv) == 0
    out = html.unescape(capsys.readouterr().out)
    assert '| CE + 0.5 R_sm |' in out and 'paper, MNIST' in out and '95.41' in out and 'table.tex' in out


@pytest.mark.parametrize('argv,message', [
    (['7'], 'invalid choice'), (['sphere', '--dataset', 'digits'], 'dataset has no meaning for the table sphere'),
    (['1', '--weights', 'w.pth'], 'weights has no meaning for the table 1'),
    ([], 'required'), (['1', '--rows', 'cosfarce'], "got 'cosfarce'"),
    (['1', '--seeds', '0'], 'seeds must be'), (['1', '--jobs', '0'], 'jobs must be'),
    (['1', '--jobs', '-2'], 'or −1 for one a core'),
    (['1', '--epochs', '0'], 'epochs must be'), (['1', '--jobs', 'all'], 'invalid int'),
    (['1', '--threads', '0'], 'threads must be'), (['1', '--threads', '100000'], 'threads must be ≥ 1 and ≤ 1024'),
    (['1', '--jobs', '100000'], 'jobs must be'), (['1', '--out', ''], 'out must not be empty'),
    (['2', '--dataset', 'nothing'], 'neither a directory nor'),
    (['2', '--dataset', 'cifar10', '--data', 'nowhere'], 'data_batch_1')])
def test_usage_errors_are_one_line_and_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run('table', *argv) == 2
    err = capsys.readouterr().err
    assert message in err and 'Traceback' not in err and not list(tmp_path.iterdir())
    assert len([line for line in err.splitlines() if 'error' in line or line.startswith('largest-margins:')]) == 1
