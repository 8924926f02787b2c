"settings.ini is the one source, and what is packed and promised (Python, NumPy, SciPy, sdist, security) is true."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from configparser import ConfigParser
from importlib.metadata import metadata
from pathlib import Path

import pytest

import largest_margins

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

root = Path(__file__).parent.parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg, toml = ini['DEFAULT'], tomllib.loads((root/'pyproject.toml').read_text())


def test_name_and_links():
    project = toml['project']
    assert project['name'] == cfg['lib_name'] == toml['tool']['nbdev']['lib_path']
    assert project['urls'] == {'Repository': cfg['git_url'], 'Documentation': cfg['doc_url']}


def test_version():
    assert largest_margins.__version__ == cfg['version'], 'bump settings.ini and __init__.py together'
    assert f"## [{cfg['version']}]" in (root/'CHANGELOG.md').read_text(), 'say in CHANGELOG.md what is new'


def test_everything_else_is_dynamic():
    assert set(toml['project']) == {'name', 'dynamic', 'urls'}


def test_what_is_installed_is_what_settings_say():
    installed = metadata(cfg['lib_name'])
    assert installed['Version'] == cfg['version']
    assert installed['License-Expression'] == cfg['license']
    assert installed['Requires-Python'] == f">={cfg['min_python']}"
    plain = [r for r in installed.get_all('Requires-Dist') if 'extra' not in r]
    assert sorted(plain) == sorted(cfg['requirements'].split())
    assert set(installed.get_all('Provides-Extra')) == {'fastai', 'bounds', 'dev', 'docs'}


def test_make_asks_for_the_python_that_settings_name():
    major, minor = cfg['min_python'].split('.')
    assert f'sys.version_info < ({major}, {minor})' in (root/'Makefile').read_text()


def test_license_is_whole():
    text = (root/'LICENSE').read_text()
    assert text.lstrip().startswith('Apache License')
    assert 'END OF TERMS AND CONDITIONS' in text


# --- the oldest versions that are promised ---

OLDEST = tuple(map(int, cfg['min_python'].split('.')))
CODE = {path.relative_to(root).as_posix(): path.read_text(encoding='utf-8')
        for folder in ('largest_margins', 'tests', 'benchmarks', 'docs', 'examples')
        for path in (root/folder).rglob('*.py')}
CODE['setup.py'] = (root/'setup.py').read_text(encoding='utf-8')
NEWER = {'tomllib': '3.11', 'StrEnum': '3.11', 'TaskGroup': '3.11', 'ExceptionGroup': '3.11', 'add_note': '3.11',
         'file_digest': '3.11', 'UTC': '3.11', 'Self': '3.11', 'cbrt': '3.11', 'exp2': '3.11', 'batched': '3.12',
         'sumprod': '3.12', 'override': '3.12', 'is_junction': '3.12'}  # names of the standard library, by version


def too_new(code):
    "What in the code is not in the oldest Python: new names, and arguments that became optional in 3.11."
    tree = ast.parse(code, feature_version=OLDEST)
    tried = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    ours = ('torch', 'np', 'x', 'self')  # torch.exp2 is no name of math
    for node in ast.walk(tree):
        if node in tried: continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ('from_bytes', 'to_bytes') and len(node.args) + len(node.keywords) < 2:
                yield f'{node.func.attr} without a byte order, line {node.lineno}'
        names = ([node.attr] if isinstance(node, ast.Attribute) and getattr(node.value, 'id', '') not in ours else
                 [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom | ast.Import) else [])
        for name in names:
            if name in NEWER and not getattr(node, 'module', '') == 'torch':
                yield f'{name} is new in Python {NEWER[name]}, line {node.lineno}'


def test_what_is_too_new_is_found():
    for code in ('int.from_bytes(b"")', 'n.to_bytes(4)', 'import tomllib', 'from enum import StrEnum', 'datetime.UTC'):
        assert list(too_new(code)), code
    for code in ('try: 1\nexcept* ValueError: pass', 'type X = int', 'def f[T](x): pass'):
        with pytest.raises(SyntaxError): ast.parse(code, feature_version=OLDEST)
    assert not list(too_new('int.from_bytes(b"", "big")\ntorch.exp2(x)\ntry: import tomllib\nexcept ImportError: pass'))


def test_the_oldest_python_has_all_that_is_used():
    assert not {name: found for name in CODE if (found := list(too_new(CODE[name])))}


