"Every notebook runs, and every page runs when pasted: its Python in a namespace of its own, its shell in a shell."
import json
import os
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from IPython.display import Markdown
from pages import notebooks, root
from pasting import UNSEEN, fences, run_notebook
from processes import run_alone

from largest_margins import cli
from largest_margins.cli import main

QUIET = dict(MPLBACKEND='agg', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore',
             PYTHONPATH=os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')]),
             PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))


def run(command, folder, seconds=600, **environment):
    done = subprocess.run(command, cwd=folder, env=os.environ | QUIET | environment, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def ran(notebook, tmp_path):
    "Runs a notebook in a folder that has what its checks read; fails if it does."
    group = '' if notebook.parent == root/'nbs' else notebook.parent.name
    folder, pasted = tmp_path/'nbs'/group, tmp_path/'pasted'
    for made in (folder, pasted): made.mkdir(parents=True, exist_ok=True)
    for read in ('benchmarks', 'results'): (tmp_path/read).symlink_to(root/read)
    status, printed = run_alone(run_notebook, notebook, folder, pasted, folder=folder, TMPDIR=str(tmp_path))
    assert status == 0, printed[-3000:]
    assert not [*folder.iterdir(), *pasted.iterdir()], 'nothing is left where a notebook ran'


@pytest.mark.parametrize('notebook', notebooks, ids=str)
def test_a_notebook(notebook, tmp_path): ran(root/'nbs'/notebook, tmp_path)


def blocks(notebook, languages):
    "What a reader can copy from a page, from top to bottom: fenced blocks of the languages, and cells of Python."
    found = []
    for cell in json.loads((root/'nbs'/notebook).read_text(encoding='utf-8'))['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': found += fences(text, languages)
        elif 'python' in languages and not UNSEEN.search(text): found.append(text)
    return found


def test_the_options_on_the_page_of_the_command_are_those_of_today():
    "Its tables are stored, and made from what `--help` prints."
    cells = json.loads((root/'nbs/study/33_cli.ipynb').read_text(encoding='utf-8'))['cells']
    source = {cell['id']: ''.join(cell['source']) for cell in cells}
    names, known = [cell for cell in cells if '\noptions(' in source[cell['id']]], dict(vars(cli), Markdown=Markdown)
    exec(next(text for text in source.values() if 'def options(' in text), known)
    assert len(names) >= 6
    for cell in names:
        made = eval(source[cell['id']].partition('\n')[2], known).data
        assert made == ''.join(cell['outputs'][0]['data']['text/markdown'])


CHECK = re.compile(r'^\s*(?:assert\b|test_\w+\(|with expect_fail)|: assert\b', re.M)


def test_visible_blocks_hold_no_checks():
    assert CHECK.search('for x in y:\n    assert x') and CHECK.search('test_eq(1, 1)') and not CHECK.search('test = 1')
    assert not [(str(n), code) for n in notebooks for code in blocks(n, {'python', 'py'}) if CHECK.search(code)]


# --- shell ---

SHELL = {'sh', 'bash', 'shell', 'console'}
GUIDES = [n for n in notebooks if n.parts[0] in ('index.ipynb', 'start', 'howto') and blocks(n, SHELL)]


def offline(folder):
    "The repository's address is this tree; pip resolves nothing and installs nothing; make says what it would do."
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    git = {'url.' + str(folder/'origin') + '.insteadOf': ini['DEFAULT']['git_url'], 'safe.directory': '*',
           'user.name': 'nobody', 'user.email': 'nobody@example.org'}
    found = dict(GIT_CONFIG_COUNT=str(len(git)), MAKEFLAGS='n', PIP_NO_INDEX='1', PIP_NO_DEPS='1', PIP_DRY_RUN='1',
                 PIP_NO_BUILD_ISOLATION='0', PIP_DISABLE_PIP_VERSION_CHECK='1')
    for n, (key, value) in enumerate(git.items()):
        found |= {f'GIT_CONFIG_KEY_{n}': key, f'GIT_CONFIG_VALUE_{n}': value}
    return found


def repository(folder):
    "A small repository of what is built, so that no page depends on the history of this one."
    names = ['settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in', 'Makefile',
             'largest_margins', 'examples']
    command = ' && '.join([f'mkdir {folder}', f'cp -R {" ".join(str(root/n) for n in names)} {folder}', f'cd {folder}',
                           'git init -q', 'git add -A', 'git -c commit.gpgsign=false commit -qm all'])
    return ['bash', '-c', command]


OURS = re.compile(r'largest-margins ((?:[^\n]|(?<=\\)\n)+)\n?')


@pytest.mark.parametrize('notebook', GUIDES, ids=str)
def test_shell_blocks(notebook, tmp_path):
    "In a shell; where there is nothing but our command, in forks of a process that has loaded the libraries."
    lines, here = ''.join(blocks(notebook, SHELL)), tmp_path/'here'
    here.mkdir()
    if not OURS.sub('', lines):
        for line in OURS.findall(lines):
            status, printed = run_alone(main, shlex.split(line.replace('\\\n', ' ')), folder=here)
            assert status == 0, printed[-3000:]
        return
    environment = offline(tmp_path)
    run(repository(tmp_path/'origin'), tmp_path, **environment)
    run(['bash', '-euc', lines], here, **environment)


# --- the tests themselves can fail ---

HIDDEN = ('#| hide\n', '#| export\n', '#| exports\n', '#| exporti\n', '#| echo: false\n', '#| code-fold: true\n')


def test_what_counts_as_seen():
    seen = ['x = 1', '#| output: false\nx', '#| code-fold: show\nx']
    assert not any(map(UNSEEN.search, seen))
    assert all(map(UNSEEN.search, [*HIDDEN, '#| default_exp x', 'show_doc(x)']))
    assert fences('a\n```sh\nls\n```\n```python\nx\n```', {'sh'}) == ['ls\n']
    with pytest.raises(AssertionError): run(['bash', '-euc', 'false'], '.')


@pytest.mark.parametrize('cells,error', [
    (['x = 1', '#| hide\nassert x == 1\ny = 2\nx = 3', '#| hide\nassert (x, y) == (3, 2)', 'assert x == 1'], None),
    (['from IPython.display import display', 'display(1)'], None), (['#| hide\ndisplay(1)'], None),
    (['#| default_exp margins', '#| export\n1 / 0', '#| hide\nfrom largest_margins import margins\nclosest = angle\n'
      'assert margins.angle is margins.closest'], None),
    (['x = 1', '#| hide\nassert x == 2'], 'AssertionError'), (['#| hide\nx = 1', 'x'], 'NameError'),
    (['#| default_exp margins', '#| export\ndef class_margin(): pass', 'class_margin'], 'NameError'),
    (['#| hide\nfrom pathlib import Path\nPath("x").touch()', 'open("x")'], 'FileNotFoundError'),
    (['```python\nx\n```'], 'NameError'), (['display(1)'], 'NameError'), (['%matplotlib inline'], 'SyntaxError'),
    (['import os; os._exit(3)'], '3 == 0'), (['open("left", "w")'], 'nothing is left')], ids=str)
def test_a_notebook_that_fails(cells, error, tmp_path):
    "What its cells that nobody sees define, a reader has not; what only a notebook knows, a script does not."
    made = [dict(cell_type='markdown' if text[0] == '`' else 'code', id=str(n), metadata={}, source=text,
                 **({} if text[0] == '`' else dict(outputs=[], execution_count=None))) for n, text in enumerate(cells)]
    path = tmp_path/'page.ipynb'
    path.write_text(json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)))
    if error is None: ran(path, tmp_path)
    else:
        with pytest.raises(AssertionError, match=error): ran(path, tmp_path)
