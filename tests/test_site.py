"The built site: links, names, sections, and nothing loaded from anybody else."
import ast
import json
import re
from base64 import b64decode, b64encode
from functools import cache
from html.parser import HTMLParser
from importlib import import_module
from inspect import Parameter, signature
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import yaml
from pages import build, made, moved, notebooks, pages, root
from PIL import Image

import largest_margins

# --- the files ---

class Page(HTMLParser):
    "What a page offers as anchors, links to, and loads; what it prints as code outside links, listings and entries."

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads, self.plain = set(), [], [], []
        self.around = []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.update(a for a in (attrs.get('id'), attrs.get('name')) if a)
        if tag not in ('meta', 'link', 'img', 'br', 'hr', 'input', 'source', 'wbr'):
            self.around.append(tag)
        if tag == 'a' and 'href' in attrs:
            self.links.append(attrs['href'])
        elif tag == 'link' and attrs.get('rel') not in ('canonical', 'index', 'search', 'next', 'prev', 'author'):
            self.loads.append(attrs['href'])
        elif 'src' in attrs:
            self.loads.append(attrs['src'])

    def handle_endtag(self, tag):
        if tag in self.around:
            del self.around[len(self.around) - 1 - self.around[::-1].index(tag):]

    def handle_data(self, data):
        if 'code' in self.around and not {'a', 'pre', 'dt'} & set(self.around):
            self.plain.append(data.strip().removesuffix('()'))


read = cache(Page)


def html_files(site):
    return [p for p in site.rglob('*.html') if '_static' not in p.parts]


def test_every_notebook_and_document_is_a_page(site):
    built = {p.relative_to(site).as_posix() for p in html_files(site)}
    assert built == {*pages, *made, *moved}


def test_internal_links_lead_somewhere(site):
    broken, checked = [], 0
    for path in html_files(site):
        for link in read(path).links:
            if urlsplit(link).scheme or not link:
                continue
            address, anchor = urldefrag(link)
            target = (path.parent/unquote(address.split('?')[0])).resolve() if address else path
            page = target.is_file() and target.suffix == '.html' and read(target)
            checked += 1
            if not target.is_file() or (page and anchor and unquote(anchor) not in page.anchors):
                broken.append(f'{path.relative_to(site)} -> {link}')
    assert checked > 10 * len(pages)
    assert not broken


def test_pages_load_only_what_the_site_holds(site):
    missing = []
    for path in html_files(site):
        for address in read(path).loads:
            parts = urlsplit(address)
            if parts.scheme == 'data':
                continue
            if parts.scheme or parts.netloc or not (path.parent/unquote(parts.path)).exists():
                missing.append(f'{path.relative_to(site)} -> {address}')
    assert not missing


def test_styles_load_nothing_from_outside(site):
    outside = re.compile(r'''(?:@import|url\()\s*["']?(?:https?:)?//''')
    assert not [p for p in site.rglob('*.css') if outside.search(p.read_text(encoding='utf-8'))]


# --- sections and names ---

syms = build.symbols(build.get_config(root))
public = {full: page.split('#')[0] for mod in syms for full, (page, _) in syms[mod].items()
          if full.removeprefix(f'{mod}.') in import_module(mod).__all__}
sources = {full: file for mod in syms for full, (_, file) in syms[mod].items()}


def test_every_page_is_within_two_clicks_of_the_first(site):
    def led_to(path):
        return {(path.parent/unquote(urldefrag(a)[0])).resolve() for a in read(path).links if not urlsplit(a).scheme}
    home = site.resolve()/'index.html'
    near = led_to(home)
    reached = near.union(*(led_to(page) for page in near if page.suffix == '.html'))
    assert {site.resolve()/page for page in pages} <= reached
    assert len(near) > 8


def test_every_page_of_a_notebook_is_in_one_section():
    listed = [a for section in build.sections for a in build.section_pages(section, notebooks)]
    listed += [a for kind in build.kinds for a in kind.further if a not in build.written]
    assert len(listed) == len(set(listed))
    assert {f'{a}.html' for a in listed} == set(pages[:len(notebooks)]) - {'index.html'}


