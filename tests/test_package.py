"The package as users get it: wheel and sdist, what it imports, its floors, and the commands that set it up."
import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest

import largest_margins

root = Path(__file__).parent.parent
package = root/'largest_margins'
training_only = ['fastai', 'matplotlib', 'torchvision', 'sklearn', 'timm']
# The wings of the house: their rooms, and the wings that they may import besides themselves.
WINGS = {
    'ground': ('checks files images', ''),
    'theory': ('theory.* margins certificates bounds codes claims', 'ground'),
    'losses': ('losses heads regularizers engine.*', 'ground theory'),
    'ledger': ('ledger.*', 'ground theory losses'),
    'training': ('data plots callbacks learner training.*', 'ground theory losses'),
    'evaluation': ('reid verification reliability', 'ground theory losses training'),
    'study': ('study.* inspection', 'ground theory losses ledger training evaluation'),
    'door': ('cli', 'ground theory training study'),
}


def exported_modules():
    "Module name -> the notebook that writes it, whose `default_exp` names it."
    found = {}
    for path in sorted((root/'nbs').glob('*/*.ipynb')):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
        if name := re.search(r'^#\|\s*default_exp\s+(\S+)', code, re.M):
            assert name[1] not in found, f'{path} and {found[name[1]]} write one module'
            assert not re.search(r'^#\|\s*export[si]?[ \t]+\w', code, re.M), f'{path} writes two modules'
            found[name[1]] = path
    return found


def wing(name):
    "The one wing in which a module is a room."
    there, = (w for w, (rooms, _) in WINGS.items() if any(fnmatch(name, room) for room in rooms.split()))
    return there


def source(name):
    "The file of a module: `engine.fused` is in a folder."
    return package/f'{name.replace(".", "/")}.py'


modules = exported_modules()
shared = {'checks', 'files'}
light = sorted(name for name in modules if wing(name) in ('theory', 'losses', 'ledger') or name in shared)


def run(*command, **kwargs):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)


# --- wheel and sdist ---

@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    "The sdist, and the wheel that is built from it."
    tree = tmp_path_factory.mktemp('tree')
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md'):
        shutil.copy(root/name, tree)
    shutil.copytree(package, tree/package.name, ignore=shutil.ignore_patterns('__pycache__'))
    built = run(sys.executable, '-m', 'build', '--no-isolation', cwd=tree)
    assert built.returncode == 0, built.stdout + built.stderr
    return tree/'dist'


@pytest.fixture(scope='module')
def installed(dist, tmp_path_factory):
    "The wheel alone, in a folder of its own."
    target = tmp_path_factory.mktemp('installed')
    wheel = next(dist.glob('*.whl'))
    done = run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--target', target, wheel)
    assert done.returncode == 0, done.stderr
    return target


def test_wheel_holds_the_package_and_nothing_else(dist):
    names = ZipFile(next(dist.glob('*.whl'))).namelist()
    info = f'largest_margins-{largest_margins.__version__}.dist-info'
    assert {n.split('/')[0] for n in names} == {'largest_margins', info}
    ours = {p.relative_to(root).as_posix() for p in package.rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert {n for n in names if not n.startswith(info)} == ours
    assert {source(name).relative_to(root).as_posix() for name in modules} <= ours
    assert {f'largest_margins/{name}' for name in ('py.typed', '__init__.pyi', 'engine/__init__.py',
                                                   'study/__init__.py')} <= ours
    assert f'{info}/licenses/LICENSE' in names


def test_sdist_can_be_built_again(dist):
    with tarfile.open(next(dist.glob('*.tar.gz'))) as sdist:
        names = {n.split('/', 1)[1] for n in sdist.getnames() if '/' in n}
    assert {'setup.py', 'settings.ini', 'pyproject.toml', 'README.md', 'LICENSE', 'CHANGELOG.md'} <= names


def test_theory_and_losses_work_without_fastai(installed, tmp_path):
    assert {'margins', 'losses', 'codes', 'bounds'} <= set(light)
    code = f'''
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {training_only}: raise ImportError(name + ' is not installed')
sys.meta_path.insert(0, Blocked())
from importlib import import_module
for name in {light}: print(import_module('largest_margins.' + name).__file__)
'''
    done = run(sys.executable, '-c', code, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(installed)})
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(installed)) for line in done.stdout.split())


