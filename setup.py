"Everything here comes from settings.ini: edit that file, not this one."
import gzip
import os
import tarfile
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_name']
stages = ['Planning', 'Pre-Alpha', 'Alpha', 'Beta', 'Production/Stable', 'Mature', 'Inactive']
stage = int(cfg['status'])


class ReproducibleSdist(sdist):
    "The same files give the same archive, byte for byte, whoever packs them and when."

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        if format != 'gztar': raise ValueError(f'format must be gztar, got {format!r}')
        time = int(os.environ.get('SOURCE_DATE_EPOCH', 2**30))
        def plain(member):
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.mtime, member.uid, member.gid, member.uname, member.gname = time, 0, 0, '', ''
            return member
        path = Path(f'{base_name}.tar.gz')
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'wb') as file, gzip.GzipFile('', 'wb', 9, file, mtime=time) as packed, \
                tarfile.open(fileobj=packed, mode='w', format=tarfile.PAX_FORMAT) as archive:
            archive.add(base_dir, filter=plain)  # in the order of the names
        return str(path)


setup(
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    author_email=cfg['author_email'],
    license_expression=cfg['license'],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('fastai', 'bounds', 'dev', 'docs')},
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
    cmdclass={'sdist': ReproducibleSdist},
    entry_points={
        'nbdev': [f'{lib}={lib}._modidx:d'],
        'console_scripts': cfg['console_scripts'].splitlines(),
    },
)