def test_every_public_name_has_one_entry(site):
    entries = [(anchor, path.relative_to(site).as_posix()) for path in html_files(site)
               for anchor in read(path).anchors if anchor in public]
    assert sorted(entries) == sorted(public.items())


def test_the_reference_lists_what_users_need_by_what_they_do(site):
    "The names of the front door, each once, each leading to its entry."
    stub = (root/'largest_margins/__init__.pyi').read_text(encoding='utf-8')
    front = set(re.findall(r' as (\w+)$', stub, re.M))
    listed = [name for names in build.tasks.values() for name in names.split()]
    assert sorted(listed) == sorted(front) and len(listed) <= 120
    links = {a.split('#')[-1] for a in read(site/'api/index.html').links}
    assert {build.resolve(name, syms)[1] + '.' + name for name in listed} <= links


def test_entries_say_where_to_import_from(site):
    html = (site/public['largest_margins.losses.ArcFaceLoss']).read_text(encoding='utf-8')
    entry = html.split('id="largest_margins.losses.ArcFaceLoss"', 1)[1].split('</dt>', 1)[0]
    assert 'largest_margins.losses.ArcFaceLoss(' in re.sub(r'<[^>]+>', '', entry.split('>', 1)[1])


def test_every_page_says_what_it_is_to_those_who_share_it(site):
    for path in (p for p in html_files(site) if p.relative_to(site).as_posix() in pages):
        html = path.read_text(encoding='utf-8')
        found = dict(re.findall(r'<meta (?:property|name)="([^"]+)" content="([^"]*)"', html))
        assert found['og:title'] and found['description'] == found['og:description'] != '', path
        assert found['og:image'].endswith('/_static/card.png')
    card = Image.open(site/'_static/card.png')
    assert card.size == (1200, 630)


def test_what_is_cited_stands_in_the_bibliography(site):
    keys = set(re.findall(r'@\w+\{([\w-]+),', (root/'docs/references.bib').read_text(encoding='utf-8')))
    prose = '\n'.join(''.join(c['source']) for n in notebooks for c in cells(n) if c['cell_type'] == 'markdown')
    groups = re.findall(r'\[(@[\w-]+(?:;\s*@[\w-]+)*)\]', prose)
    cited = {key for group in groups for key in re.findall(r'[\w-]+', group)}
    assert cited and cited <= keys
    assert all(anchor in read(site/'bibliography.html').anchors for anchor in
               {a.split('#')[-1] for p in html_files(site) for a in read(p).links if 'bibliography.html#' in a})


def test_papers_are_cited_by_their_keys():
    by_name = re.compile(r'\([A-Z][^()@\n]* (?:19|20)\d\d[a-z]?\)|et al\.,?\s+\(?(?:19|20)\d\d')
    assert by_name.search('as is known (Cao et al. 2019)') and by_name.search('Zhu et al. (2021) say')
    prose = [(str(n), ''.join(c['source'])) for n in notebooks for c in cells(n) if c['cell_type'] == 'markdown']
    assert not [(n, found) for n, text in prose if (found := by_name.findall(build.prose(text)))]


def test_the_picture_of_the_home_page_begins_with_no_loss_ahead():
    picture = (root/build.figures/'figure-1.svg').read_text(encoding='utf-8')
    starts = re.findall(r'<animate attributeName="width" values="([\d.]+);', picture)
    assert len(starts) == 3 and len(set(starts)) == 1


def test_first_uses_of_terms_lead_to_the_glossary(site):
    links = [a for a in read(site/'start/get_started.html').links if 'glossary.html#term-' in a]
    assert 'class-margin' in ' '.join(links) and len(links) == len(set(links)) > 3


def test_how_to_cite_is_true():
    cff = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    cfg = build.get_config(root)
    assert str(cff['version']) == largest_margins.__version__
    assert cff['repository-code'] == cfg.git_url and cff['url'].startswith('https://')
    assert largest_margins.__version__ in (root/'docs/cite.md').read_text(encoding='utf-8')


