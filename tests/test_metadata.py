"settings.ini is the one source; what pyproject.toml and the package repeat must agree with it."
from configparser import ConfigParser
from importlib.metadata import metadata
from pathlib import Path

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
