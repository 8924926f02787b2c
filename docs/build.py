"""Turns the notebooks into the site and README.md: nbdev's processors, then Sphinx.

`python docs/build.py` writes `_docs` and `README.md`; with `--check` it fails if `README.md` would change.
"""
import argparse
import inspect
import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from importlib import import_module
from importlib.metadata import files
from pathlib import Path

from fastcore.docments import docments
from nbdev.config import get_config
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent
work, site = root/'build/site', root/'_docs'
figures = 'docs/_static/readme'
# the folders of nbs/ in reading order, each a part of the site
chapters = ['theory', 'losses', 'training', 'experiments', 'results']
# Markdown at the top of the repository that is a page too
documents = ['CONTRIBUTING.md', 'CHANGELOG.md']
# what Quarto's cell options say, as MyST-NB's tags
tags = {('echo', 'false'): 'remove-input', ('output', 'false'): 'remove-output',
        ('include', 'false'): 'remove-cell', ('code-fold', 'true'): 'hide-input'}


# --- names ---

def page_path(path):
    "`theory/01_margins.ipynb` is the page `theory/margins.ipynb`, as in nbdev's own links."
    return path.with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', path.name.lower()))


def symbols(cfg):
    "What nbdev knows of the library: module -> full name -> (page, file)."
    return import_module(f'{cfg.lib_path.name}._modidx').d['syms']


def linked(text, syms):
    "Backticked names of the library become cross-references."
    names = {full.removeprefix(f'{mod}.'): full for mod in syms for full in syms[mod]}

    def reference(match):
        return f'{{py:obj}}`{match[1]} <{names[match[1]]}>`' if match[1] in names else match[0]
    return re.sub(r'(?<![`}])`([\w.]+)(?:\(\))?`(?!`)', reference, text)


# --- API entries ---

def resolve(name, syms):
    "The object called `name` in the library, and its module."
    for mod in sorted(syms):
        if f'{mod}.{name}' in syms[mod]:
            obj = import_module(mod)
            for part in name.split('.'):
                obj = getattr(obj, part)
            return obj, mod
    raise LookupError(f'{name} is not in the library: run nbdev-export')


def type_name(annotation):
    "A type as one would write it: `float`, `Tensor | None`."
    if annotation is inspect.Parameter.empty:
        return ''
    if isinstance(annotation, type) and not getattr(annotation, '__args__', None):
        return annotation.__name__
    return re.sub(r'\b(?:\w+\.)+(\w+)', r'\1', str(annotation).replace('NoneType', 'None'))


def parameter(p):
    "One parameter as it stands in a signature, without its type."
    default = p.default
    named = getattr(default, '__name__', None)
    if p.default is not p.empty and named:
        return f'{p.name}={named}'
    return str(p.replace(annotation=p.empty))


def signature(params):
    "Parameters as one writes them, with `*` before those that are given by name only."
    parts, star = [], False
    for p in params:
        if p.kind == p.KEYWORD_ONLY and not star:
            parts.append('*')
        star = star or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        parts.append(parameter(p))
    return ', '.join(parts)


def api_entry(name, syms):
    "A Sphinx entry for one symbol: signature, docstring, one row for each documented parameter."
    obj, mod = resolve(name, syms)
    kind = 'class' if inspect.isclass(obj) else 'method' if '.' in name else 'function'
    if not callable(obj):
        return f'````{{py:attribute}} {name}\n:module: {mod}\n\n{linked(inspect.getdoc(obj) or "", syms)}\n````'
    try:
        sig = inspect.signature(obj)
    except ValueError:  # a class that takes what its built-in base takes
        return f'````{{py:{kind}}} {name}\n:module: {mod}\n\n{linked(inspect.cleandoc(obj.__doc__), syms)}\n````'
    params = [p for p in sig.parameters.values() if not (kind == 'method' and p.name == 'self')]
    result = type_name(sig.return_annotation) if kind != 'class' else ''
    docs = docments(obj, full=True)
    rows = []
    for p in params:
        text = (docs[p.name].docment or '') if p.name in docs else ''
        kind_of = type_name(p.annotation)
        rows += [f':param {p.name}: {linked(text, syms)}'] if text or kind_of else []
        rows += [f':type {p.name}: {kind_of}'] if kind_of else []
    if result and docs.get('return') and docs['return'].docment:
        rows.append(f":returns: {linked(docs['return'].docment, syms)}")
    head = f'{name}({signature(params)})' + (f' -> {result}' if result else '')
    text = linked(inspect.cleandoc(obj.__doc__ or ''), syms)
    body = '\n'.join([f':module: {mod}', '', text, '', *rows])
    return f'````{{py:{kind}}} {head}\n{body}\n````'