def test_every_entry_leads_to_its_source(site):
    for page in sorted(set(public.values())):
        html = (site/page).read_text(encoding='utf-8')
        for full in (name for name, where in public.items() if where == page):
            entry = html.split(f'id="{full}"', 1)[1].split('</dt>', 1)[0]
            assert f'/blob/main/{sources[full]}#L' in entry


def test_every_backticked_name_is_a_link(site):
    names = {re.sub(r'^(?:[a-z_]\w*\.)+', '', full) for full in public}
    distinct = {n for n in names if not n.startswith('_') and (re.search(r'[a-z]_[a-z]|[a-z][A-Z]', n))}
    found = {f'{path.relative_to(site)}: {text}' for path in html_files(site) for text in read(path).plain
             if text in distinct}
    assert not found


def test_every_name_is_shown_at_work():
    "Where it is exported: in code that the reader sees, or in what that prints."
    missing = []
    for notebook in notebooks:
        names, seen = set(), set()
        for cell in (c for c in cells(notebook) if c['cell_type'] == 'code'):
            text = ''.join(cell['source'])
            if re.search(r'^#\|\s*exporti', text, re.M): continue
            if re.search(r'^#\|\s*exports?\b', text, re.M):
                names |= {x.name for x in ast.parse(text).body if isinstance(x, ast.FunctionDef | ast.ClassDef)
                          and '@patch' not in text}    # methods, which stand with their class
            elif not re.search(r'^#\|\s*hide', text, re.M):
                printed = [o.get('text') or o.get('data', {}).get('text/plain', '') for o in cell['outputs']]
                imports = r'^\s*(from \S+ )?import (\([^)]*\)|.*)$'
                shown = [re.sub(imports, '', text, flags=re.M), *map(''.join, printed)]
                seen |= set(re.findall(r'\w+', '\n'.join(shown)))
        missing += [f'{notebook}: {name}' for name in names - seen if not name.startswith('_')]
    assert not missing


def test_every_numbered_equation_is_cited():
    prose = '\n'.join(''.join(c['source']) for notebook in notebooks for c in cells(notebook)
                      if c['cell_type'] == 'markdown')
    numbered = re.findall(r'\$\$ \((eq-[\w-]+)\)', prose)
    assert len(numbered) == len(set(numbered)) > 30
    cited = re.findall(r'(?<!\$\$ )\((eq-[\w-]+)\)|\{eq\}`(eq-[\w-]+)`', prose)
    assert set(numbered) == {a or b for a, b in cited}


def test_every_theorem_is_referred_to(site):
    stated = {label for notebook in notebooks for label, _ in build.labels(dict(cells=cells(notebook)))}
    links = {a.split('#')[-1] for path in html_files(site) for a in read(path).links if '#' in a and a[0] != '#'}
    assert len(stated) > 10
    assert stated <= links


def test_pages_as_markdown(site):
    listed = re.findall(r'\((https://\S+\.html\.md)\): \S', (site/'llms.txt').read_text(encoding='utf-8'))
    address = import_module('largest_margins.margins').__doc__.split('Docs: ')[1]
    assert address in listed
    base = address.removesuffix('theory/margins.html.md')
    assert {url.removeprefix(base) for url in listed} == {f'{p}.md' for p in pages[:len(notebooks)]} - {'index.html.md'}
    assert all((site/url.removeprefix(base)).is_file() for url in listed)
    text = (site/'theory/margins.html.md').read_text(encoding='utf-8')
    assert text.startswith('# Margins\n') and 'class_margin(' in text and 'base64' not in text


def test_readme_leads_to_the_site_and_into_no_notebook(site):
    text = (root/'README.md').read_text(encoding='utf-8')
    links = re.findall(r'\]\(([^)]+)\)', text)
    address = build.get_config(root)
    base = f'{address.doc_host}{address.doc_baseurl}/'
    assert not [a for a in links if '.ipynb' in a or a.startswith('nbs/')]
    inside = [a.removeprefix(base).split('#')[0] for a in links if a.startswith(base)]
    assert len(inside) > 8 and all((site/a).is_file() for a in inside)


def test_site_is_small(site):
    assert sum(p.stat().st_size for p in site.rglob('*') if p.is_file()) < 25e6


# --- what the pages are made of ---

