"The built site: links, names, sections, and nothing loaded from anybody else."
import json
import re
from base64 import b64decode, b64encode
from functools import cache
from html.parser import HTMLParser
from inspect import Parameter, signature
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from pages import build, made, notebooks, pages, root
from PIL import Image

# --- the files ---

class Page(HTMLParser):
    "What a page offers as anchors, links to, and loads."

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.update(a for a in (attrs.get('id'), attrs.get('name')) if a)
        if tag == 'a' and 'href' in attrs:
            self.links.append(attrs['href'])
        elif tag == 'link' and attrs.get('rel') not in ('canonical', 'index', 'search', 'next', 'prev', 'author'):
            self.loads.append(attrs['href'])
        elif 'src' in attrs:
            self.loads.append(attrs['src'])


read = cache(Page)


def html_files(site):
    return [p for p in site.rglob('*.html') if '_static' not in p.parts]


def test_every_notebook_and_document_is_a_page(site):
    built = {p.relative_to(site).as_posix() for p in html_files(site)}
    assert built == {*pages, *made}


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


def test_every_symbol_of_the_api_is_in_the_search_index(site):
    text = (site/'searchindex.js').read_text(encoding='utf-8')
    index = json.loads(text.removeprefix('Search.setIndex(').removesuffix(')'))
    found = {f'{module}.{entry[-1]}' for module, entries in index['objects'].items() for entry in entries}
    assert {'largest_margins.margins.class_margin', 'largest_margins.margins.sample_margins'} <= found


# --- what the pages are made of ---

def cells(notebook):
    return json.loads((root/'nbs'/notebook).read_text(encoding='utf-8'))['cells']


@pytest.mark.parametrize('notebook', notebooks, ids=str)
def test_code_fits_the_page(notebook):
    code = '\n'.join(''.join(cell['source']) for cell in cells(notebook) if cell['cell_type'] == 'code')
    assert not [line for line in code.splitlines() if len(line) > 88]


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
    assert build.linked('`f` and `g` and `f()`', syms) == '{py:obj}`f <lib.mod.f>` and `g` and {py:obj}`f <lib.mod.f>`'


def test_readme_shows_prose_code_output_and_figures():
    png = b'\x89PNG'
    figure = dict(data={'image/png': b64encode(png).decode(), 'text/plain': '<Figure>'})
    text, images = build.readme(dict(cells=[
        dict(cell_type='raw', source='---\ntitle: Name\ndescription: What it is\n---'),
        dict(cell_type='markdown', source='See [the margins](theory/01_margins.ipynb).'),
        dict(cell_type='code', source='1 + 1', outputs=[dict(data={'text/plain': '2'})]),
        dict(cell_type='code', source='#| echo: false\n#| fig-alt: A curve\ndraw()', outputs=[figure])]))
    assert text == ('# Name\n\n> What it is\n\nSee [the margins](nbs/theory/01_margins.ipynb).\n\n'
                    '```python\n1 + 1\n```\n\n```\n2\n```\n\n![A curve](docs/_static/readme/figure-1.png)\n')
    assert images == {'figure-1.png': png}
