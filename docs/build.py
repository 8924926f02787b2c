"""Turns the notebooks into the site, llms.txt and README.md: nbdev's processors, then Sphinx.

`python docs/build.py` writes `_docs` and `README.md`; with `--check` it fails if `README.md` would change.
"""
import argparse
import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import files
from pathlib import Path
from textwrap import dedent, fill
from typing import NamedTuple

import yaml
from fastcore.docments import docments
from nbdev import processors
from nbdev.config import get_config
from nbdev.serve import proc_nbs

inspect.findsource = cache(inspect.findsource)     # it reads a whole file for each class
processors.get_config = cache(get_config)          # it reads pyproject.toml for each cell
root = Path(__file__).resolve().parent.parent
work, site = root/'build/site', root/'_docs'
figures = 'docs/_static/readme'


class Section(NamedTuple):
    "Pages that belong together: an entry of the sidebar, and a page of its own that lists them."
    title: str
    line: str        # what one finds there
    folder: str      # its pages are the notebooks of this folder of nbs/, and its own page stands there
    pages: tuple = ()  # pages from elsewhere, by address, which then are in this section only


class Kind(NamedTuple):
    "One of the kinds of page: a group of the sidebar, a word in the top bar, and a page that lists what it has."
    title: str
    line: str
    page: str         # the address of its own page
    sections: tuple   # of pages; one that stands in the folder of the kind's page lists its pages directly
    further: tuple = ()  # pages of Markdown


kinds = [
    Kind('Start', 'Install, train a first model, choose a loss, and bring your code along.', 'start/index', (
        Section('Start', '', 'start'),)),
    Kind('How to', 'One task a page, with the code to copy.', 'howto/index', (
        Section('How to', '', 'howto'),)),
    Kind('Understand', 'What the slides claim, what is true, how it is proved, and what was measured.',
         'understand/index', (
             Section('Theory', 'The short book: claims, proofs, pictures and checks.', 'theory'),
             Section('Results', 'What was measured, and how it compares with what the slides print.', 'results')),
         ('theory/errata', 'glossary', 'bibliography')),
    Kind('Reference', 'The names that users need, grouped by what one does with them.', 'api/index', (
        Section('Losses', 'One formula for the whole family, its regularizers and its heads.', 'losses'),
        Section('Engine', 'The same losses for any number of classes, on one machine and on many, and what they '
                'cost.', 'engine'),
        Section('Training', 'Data, callbacks, plots and the Learner.', 'training'),
        Section('Evaluation', 'How people and faces that nobody trained on are told apart, and how that is scored.',
                'evaluation'),
        Section('Study', "Configurations, the command line, the slides' tables, and how runs are compared.",
                'study'))),
    Kind('Explore', 'Play with it: place points, make rare classes collapse, ask how far apart classes can be.',
         'explore/index', (Section('Explore', '', 'explore'),)),
]
sections = [section for kind in kinds for section in kind.sections]
# what stands in the menu of the version: title, address
menu = [('Changelog', 'changelog'), ('How to cite', 'cite'), ('How to contribute', 'contributing')]
# the reference: what people do, and the public names for it
tasks = {
    'Choose a loss': 'NormFaceLoss CosFaceLoss ArcFaceLoss SphereFaceLoss CombinedMarginLoss ElasticFaceLoss '
                     'AdaFaceLoss LDAMLoss GMSoftmaxLoss LMSoftmaxLoss FocalLoss SampleMarginLoss',
    'Set scale, margin and weights': 'suggest_scale scale_for_margin guaranteed_margin admissible_margin '
                                     'class_balanced_weights zero_centroid residual_centroid',
    'Build the model': 'CosineLinear MarginHead ShardedMarginHead keep_shards_out_of_ddp',
    'Train with fastai': 'margin_learner SampleMarginRegularizer ZeroCentroidRegularizer MarginRecorder '
                         'DeferredReweighting',
    'Make data rare': 'imbalanced_counts imbalanced_indices',
    'Measure a classifier': 'class_margin sample_margins class_sample_margins min_sample_margin norm_ratio '
                            'neural_collapse',
    'Know the optimum': 'simplex best_packing largest_sample_margins class_margin_bound min_sample_margin_bound '
                        'verify riesz_energy log_riesz_energy certify_optimum collapse_ratio',
    'Score retrieval and verification': 'evaluate parse_market_name kfold_accuracy tar_at_far read_pairs',
    'Prove the claims': 'claims prove',
    'Handle errors': 'NotFinite',
}
# Markdown at the top of the repository that is a page too
documents = ['CONTRIBUTING.md', 'CHANGELOG.md']
# where pages stood before -> where they stand, so that links from elsewhere lead there
moved = {
    'engines/index': 'engine/index', 'theory/explore': 'explore/index', 'experiments/index': 'study/index',
    'training/glyphs': 'study/glyphs', 'experiments/tasks': 'study/free_features',
    **{f'losses/{name}': f'engine/{name}' for name in ('cosines', 'fused', 'shards', 'benchmarks')},
    **{f'training/{name}': f'engine/{name}' for name in ('cpu', 'million')},
    **{f'experiments/{name}': f'evaluation/{name}' for name in ('reid', 'verification')},
    **{f'experiments/{name}': f'study/{name}' for name in (
        'experiments', 'report', 'cli', 'recipes', 'tables', 'identities', 'inspect', 'comparisons')}}