def cells(notebook):
    return json.loads((root/'nbs'/notebook).read_text(encoding='utf-8'))['cells']


@pytest.mark.parametrize('notebook', notebooks, ids=str)
def test_code_fits_the_page(notebook):
    code = '\n'.join(''.join(cell['source']) for cell in cells(notebook) if cell['cell_type'] == 'code')
    assert not [line for line in code.splitlines() if len(line) > 88]


def test_the_first_screen_on_github_shows_no_directives():
    "GitHub renders notebooks as plain Markdown, where roles and directives of Sphinx stay as they are written."
    directive = re.compile(r':::|\{[a-z:]+\}`')
    assert directive.search('see {eq}`eq-x`') and directive.search(':::{note}')
    for notebook in notebooks:
        lines = '\n'.join(''.join(cell['source']) for cell in cells(notebook)).splitlines()
        assert not [line for line in lines[:45] if directive.search(line)], notebook


@pytest.mark.parametrize('notebook', notebooks, ids=str)
def test_outputs_name_no_folder_of_the_machine_they_were_made_on(notebook):
    outputs = json.dumps([cell.get('outputs', []) for cell in cells(notebook)])
    assert not re.findall(r'site-packages|/(?:tmp|home|root|work|Users)/[\w.-]+', outputs)


@pytest.mark.parametrize('notebook', notebooks, ids=str)
def test_figures_are_transparent(notebook):
    outputs = [output for cell in cells(notebook) for output in cell.get('outputs', [])]
    for png in [o['data']['image/png'] for o in outputs if 'image/png' in o.get('data', {})]:
        corner = Image.open(BytesIO(b64decode(''.join(png)))).convert('RGBA').getpixel((0, 0))
        assert corner[3] == 0, 'facecolor="none" makes a figure that can be read in both themes'


@pytest.mark.parametrize('notebook', notebooks, ids=str)
def test_title_cell_is_a_title_and_one_line(notebook):
    first = ''.join(cells(notebook)[0]['source']).splitlines()
    assert len(first) == 3
    assert first[0].startswith('# ') and first[1] == '' and first[2].startswith('> ')


# --- how the pages are made ---

def test_page_names():
    assert build.page_path(Path('theory/01_margins.ipynb')) == Path('theory/margins.ipynb')
    assert build.page_path(Path('index.ipynb')) == Path('index.ipynb')


def test_a_section_appears_with_its_first_page():
    understand = next(k for k in build.kinds if k.title == 'Understand')
    titles = [e.title for e in build.entries(understand, [Path('results/50_table1.ipynb')]) if not isinstance(e, str)]
    assert titles == ['Results']
    section = next(s for s in build.sections if s.title == 'Results')
    assert build.section_pages(section, [Path('results/50_table1.ipynb')]) == ['results/table1']
    nb = dict(cells=[dict(cell_type='raw', source='---\ntitle: Table 1\ndescription: Measured\n---')])
    text = build.section_page(section, [Path('results/50_table1.ipynb')], {'results/table1': nb})
    assert '{doc}`/results/table1`\n: Measured' in text


def test_pages_of_a_kind_stand_directly_in_it():
    start = next(k for k in build.kinds if k.title == 'Start')
    assert build.entries(start, [Path('start/01_get_started.ipynb')]) == ['start/get_started']


def test_citations_become_references():
    assert build.cited('as [@a2020b] and [@c; @d-e] say') == 'as {cite:p}`a2020b` and {cite:p}`c,d-e` say'
    assert build.cited('an [address](@x) and a@b.c') == 'an [address](@x) and a@b.c'


def test_only_the_first_use_of_a_term_in_prose_is_a_link():
    seen = set()
    text = '# Class margin\n\nThe `class margin` of class\nmargins, and a class margin.'
    text = build.defined(text, ['class margin'], seen)
    assert text == '# Class margin\n\nThe `class margin` of {term}`class margins <class margin>`, and a class margin.'
    assert seen == {'class margin'}
    same = '[class margin](x.html) ```\nclass margin\n``` $class margin$ superclass margin'
    assert build.defined(same, ['class margin'], set()) == same