# --- notebooks ---

def title(cell_source):
    "nbdev's front matter, back as a title and the line under it."
    front = dict(line.split(': ', 1) for line in cell_source.splitlines() if ': ' in line)
    return front['title'].strip('"\''), front.get('description', '').strip('"\'')


def options(cell_source):
    "A cell's `#| key: value` lines as a dictionary, and the code without them."
    found = {k: v.strip('"\'') for k, v in re.findall(r'^#\|\s*([\w-]+):\s*(.*)$', cell_source, re.M)}
    return found, re.sub(r'^#\|.*\n?', '', cell_source, flags=re.M).strip('\n')


def convert(nb, cfg, syms):
    "One processed notebook, its Quarto directives turned into what MyST-NB understands."
    address = f'{cfg.doc_host}{cfg.doc_baseurl}/'
    names = {page: full for mod in syms.values() for full, (page, _) in mod.items()}

    def reference(match):
        return f'{{py:obj}}`{match[1]} <{names[match[2]]}>`' if match[2] in names else match[0]

    def page_link(match):
        return f']({page_path(Path(match[1])).as_posix()}{match[2] or ""})'

    cells = []
    for cell in nb['cells']:
        text = ''.join(cell['source'])
        if not text.strip() or text.startswith('<!-- WARNING'):
            continue
        if cell['cell_type'] == 'raw' and text.startswith('---'):
            name, description = title(text)
            text, cell = f'# {name}\n\n*{description}*', dict(cell, cell_type='markdown')
        elif cell['cell_type'] == 'code' and (shown := re.search(r'^show_doc\(([\w.]+)', text, re.M)):
            text = api_entry(shown[1], syms)
            cell = dict(cell_type='markdown', metadata={}, id=cell.get('id'))
        elif cell['cell_type'] == 'code':
            found, text = options(text)
            render = {}
            if 'fig-alt' in found:
                render['image'] = {'alt': found['fig-alt']}
            if 'fig-cap' in found:
                render['figure'] = {'caption': found['fig-cap']}
            cell = dict(cell, metadata={'tags': [tags[o] for o in found.items() if o in tags], 'mystnb': render})
        else:
            text = re.sub(rf'\[`([^`]+)`\]\({re.escape(address)}([^)]+)\)', reference, text)
            text = re.sub(r'\]\(([\w./-]+\.ipynb)(#[^)]*)?\)', page_link, text)
        cells.append(dict(cell, source=text))
    return dict(nb, cells=cells)


def toctree(pages, caption=''):
    "A list of pages for the left column."
    head = f':caption: {caption}\n' if caption else ''
    listed = '\n'.join(page_path(p).with_suffix('').as_posix() for p in pages)
    return f'```{{toctree}}\n:hidden:\n{head}\n{listed}\n```'


def contents(pages):
    "Every page but the index, by folder in reading order, as a cell for the end of the index."
    folders = sorted({p.parent.as_posix() for p in pages} - {'.'},
                     key=lambda f: (chapters.index(f) if f in chapters else len(chapters), f))
    parts = [toctree([p for p in pages if p.parent == Path(f)], f.capitalize()) for f in folders]
    top = [p for p in pages if p.parent == Path('.') and p.stem != 'index']
    parts = ([toctree(top)] if top else []) + parts + [toctree([Path(d) for d in documents], 'Project')]
    return dict(cell_type='markdown', metadata={}, id='contents', source='\n\n'.join(parts))


# --- README.md ---

