"Every page runs when pasted: its visible Python blocks in a fresh interpreter, its shell blocks in a shell."
import json
import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from pages import notebooks, root

# pages that do not run yet; a page that runs must leave the list, so it only becomes shorter
TO_DO = (root/'tests/pages_to_paste.txt').read_text(encoding='utf-8').split()
FENCE = re.compile(r'^```(\w+)\n(.*?)^```', re.M | re.S)
# cells that no reader sees, that are folded, or that show the library's own source
UNSEEN = re.compile(r'^(?:#\|\s*(?:hide|exporti?s?|default_exp|echo:\s*false|code-fold:\s*true|include:\s*false)\b|'
                    r'show_doc\()', re.M)


def fences(markdown, languages):
    return [code for language, code in FENCE.findall(markdown) if language in languages]


def blocks(notebook, languages):
    "What a reader can copy from a page, from top to bottom: fenced blocks of the languages, and cells of Python."
    found = []
    for cell in json.loads((root/'nbs'/notebook).read_text(encoding='utf-8'))['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            found += fences(text, languages)
        elif 'python' in languages and not UNSEEN.search(text):
            found.append(text)
    return found


QUIET = dict(MPLBACKEND='agg', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore',
             PYTHONPATH=os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')]),
             PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))


def run(command, folder, seconds=600, **environment):
    done = subprocess.run(command, cwd=folder, env=os.environ | QUIET | environment, text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope='module')
def fresh():
    "Runs a file in an interpreter that has loaded libraries only; returns what it printed."
    server = subprocess.Popen([sys.executable, root/'tests/fresh.py'], env=os.environ | QUIET, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(path):
        printed = path.with_suffix('.txt')
        print(json.dumps([str(path), str(path.parent), str(printed)]), file=server.stdin, flush=True)
        status, text = server.stdout.readline().strip(), printed.read_text(encoding='utf-8')
        assert status == '0', f'{status}: {text[-3000:]}'
        return text
    yield run
    server.communicate()


def page(notebook):
    later = pytest.mark.xfail(raises=AssertionError, strict=True, reason='not yet written to be pasted')
    return pytest.param(notebook, id=str(notebook), marks=[later] if notebook.as_posix() in TO_DO else [])


@pytest.mark.parametrize('notebook', [page(n) for n in notebooks])
def test_python_blocks(notebook, tmp_path, fresh):
    (tmp_path/'page.py').write_text('\n\n'.join(blocks(notebook, {'python', 'py'})), encoding='utf-8')
    fresh(tmp_path/'page.py')


CHECK = re.compile(r'^\s*(?:assert\b|test_\w+\(|with expect_fail)|: assert\b', re.M)


def test_visible_blocks_hold_no_checks():
    assert CHECK.search('for x in y:\n    assert x') and CHECK.search('test_eq(1, 1)') and not CHECK.search('test = 1')
    assert not [(str(n), code) for n in notebooks for code in blocks(n, {'python', 'py'}) if CHECK.search(code)]


def test_the_list_names_pages():
    assert set(TO_DO) <= {n.as_posix() for n in notebooks}
    assert len(TO_DO) == len(set(TO_DO))
    assert not [n for n in TO_DO if n.startswith(('start/', 'howto/', 'explore/')) or n == 'index.ipynb']


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


@pytest.mark.parametrize('notebook', GUIDES, ids=str)
def test_shell_blocks(notebook, tmp_path):
    environment, here = offline(tmp_path), tmp_path/'here'
    run(repository(tmp_path/'origin'), tmp_path, **environment)
    here.mkdir()
    run(['bash', '-euc', '\n'.join(blocks(notebook, SHELL))], here, **environment)


# --- the tests themselves can fail ---

def test_what_counts_as_seen(tmp_path, fresh):
    seen = ['x = 1', '#| output: false\nx', '#| code-fold: show\nx']
    unseen = ['#| hide\nx', '#| export\nx', '#| exports\nx', '#| exporti\nx', '#| echo: false\nx',
              '#| code-fold: true\nx', '#| default_exp x', 'show_doc(x)']
    assert not any(map(UNSEEN.search, seen)) and all(map(UNSEEN.search, unseen))
    assert fences('a\n```sh\nls\n```\n```python\nx\n```', {'sh'}) == ['ls\n']
    for code, said in ('nothing', '1: .*NameError'), ('import os; os._exit(3)', '3: '):
        (tmp_path/'page.py').write_text(code)
        with pytest.raises(AssertionError, match=f'(?s)^{said}'): fresh(tmp_path/'page.py')
    (tmp_path/'page.py').write_text('print(__name__)')
    assert fresh(tmp_path/'page.py').endswith('__main__\n')
    with pytest.raises(AssertionError):
        run(['bash', '-euc', 'false'], tmp_path)