def test_types_read_as_one_would_write_them():
    assert build.type_name(float) == 'float'
    assert build.type_name(float | None) == 'float | None'
    assert build.type_name(Path) == 'Path'
    assert build.type_name(list[Path]) == 'list[Path]'
    assert build.type_name(Parameter.empty) == ''


def test_signatures_keep_the_star_and_name_functions():
    def example(a, b=1, *, c=len): pass
    assert build.signature(signature(example).parameters.values()) == 'a, b=1, *, c=len'


def test_backticks_become_references_only_for_our_names():
    syms = {'lib.mod': {'lib.mod.f': ('mod.html#f', 'lib/mod.py')}}
    syms['lib.mod']['lib.mod.C.run'] = ('mod.html#c.run', 'lib/mod.py')
    assert build.linked('`C.run`', syms) == '{py:obj}`C.run <lib.mod.C>`'
    assert build.linked('`f` and `g` and `f()`', syms) == '{py:obj}`f <lib.mod.f>` and `g` and {py:obj}`f <lib.mod.f>`'


def test_parameters_of_the_same_name_are_no_references():
    syms = {'lib.mod': {'lib.mod.f': ('mod.html#f', 'lib/mod.py')}}
    assert build.linked('`f` of (eq-x)', syms, own={'f'}) == '`f` of {eq}`eq-x`'


def test_errors_are_those_raised_and_those_of_the_checks():
    margins = import_module('largest_margins.margins')
    assert build.errors(margins.class_margin, 'largest_margins') == {'NotFinite', 'TypeError', 'ValueError'}
    assert build.errors(margins.unit_rows, 'largest_margins') == set()
    losses = import_module('largest_margins.losses')
    assert 'ValueError' in build.errors(losses.ArcFaceLoss, 'largest_margins')
    assert build.errors(losses.class_balanced_weights, 'largest_margins') >= {'TypeError', 'ValueError'}
    assert ':raises: NotFinite, TypeError, ValueError' in build.api_entry('class_margin', syms)


def test_long_lines_that_are_printed_are_broken_but_not_those_of_tables():
    sentence, table = 'word ' * 30, 'name' + ' ' * 90 + '1.00'
    assert max(map(len, build.within_the_page(sentence).splitlines())) <= 88
    assert build.within_the_page(sentence).split() == sentence.split()
    assert build.within_the_page(f'{table}\nshort\n') == f'{table}\nshort\n'
    output = dict(output_type='stream', name='stdout', text=[sentence])
    assert build.printed(output)['text'] == build.within_the_page(sentence)


def test_names_that_no_code_mentions_are_reported():
    def notebook(text):
        return dict(cells=[dict(cell_type='markdown', source=text), dict(cell_type='code', source='here = our_name')])
    assert build.unknown_names(dict(page=notebook('`our_name`, `class_margin()`, `lr_find`, `x`, `make demo`'))) == []
    assert build.unknown_names(dict(page=notebook('`class_margn` and\n```\n`no_prose`\n```'))) == ['page: class_margn']
    assert build.unknown_names(dict(page=notebook('`ArcFacLoss`'))) == ['page: ArcFacLoss']


def test_readme_shows_prose_code_output_and_figures():
    png = b'\x89PNG'
    figure = dict(data={'image/png': b64encode(png).decode(), 'text/plain': '<Figure>'})
    text, images = build.readme(dict(cells=[
        dict(cell_type='raw', source='---\ntitle: Name\ndescription: What it is\n---'),
        dict(cell_type='markdown', source='See [the margins](theory/01_margins.ipynb).'),
        dict(cell_type='code', source='1 + 1', outputs=[dict(data={'text/plain': '2'})]),
        dict(cell_type='code', source='#| echo: false\n#| fig-alt: A curve\ndraw()', outputs=[figure])]), 'https://x.org/')
    assert text == ('# Name\n\n> What it is\n\nSee [the margins](https://x.org/theory/margins.html).\n\n'
                    '```python\n1 + 1\n```\n\n```\n2\n```\n\n![A curve](docs/_static/readme/figure-1.png)\n')
    assert images == {'figure-1.png': png}