def readme(nb):
    "The index notebook as GitHub's Markdown, and the figures that it shows: (text, name -> bytes)."
    parts, images = [], {}
    for cell in nb['cells']:
        text = ''.join(cell['source']).strip()
        if not text or text.startswith('<!--'):
            continue
        if cell['cell_type'] == 'raw':
            name, description = title(text)
            parts.append(f'# {name}\n\n> {description}')
        elif cell['cell_type'] == 'markdown':
            parts.append(re.sub(r'\]\(([\w./-]+\.ipynb)', r'](nbs/\1', text))
        else:
            found, text = options(text)
            if found.get('echo') != 'false':
                parts.append(f'```python\n{text}\n```')
            for output in cell['outputs'] if found.get('output') != 'false' else ():
                data = output.get('data', {})
                if kind := next((k for k in ('svg+xml', 'png') if f'image/{k}' in data), None):
                    file, picture = f'figure-{len(images) + 1}.{kind[:3]}', ''.join(data[f'image/{kind}'])
                    images[file] = b64decode(picture) if kind == 'png' else picture.encode()
                    parts.append(f"![{found.get('fig-alt', 'figure')}]({figures}/{file})")
                elif shown := ''.join(output.get('text') or data.get('text/plain', '')).rstrip():
                    parts.append(f'```\n{shown}\n```')
    return '\n\n'.join(parts) + '\n', images


def write_readme(nb, check):
    "Writes README.md and its figures, or with `check` only compares."
    text, images = readme(nb)
    wanted = {root/'README.md': text.encode(), **{root/figures/name: image for name, image in images.items()}}
    stale = {p for p in (root/figures).glob('*') if p not in wanted}
    changed = {p for p, data in wanted.items() if not p.exists() or p.read_bytes() != data}
    if check and (stale or changed):
        listed = ', '.join(sorted(str(p.relative_to(root)) for p in stale | changed))
        sys.exit(f'Not what nbs/index.ipynb says: {listed}. Run make docs.')
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wanted[path])
    for path in stale:
        path.unlink()


# --- the site ---

def copy_mathjax(dest):
    "MathJax 3 and its fonts, so that a page asks nobody else for them."
    found = next(f for f in files('sphinx-mathjax-offline') if f.name == 'tex-chtml-full.js')
    mathjax, fonts = found.locate().parent, 'output/chtml/fonts/woff-v2'
    shutil.copytree(mathjax/fonts, dest/fonts)
    shutil.copy(mathjax/'tex-chtml-full.js', dest)


def copy_d3(dest):
    "D3, which the widgets draw with, from the package that brings it."
    found = next(f for f in files('mpld3') if f.name == 'd3.v5.min.js')
    shutil.copy(found.locate(), dest)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='fail if README.md would change, instead of writing it')
    check = parser.parse_args().check

    cfg = get_config(root)
    syms = symbols(cfg)
    processed = Path(proc_nbs(cfg.nbs_path, n_workers=2, force=True))
    pages = sorted(p.relative_to(processed) for p in processed.rglob('*.ipynb'))
    pages = [p for p in pages if not any(part.startswith('.') for part in p.parts)]

    source, html = work/'source', work/'html'
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(root/'docs', source, ignore=shutil.ignore_patterns('build.py', 'readme', '__pycache__'))
    for name in documents:
        shutil.copy(root/name, source/name.lower())
    for page in pages:
        nb = json.loads((processed/page).read_text(encoding='utf-8'))
        if page == Path('index.ipynb'):
            write_readme(nb, check)
        nb = convert(nb, cfg, syms)
        if page == Path('index.ipynb'):
            nb['cells'].append(contents(pages))
        dest = source/page_path(page)
        if dest.exists():
            sys.exit(f'Two notebooks would be the page {page_path(page)}')
        dest.parent.mkdir(parents=True, exist_ok=True)
        dest.write_text(json.dumps(nb), encoding='utf-8')
    copy_mathjax(source/'_static/mathjax')
    copy_d3(source/'_static/widgets/d3.min.js')
    done = subprocess.run([sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-E', '-b', 'html',
                           str(source), str(html)], cwd=root)
    if done.returncode:
        sys.exit(done.returncode)
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(html, site)


if __name__ == '__main__':
    main()