def test_command_line_is_installed(installed, tmp_path):
    env = {**os.environ, 'PYTHONPATH': str(installed)}
    done = run(sys.executable, installed/'bin/largest-margins', '--help', cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert 'largest-margins' in done.stdout


# --- the house ---

def imports(name):
    "Top-level names that a module imports, and our own modules among them."
    others, ours = set(), set()
    for node in ast.walk(ast.parse(source(name).read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ['largest_margins', *name.split('.')][:-node.level] if node.level else []
            module = '.'.join([*above, *filter(None, [node.module])])
            paths = [module] if module != 'largest_margins' else [f'{module}.{a.name}' for a in node.names]
        else:
            continue
        for path in paths:
            top, *rest = path.split('.')
            if top == 'largest_margins':
                ours.update(m for m in modules if '.'.join(rest) == m)
            else:
                others.add(top)
    return others, ours


@pytest.mark.parametrize('name', modules)
def test_a_room_imports_only_wings_that_its_own_may_import(name):
    own = wing(name)
    assert {wing(other) for other in imports(name)[1]} <= {own, *WINGS[own][1].split()}


def test_at_most_ten_floors_and_no_circle():
    floors = {}
    for name in TopologicalSorter({name: imports(name)[1] for name in modules}).static_order():
        floors[name] = 1 + max((floors[other] for other in imports(name)[1]), default=0)
    assert max(floors.values()) <= 10, sorted(floors.items(), key=lambda item: item[1])


def test_few_names_are_public_and_those_of_the_front_door_are():
    public = [name for module in modules for name in import_module(f'largest_margins.{module}').__all__]
    front = re.findall(r' as (\w+)$', (package/'__init__.pyi').read_text(encoding='utf-8'), re.M)
    assert len(public) == len(set(public)) <= 120
    assert set(front) <= set(public)


@pytest.mark.parametrize('name', light)
def test_theory_and_losses_need_only_torch_numpy_scipy(name):
    outside = imports(name)[0] - set(sys.stdlib_module_names)
    with_torch = {'sympy', 'mpmath'} if wing(name) == 'ledger' or name == 'claims' else set()  # torch requires them
    solver = {'clarabel'} if name == 'theory.three_point' else set()  # imported when it is asked to search
    assert outside <= {'torch', 'numpy', 'scipy'} | with_torch | solver


def test_generated_files_name_no_place_on_this_machine():
    written = [*package.rglob('*.py'), *(root/'nbs').rglob('*.ipynb'), root/'README.md']
    assert not [p for p in written if str(root) in p.read_text(encoding='utf-8')]


# --- make ---

fake_python = '''#!/bin/sh
# Stands in for Python: notes what it is asked and fails at what $FAILS names.
echo "$*" >> "$LOG"
case "$*" in *$FAILS*) exit 1;; esac
case "$*" in *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python;; esac
'''


@pytest.fixture
def setup(tmp_path):
    "`make` in a folder with nothing but the metadata, and a Python that installs nothing: (run make, read the log)."
    for name in ('Makefile', 'setup.py', 'settings.ini', 'pyproject.toml'):
        shutil.copy(root/name, tmp_path)
    python, log = tmp_path/'python', tmp_path/'log'
    python.write_text(fake_python)
    python.chmod(python.stat().st_mode | stat.S_IEXEC)

    def make(*args, fails='-'*9):
        log.write_text('')
        env = {k: v for k, v in os.environ.items() if not k.startswith('MAKE') and k != 'MFLAGS'}
        return run('make', f'PYTHON={python}', *args, cwd=tmp_path, env={**env, 'LOG': str(log), 'FAILS': fails})
    return make, log


def test_make_alone_lists_the_commands(setup):
    make, _ = setup
    listed = make().stdout
    for target in ('demo', 'test', 'notebooks', 'docs', 'hooks'):
        assert f'make {target} ' in listed


def test_an_old_python_is_named(setup):
    make, _ = setup
    done = make('.venv/.demo', fails='version_info')
    assert done.returncode != 0
    assert 'Python 3.10 or newer is needed' in done.stderr


def test_a_missing_ensurepip_is_named(setup):
    make, _ = setup
    done = make('.venv/.demo', fails='ensurepip')
    assert done.returncode != 0
    assert 'python3-venv' in done.stderr


def test_set_up_once(setup, tmp_path):
    make, log = setup
    assert make('.venv/.demo').returncode == 0
    calls = log.read_text()
    assert calls.index('-m venv') < calls.index('install torch') < calls.index('.[fastai]')
    make('.venv/.demo')
    assert log.read_text() == ''
    os.utime(tmp_path/'settings.ini', (2**31, 2**31))
    make('.venv/.demo')
    assert '.[fastai]' in log.read_text() and 'install torch' not in log.read_text()


def test_an_interrupted_installation_starts_again(setup):
    make, log = setup
    assert make('.venv/.test', fails='.[fastai').returncode != 0
    assert make('.venv/.test').returncode == 0
    assert '.[fastai,bounds,dev,docs]' in log.read_text()