# Markdown of the site itself, in docs/
written = ['bibliography', 'cite', 'glossary']
# names in backticks that look like ours and that no code of ours mentions
foreign = {'BaseLoss', 'MixedPrecision', 'TensorImage', 'distrib_ctx', 'fine_tune', 'lr_find', 'to_bf16',
           'to_fp16',    # fastai's
           'GradScaler', 'weight_norm', 'arcface_torch', 'sample_rate', 'NormedLinear',    # of other libraries
           'run_2024_c1'}    # an example of a folder
# what Quarto's cell options say, as MyST-NB's tags
tags = {('echo', 'false'): 'remove-input', ('output', 'false'): 'remove-output',
        ('include', 'false'): 'remove-cell', ('code-fold', 'true'): 'hide-input',
        ('code-fold', 'show'): 'hide-input'}      # nbdev's own mark of exported source, which here is folded


# --- names ---

def page_path(path):
    "`theory/01_margins.ipynb` is the page `theory/margins.ipynb`, as in nbdev's own links."
    return path.with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', path.name.lower()))


def symbols(cfg):
    "What nbdev knows of the library: module -> full name -> (page, file)."
    return import_module(f'{cfg.lib_path.name}._modidx').d['syms']


def entry(full, mod):
    "The symbol whose entry describes `full`: a method stands with its class."
    return f"{mod}.{full.removeprefix(f'{mod}.').split('.')[0]}"


def linked(text, syms, own=()):
    "Backticked names of the library become cross-references, except `own`, the parameters of what is described."
    def reference(match):
        name = match[1]
        mod = next((mod for mod in reversed(syms) if f'{mod}.{name}' in syms[mod]), None)
        return f'{{py:obj}}`{name} <{entry(f"{mod}.{name}", mod)}>`' if mod and name not in own else match[0]
    text = re.sub(r'(?<![`}])`([\w.]+)(?:\(\))?`(?!`)', reference, text)
    return re.sub(r'(?<!\$\$ )\((eq-[\w-]+)\)', r'{eq}`\1`', text)     # but after $$ it is the equation's own label


def cited(text):
    "`[@key]` and `[@key; @other]` become references to docs/references.bib."
    def reference(match):
        return '{cite:p}`' + ','.join(re.findall(r'[\w-]+', match[1])) + '`'
    return re.sub(r'\[(@[\w-]+(?:;\s*@[\w-]+)*)\]', reference, text)


fenced = re.compile(r'(^(?:`{3,}|~{3,}).*?^(?:`{3,}|~{3,})[ ]*$)', re.M | re.S)    # blocks of code


