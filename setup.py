"Everything here comes from settings.ini: edit that file, not this one."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_name']
stages = ['Planning', 'Pre-Alpha', 'Alpha', 'Beta', 'Production/Stable', 'Mature', 'Inactive']
stage = int(cfg['status'])

setup(
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    author_email=cfg['author_email'],
    license_expression=cfg['license'],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('fastai', 'dev', 'docs')},
    classifiers=[
        f'Development Status :: {stage} - {stages[stage - 1]}',
        f"Intended Audience :: {cfg['audience']}",
        'Programming Language :: Python :: 3 :: Only',
    ],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: ['*.mplstyle', '*.json', '*.pyi', 'py.typed']},
    zip_safe=False,
    entry_points={
        'nbdev': [f'{lib}={lib}._modidx:d'],
        'console_scripts': cfg['console_scripts'].splitlines(),
    },
)