def pythons():
    "The interpreters of the promised range that can be found; the one that runs this is always among them."
    minors = range(OLDEST[1], 15)
    found = {sys.executable, *filter(None, (shutil.which(f'python3.{minor}') for minor in minors)),
             *(str(p) for minor in minors for p in Path.home().glob(f'.pyenv/versions/3.{minor}.*/bin/python'))}
    return sorted(p for p in found if not subprocess.run([p, '-c', ''], capture_output=True).returncode)


def test_every_python_that_is_here_compiles_everything():
    compiles = 'import sys, json; [compile(code, name, "exec") for name, code in json.load(sys.stdin).items()]'
    for python in pythons():
        done = subprocess.run([python, '-c', compiles], input=json.dumps(CODE), capture_output=True, text=True)
        assert done.returncode == 0, f'{python}: {done.stderr[-500:]}'


def test_numpy_and_scipy_have_lower_bounds_and_make_tests_with_them():
    floors = dict(re.fullmatch(r'(\w+)>=([\d.]+)', r).groups() for r in cfg['requirements'].split())
    assert set(floors) == {'torch', 'numpy', 'scipy'}
    assert tuple(map(int, floors['scipy'].split('.'))) >= (1, 11), 'comparisons needs false_discovery_control'
    assert {'matplotlib>=3.6', 'joblib>=1.5'} <= {*cfg['fastai_requirements'].split()}, 'legend(ncols=), Parallel(**)'
    assert 'settings.ini' in (root/'Makefile').read_text().split('oldest:')[1].split('\n\n')[0]


# --- the sdist ---

PACKED = ['largest_margins', 'nbs', 'tests', 'docs', 'benchmarks', 'examples', 'results']
TOP = ['settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md',
       'CONTRIBUTING.md', 'SECURITY.md', 'Makefile']
LEFT_OUT = ('__pycache__', '.ipynb_checkpoints', '*.pyc', 'table.html', 'table.tex', 'table.csv')


def packed(tree, mode, time, *folders):
    "The sdist of a copy of some folders, whose files have these modes and times."
    for folder in folders: shutil.copytree(root/folder, tree/folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in TOP: shutil.copy(root/name, tree)
    for path in tree.rglob('*'):
        if path.is_file():
            path.chmod(mode | path.stat().st_mode & 0o111)
            os.utime(path, (time, time))
    (tree/'tests'/'__pycache__').mkdir()
    (tree/'tests'/'__pycache__'/'stale.pyc').touch()
    build = [sys.executable, '-m', 'build', '--sdist', '--no-isolation']
    done = subprocess.run(build, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((tree/'dist').glob('*.tar.gz'))


def test_the_same_tree_gives_the_same_sdist(tmp_path):
    for name, mode, time in (('one', 0o644, 1e9), ('two', 0o664, 1.1e9)):
        (tmp_path/name).mkdir()
        packed(tmp_path/name, mode, time, 'largest_margins', 'tests')
    first, second = tmp_path.glob('*/dist/*.tar.gz')
    assert first.read_bytes() == second.read_bytes()


def test_the_sdist_holds_all_that_its_tests_need(tmp_path):
    with tarfile.open(packed(tmp_path, 0o644, 1e9, *PACKED)) as archive:
        held = {m.name.split('/', 1)[1] for m in archive.getmembers() if m.isfile()}
        assert {(m.uid, m.gid, m.uname, m.gname) for m in archive.getmembers()} == {(0, 0, '', '')}
    wanted = {p.relative_to(tmp_path).as_posix() for folder in PACKED
              for p in (tmp_path/folder).rglob('*') if p.is_file()}
    wanted = {name for name in wanted if '__pycache__' not in name and not name.endswith('.pyc')}
    assert wanted | set(TOP) <= held
    assert {'tests/conftest.py', 'tests/loss_family.py', 'tests/processes.py', 'tests/audit.js'} <= held
    assert not [name for name in held if '__pycache__' in name or name.endswith('.pyc')]


# --- security ---

def test_the_security_page_says_where_to_report_and_keeps_to_the_limits():
    from largest_margins.images import MOST_PIXELS
    text = (root/'SECURITY.md').read_text()
    assert f"{cfg['git_url']}/security/advisories/new" in text
    assert f'{MOST_PIXELS // 10**6} million' in text