def unbroken(text):
    "`98.89 ± 0.22` stays on one line, and a comma with the formula before it."
    text = re.sub(r'(?<=\d) ± (?=\d)', '\u00a0±\u00a0', text)
    blocks = fenced.split(text)
    formula = re.compile(r'(?<!\$)\$[^$`]+\$[,.;:!?)]+')
    return ''.join(block if n % 2 else formula.sub(r'<span class="together">\g<0></span>', block)
                   for n, block in enumerate(blocks))


def glossary():
    "The terms of docs/glossary.md."
    text = (root/'docs/glossary.md').read_text(encoding='utf-8')
    block = re.search(r'^```\{glossary\}\n(.*?)^```', text, re.M | re.S)[1]
    return re.findall(r'^(\S.*)$', block, re.M)


def defined(text, terms, seen):
    "The first use of each of `terms` in prose becomes a link to the glossary; `seen` keeps those that have one."
    by_length = sorted(terms, key=len, reverse=True)
    words = '|'.join(re.escape(t).replace(r'\ ', r'[\s-]') for t in by_length)
    pattern = re.compile(rf'(?<![\w/.-])({words})(s?)(?![\w/-])', re.I)
    known = {re.sub(r'[\s-]+', ' ', t).lower(): t for t in terms}
    # code, links, roles, formulas, tags and citations stay as they are
    apart = re.compile(r'(`+[^`]*`+|!?\[[^\]]*\](?:\([^)]*\))?|\{[\w:]+\}`[^`]*`|\$\$.*?\$\$|\$[^$]+\$|<[^>]+>)', re.S)

    def link(match):
        term = known[re.sub(r'[\s-]+', ' ', match[1]).lower()]
        if term in seen:
            return match[0]
        seen.add(term)
        return f'{{term}}`{" ".join(match[0].split())} <{term}>`'

    def paragraph(part):
        if re.match(r'\s*(#|\||:::|:\w+:|```|~~~|<|\$\$|\(|    )', part) or '\n|' in part:
            return part
        return ''.join(x if n % 2 else pattern.sub(link, x) for n, x in enumerate(apart.split(part)))
    blocks = fenced.split(text)
    return ''.join(block if n % 2 else '\n\n'.join(map(paragraph, block.split('\n\n')))
                   for n, block in enumerate(blocks))


def prose(text):
    "Markdown without its blocks of code."
    return re.sub(r'^(`{3,}|~{3,}).*?^\1', '', text, flags=re.M | re.S)


def unknown_names(notebooks):
    "Backticked names that look like ours, `in_this_way` or `InThisWay`, and that no code mentions."
    cells = [(page, c['cell_type'], ''.join(c['source'])) for page, nb in notebooks.items() for c in nb['cells']]
    code = '\n'.join([text for _, kind, text in cells if kind == 'code'] +
                     [p.read_text(encoding='utf-8') for p in sorted((root/'largest_margins').rglob('*.py'))])
    known = set(re.findall(r'\w+', code)) | foreign
    looks_like_ours = re.compile(r'(?<!`)`((?:\w+\.)*(?:[a-z]\w*_\w+|[A-Z][a-z]+[A-Z]\w*))(?:\(\))?`(?!`)')
    return [f'{page}: {name}' for page, kind, text in cells if kind == 'markdown'
            for name in looks_like_ours.findall(prose(text)) if not set(name.split('.')) <= known]


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
    if ' at 0x' in repr(default):     # where something is in memory says nothing, and changes
        return f'{p.name}={type(default).__name__}(…)'
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


def own_code(obj):
    "The syntax trees in which a function, or a class when it is made and called, refuses what it is given."
    tree = ast.parse(dedent(inspect.getsource(obj))).body[0]
    called = ('__init__', '__post_init__', 'forward')
    return [tree] if isinstance(tree, ast.FunctionDef) else [n for n in tree.body if getattr(n, 'name', '') in called]


def errors(obj, lib, seen=None):
    "The errors that `obj` raises, itself or through what the library checks arguments with."
    seen = set() if seen is None else seen
    owners = [c for c in obj.__mro__ if c.__module__.startswith(lib)] if inspect.isclass(obj) else [obj]
    found = {'TypeError', 'ValueError'} if any(checks_values(c) for c in owners) else set()
    for owner, node in ((o, n) for o in owners for tree in own_code(o) for n in ast.walk(tree)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found |= {node.exc.func.id} - {'error'}     # a name for what is chosen there
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in seen:
            called = getattr(import_module(owner.__module__), node.func.id, None)
            if inspect.isfunction(called) and called.__module__.startswith(lib) and refuses(called):
                seen.add(node.func.id)
                found |= errors(called, lib, seen)
    return found


def checks_values(owner):
    "Whether a class has attributes that look at what they are given."
    return any(hasattr(type(value), '__set__') and type(value).__module__.endswith('.checks')
               for value in vars(owner).values())


def refuses(function):
    "Whether a function checks an argument: it is called so, or is told what the argument is called."
    return 'check' in function.__name__ or 'name' in inspect.signature(function).parameters


def api_entry(name, syms):
    "A Sphinx entry for one symbol: signature, docstring, one row for each documented parameter, errors."
    obj, mod = resolve(name, syms)
    kind = 'class' if inspect.isclass(obj) else 'method' if '.' in name else 'function'
    if not callable(obj):
        return f'````{{py:attribute}} {name}\n:module: {mod}\n\n{linked(inspect.getdoc(obj) or "", syms)}\n````'
    try:
        sig = inspect.signature(obj)
    except ValueError:  # a class that takes what its built-in base takes
        return f'````{{py:{kind}}} {name}\n:module: {mod}\n\n{linked(inspect.cleandoc(obj.__doc__), syms)}\n````'
    params = [p for p in sig.parameters.values() if not (kind == 'method' and p.name == 'self')]
    own = {p.name for p in params}
    result = type_name(sig.return_annotation) if kind != 'class' else ''
    docs = docments(obj, full=True, args_kwargs=True)
    for base in filter(is_dataclass, getattr(obj, '__mro__', ())):  # each describes the fields that it brings
        for field, doc in docments(base, full=True).items():
            if field in docs: docs[field].docment = docs[field].docment or doc.docment
    rows = []
    for p in params:
        text = (docs[p.name].docment or '') if p.name in docs else ''
        kind_of = type_name(p.annotation)
        written = {p.VAR_POSITIONAL: r'\*', p.VAR_KEYWORD: r'\*\*'}.get(p.kind, '') + p.name
        rows += [f':param {written}: {linked(text, syms, own)}'] if text or kind_of else []
        rows += [f':type {written}: {kind_of}'] if kind_of else []
    if result and docs.get('return') and docs['return'].docment:
        rows.append(f":returns: {linked(docs['return'].docment, syms, own)}")
    raised = errors(obj, mod.split('.')[0])
    rows += [f":raises: {', '.join(sorted(raised))}"] if raised else []
    head = f'{name}({signature(params)})' + (f' -> {result}' if result else '')
    text = linked(inspect.cleandoc(obj.__doc__ or ''), syms, own)
    body = '\n'.join([f':module: {mod}', '', text, '', *rows])
    return f'````{{py:{kind}}} {head}\n{body}\n````'


# --- notebooks ---

def title(cell_source):
    "nbdev's front matter, back as a title and the line under it."
    front = yaml.safe_load(cell_source.strip().strip('-'))
    return front['title'], front.get('description', '')


def options(cell_source):
    "A cell's `#| key: value` lines as a dictionary, and the code without them."
    found = {k: v.strip('"\'') for k, v in re.findall(r'^#\|\s*([\w-]+):\s*(.*)$', cell_source, re.M)}
    return found, re.sub(r'^#\|.*\n?', '', cell_source, flags=re.M).strip('\n')


def markdown_outputs(cells):
    "The cells, with what code shows as Markdown in cells of its own, so that its links and formulas are as in prose."
    for cell in cells:
        shown = [o for o in cell.get('outputs', ()) if 'text/markdown' in o.get('data', {})]
        if not shown or re.search(r'^show_doc\(', ''.join(cell['source']), re.M):  # an API entry is made anew
            yield cell
            continue
        yield dict(cell, outputs=[o for o in cell['outputs'] if o not in shown])
        for i, output in enumerate(shown):
            text = ''.join(output['data']['text/markdown'])
            yield dict(cell_type='markdown', metadata={}, id=f'{cell["id"]}-{i}', source=text)


def within_the_page(text, width=88):
    "Printed text with its long lines broken, except those of tables, which have columns to keep."
    def broken(line):
        line = line.rstrip()
        if len(line) <= width or re.search(r'\S {2,}\S|\t', line):
            return line
        return fill(line, width, subsequent_indent='  ', break_long_words=False, break_on_hyphens=False)
    return '\n'.join(map(broken, text.split('\n')))


def printed(output):
    "One output of a cell, its text within the page."
    if 'text' in output:
        return dict(output, text=within_the_page(''.join(output['text'])))
    data = output.get('data', {})
    if 'text/plain' in data:
        data = data | {'text/plain': within_the_page(''.join(data['text/plain']))}
        return dict(output, data=data)
    return output


def sources_last(cells):
    "The cells, with an exported cell after the entries of all its names: nbdev puts it after the first."
    waiting = None
    for cell in cells:
        text = ''.join(cell['source'])
        if waiting and not text.startswith('show_doc('):
            yield waiting
            waiting = None
        if text.startswith('#| code-fold: show'):   # so nbdev marks what `exports` exports
            waiting = cell
        else:
            yield cell
    if waiting:
        yield waiting


def with_sources(nb, written):
    "A processed notebook with the definitions that `written` has in `exporti` cells, which nbdev drops: folded."
    places = {cell['id']: n for n, cell in enumerate(nb['cells'])}
    cells, place = [[cell] for cell in nb['cells']], 0
    for cell in written['cells']:
        place = max(place, places.get(cell['id'], 0))
        text = ''.join(cell['source'])
        names = re.findall(r'^(?:class|def) ([A-Za-z]\w*)', text, re.M)
        if names and re.match(r'#\|\s*exporti\b', text):
            text = f'#| code-fold: true\n#| code-summary: "Source of {", ".join(names)}"\n{text}'
            cells[place].append(dict(cell, source=text, outputs=[]))
    return dict(nb, cells=[cell for group in cells for cell in group])


def convert(nb, cfg, syms):
    "One processed notebook, its Quarto directives turned into what MyST-NB understands."
    address = f'{cfg.doc_host}{cfg.doc_baseurl}/'
    names = {page: entry(full, mod) for mod in syms for full, (page, _) in syms[mod].items()}

    def reference(match):
        return f'{{py:obj}}`{match[1]} <{names[match[2]]}>`' if match[2] in names else match[0]

    def page_link(match):
        return f']({page_path(Path(match[1])).as_posix()}{match[2] or ""})'

    cells, seen, terms = [], set(), glossary()
    for cell in markdown_outputs(sources_last(nb['cells'])):
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
            if 'code-summary' in found:
                render |= dict.fromkeys(('code_prompt_show', 'code_prompt_hide'), found['code-summary'])
            nameless = not re.search(r'^(?:class|def) (?!_)', text, re.M) and text.count('\n') < 40
            short = nameless and found.get('code-fold') == 'show'
            if short or re.search(r'^register\(', text, re.M):
                found.pop('code-fold', None)    # checks of claims, and short exports without an entry, stand open
            if 'fig-alt' in found:
                render['image'] = {'alt': found['fig-alt']}
            if 'fig-cap' in found:
                render['figure'] = {'caption': found['fig-cap']}
            cell = dict(cell, metadata={'tags': [tags[o] for o in found.items() if o in tags], 'mystnb': render},
                        outputs=[printed(o) for o in cell['outputs']])
        else:
            text = re.sub(rf'\[`([^`]+)`\]\({re.escape(address)}([^)]+)\)', reference, text)
            text = re.sub(r'\]\(([\w./-]+\.ipynb)(#[^)]*)?\)', page_link, text)
            text = cited(linked(unbroken(defined(text, terms, seen)), syms))
        cells.append(dict(cell, source=text))
    return dict(nb, cells=cells)


# --- sections ---

def section_pages(section, pages):
    "The addresses of a section's pages, in reading order."
    elsewhere = {page for other in sections for page in other.pages} | {p for kind in kinds for p in kind.further}
    addresses = [page_path(p).with_suffix('').as_posix() for p in pages]
    inside = [a for a in addresses if section.folder and Path(a).parent == Path(section.folder)]
    return [*(a for a in section.pages if a in addresses), *(a for a in inside if a not in elsewhere)]


def toctree(entries):
    "Pages for the navigation: addresses, or `title <address>`."
    return '```{toctree}\n:hidden:\n\n' + '\n'.join(entries) + '\n```'


def contents():
    "The kinds and the menu, as a cell for the end of the index."
    entries = [f'{kind.title} <{kind.page}>' for kind in kinds] + [page for _, page in menu]
    return dict(cell_type='markdown', metadata={}, id='contents', source=toctree(entries))


def entries(kind, pages):
    "What a kind of page consists of: sections that have pages, and addresses."
    found = []
    for section in kind.sections:
        listed = section_pages(section, pages)
        if f'{section.folder}/index' == kind.page:
            found += listed
        elif listed:
            found.append(section)
    return [*found, *kind.further]


def listing(addresses, notebooks):
    "Pages as links, each with its line."
    return [f'{{doc}}`/{a}`\n: {front(notebooks[a])[1]}' if a in notebooks else f'- {{doc}}`/{a}`' for a in addresses]


def kind_page(kind, pages, notebooks, syms):
    "The page of a kind: its pages and sections, and for the reference the names by what one does with them."
    parts = [f'# {kind.title}', f'*{kind.line}*']
    if kind.title == 'Reference':
        parts += ['`import largest_margins as lm` gives every name of this page, as `lm.ArcFaceLoss`. A name leads to '
                  'its entry: signature, parameters with units and ranges, errors, and the page that explains it.']
        for title, names in tasks.items():
            parts += [f'## {title}', '\n'.join(api_line(name, syms) for name in names.split())]
        parts += ['## The notebooks of the library']
    found = entries(kind, pages)
    for entry in found:
        section = isinstance(entry, Section)
        parts += [f'{{doc}}`/{entry.folder}/index`\n: {entry.line}'] if section else listing([entry], notebooks)
    return '\n\n'.join([*parts, toctree([f'/{e.folder}/index' if isinstance(e, Section) else f'/{e}'
                                         for e in found])]) + '\n'


def section_page(section, pages, notebooks):
    "A section's own page: its pages with their one line, and the theorems that they prove."
    listed = section_pages(section, pages)
    parts = [f'# {section.title}', f'*{section.line}*', *listing(listed, notebooks)]
    stated = [label for a in listed for label in labels(notebooks[a])]
    if stated:
        parts += ['## What is proved', '\n'.join(f'- {{prf:ref}}`{label}`: {name}' for label, name in stated)]
    return '\n\n'.join([*parts, toctree([f'/{a}' for a in listed])]) + '\n'


def own_pages(pages):
    "The addresses of the pages that only list others: those of kinds and of sections."
    inside = [f'{e.folder}/index' for kind in kinds for e in entries(kind, pages) if isinstance(e, Section)]
    return [kind.page for kind in kinds] + inside


def navigation(pages, notebooks):
    "What the sidebar and the top bar show, for docs/conf.py: kinds, their entries, and the pages of these."
    def name(address):
        return front(notebooks[address])[0] if address in notebooks else heading(f'{address}.md')

    def entry(e):
        if not isinstance(e, Section):
            return dict(title=name(e), page=e, pages=[])
        return dict(title=e.title, page=f'{e.folder}/index',
                    pages=[dict(title=name(a), page=a) for a in section_pages(e, pages)])
    lines = {a: front(nb)[1] for a, nb in notebooks.items()}
    lines |= {f'{s.folder}/index': s.line for s in sections} | {kind.page: kind.line for kind in kinds}
    return dict(kinds=[dict(title=k.title, page=k.page, entries=[entry(e) for e in entries(k, pages)]) for k in kinds],
                menu=[dict(title=title, page=page) for title, page in menu], lines=lines)


def heading(name):
    "The title of a page of Markdown."
    return (root/'docs'/name).read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')


def front(nb):
    "Title and line of a processed notebook."
    return next(title(''.join(c['source'])) for c in nb['cells'] if c['cell_type'] == 'raw')


def labels(nb):
    "The theorems that a notebook states: (label, name)."
    text = '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
    return [(label, name) for name, label in re.findall(r'^:::\{prf:\w+\} (.*)\n:label: (\S+)', text, re.M)]


def api_line(name, syms):
    "A public name: what it is, in a line, with a link to its one entry."
    obj, mod = resolve(name, syms)
    line = ' '.join(inspect.getdoc(obj).split('\n\n')[0].split())
    return f'- {{py:obj}}`{name} <{mod}.{name}>`: {linked(line, syms)}'


# --- README.md ---

def readme(nb, address):
    "The index notebook as GitHub's Markdown with links to the site, and its figures: (text, name -> bytes)."
    parts, images = [], {}

    def on_the_site(match):
        return f']({address}{page_path(Path(match[1])).as_posix()}.html'
    for cell in markdown_outputs(nb['cells']):
        text = ''.join(cell['source']).strip()
        if not text or text.startswith('<!--'):
            continue
        if cell['cell_type'] == 'raw':
            name, description = title(text)
            parts.append(f'# {name}\n\n> {description}')
        elif cell['cell_type'] == 'markdown':
            parts.append(re.sub(r'\]\(([\w./-]+)\.ipynb', on_the_site, text))
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


def write_readme(nb, address, check):
    "Writes README.md and its figures, or with `check` only compares."
    text, images = readme(nb, address)
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


# --- for machines that read ---

def markdown(nb):
    "A converted notebook as Markdown with its code and what that printed; nbdev's docstrings lead to `page.html.md`."
    parts = []
    for cell in nb['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            parts.append(re.sub(r'<span class="together">(.*?)</span>', r'\1', text, flags=re.S))
        elif 'remove-cell' not in (hidden := cell['metadata'].get('tags', [])):
            parts += [f'```python\n{text}\n```'] if 'remove-input' not in hidden else []
            printed = [o.get('text') or o.get('data', {}).get('text/plain', '') for o in cell['outputs']]
            parts += [f"```\n{''.join(t).rstrip()}\n```" for t in printed if t and 'remove-output' not in hidden]
    return '\n\n'.join(parts) + '\n'


def overview(pages, notebooks, cfg):
    "llms.txt: the pages as Markdown, by section, each with its line."
    parts = [f"# {cfg.lib_path.name}", f"> {front(notebooks['index'])[1]}"]
    further = Section('More to understand', '', '', tuple(a for kind in kinds for a in kind.further if a in notebooks))
    for section in [*sections, further]:
        inside = section.pages if section is further else section_pages(section, pages)
        listed = [(a, *front(notebooks[a])) for a in inside if a in notebooks]
        lines = [f'- [{name}]({cfg.doc_host}{cfg.doc_baseurl}/{a}.html.md): {line}' for a, name, line in listed]
        parts += [f'## {section.title}', '\n'.join(lines)] if lines else []
    return '\n\n'.join(parts) + '\n'


# --- the site ---

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def copy_mathjax(dest):
    "MathJax 3 and its fonts, so that a page asks nobody else for them."
    found = next(f for f in files('sphinx-mathjax-offline') if f.name == 'tex-chtml-full.js')
    mathjax, fonts = found.locate().parent, 'output/chtml/fonts/woff-v2'
    shutil.copytree(mathjax/fonts, dest/fonts)
    shutil.copy(mathjax/'tex-chtml-full.js', dest)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='fail if README.md would change, instead of writing it')
    check = parser.parse_args().check

    cfg = get_config(root)
    syms = symbols(cfg)
    processed = Path(proc_nbs(cfg.nbs_path, n_workers=0, force=True))
    pages = sorted(p.relative_to(processed) for p in processed.rglob('*.ipynb'))
    pages = [p for p in pages if not any(part.startswith('.') for part in p.parts)]

    source, html = work/'source', work/'html'
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(root/'docs', source, ignore=shutil.ignore_patterns('build.py', 'readme', '__pycache__'))
    notebooks = {page_path(p).with_suffix('').as_posix(): with_sources(
        *(json.loads((folder/p).read_text(encoding='utf-8')) for folder in (processed, cfg.nbs_path))) for p in pages}
    if len(notebooks) < len(pages):
        sys.exit('Two notebooks would be the same page')
    if unknown := unknown_names(notebooks):
        sys.exit('In backticks, but in no code: ' + '; '.join(unknown))
    write_readme(notebooks['index'], f'{cfg.doc_host}{cfg.doc_baseurl}/', check)
    converted = {address: convert(nb, cfg, syms) for address, nb in notebooks.items()}
    converted['index']['cells'].append(contents())
    for address, nb in converted.items():
        write(source/f'{address}.ipynb', json.dumps(nb))
        write(source/f'extra/{address}.html.md', markdown(nb))
    write(source/'extra/llms.txt', overview(pages, notebooks, cfg))
    for kind in kinds:
        write(source/f'{kind.page}.md', kind_page(kind, pages, notebooks, syms))
        for section in entries(kind, pages):
            if isinstance(section, Section):
                write(source/section.folder/'index.md', section_page(section, pages, notebooks))
    write(source/'navigation.json', json.dumps(navigation(pages, notebooks)))
    for old, new in moved.items():
        target = os.path.relpath(f'{new}.html', Path(old).parent)
        write(source/f'extra/{old}.html', '<!doctype html><meta charset="utf-8"><title>Moved</title>'
              f'<link rel="icon" href="data:,"><meta http-equiv="refresh" content="0; url={target}">'
              f'<a href="{target}">Moved here</a>\n')
    for name in documents:
        write(source/name.lower(), linked((root/name).read_text(encoding='utf-8'), syms))
    for name in written:
        write(source/f'{name}.md', cited(linked((root/f'docs/{name}.md').read_text(encoding='utf-8'), syms)))
    copy_mathjax(source/'_static/mathjax')
    # without the garbage collector, which looks at every node of every page again and again
    sphinx = 'import gc, sys; gc.disable(); from sphinx.cmd.build import main; sys.exit(main(sys.argv[1:]))'
    done = subprocess.run([sys.executable, '-c', sphinx, '-W', '--keep-going', '-q', '-E', '-b', 'html',
                           '-d', str(work/'doctrees'), str(source), str(html)], cwd=root)
    if done.returncode:
        sys.exit(done.returncode)
    # icons are in a font; the theme's 1.5 MB of script would draw them once more
    icons = re.compile(r'\s*<script [^>]*/fontawesome\.js[^>]*></script>')
    for page in html.rglob('*.html'):
        write(page, icons.sub('', page.read_text(encoding='utf-8')))
    for unused in {html/'.buildinfo', *html.rglob('fontawesome.js*'), *html.rglob('*.map')}:    # maps: to debug a theme
        unused.unlink()
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(html, site)


if __name__ == '__main__':
    main()
