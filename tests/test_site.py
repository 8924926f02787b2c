"The built site: links, search, formulas, and no request to anybody else."
import fcntl
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from base64 import b64decode, b64encode
from functools import cache
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from inspect import Parameter, signature
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from PIL import Image

root = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location('build', root/'docs/build.py')
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

notebooks = sorted(p.relative_to(root/'nbs') for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_' not in str(p))
pages = [build.page_path(p).with_suffix('.html').as_posix() for p in notebooks]
pages += [Path(d.lower()).with_suffix('.html').as_posix() for d in build.documents]


@pytest.fixture(scope='session')
def site():
    "The folder of the built site; `make test` has built it, pytest alone builds it if it is not there."
    with open(root/'docs/build.py') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (build.site/'index.html').exists():
            subprocess.run([sys.executable, root/'docs/build.py', '--check'], check=True)
    return build.site


# --- the files ---

class Page(HTMLParser):
    "What a page offers as anchors, links to, and loads."

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads = set(), [], []
        self.formulas = 0
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.update(a for a in (attrs.get('id'), attrs.get('name')) if a)
        self.formulas += 'notranslate nohighlight' in (attrs.get('class') or '') and 'math' in attrs['class'].split()
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
    assert built - {'genindex.html', 'search.html', 'prf-prf.html'} == set(pages)


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


# --- in a browser ---

class Browser:
    """Headless Chromium on a server of its own.

    A policy lets pages load from that server only; what they try beyond it is noted in `outside` (Chromium's own
    background requests are not a page's, so watching the network would not do), what the server lacks in `missing`.
    """

    policy = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; report-uri /outside"

    def __init__(self, site, profile):
        self.profile, self.outside, self.missing = profile, [], []
        browser = self

        class Handler(SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=site)

            def end_headers(self):
                self.send_header('Content-Security-Policy', browser.policy)
                super().end_headers()

            def do_POST(self):
                report = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                browser.outside.append(report['csp-report']['blocked-uri'])
                self.send_response(204)
                self.end_headers()

            def log_request(self, code=200, size=0):
                if code >= 400:
                    browser.missing.append(self.path)

            def log_error(self, *args):
                pass

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def dom(self, address):
        "The page after its scripts have run."
        self.outside.clear()
        self.missing.clear()
        done = subprocess.run([
            'chromium', '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run',
            '--disable-background-networking', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
            f'--user-data-dir={self.profile}', '--virtual-time-budget=20000', '--dump-dom',
            f'http://127.0.0.1:{self.server.server_port}/{address}'], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope='session')
def browser(site, tmp_path_factory):
    assert shutil.which('chromium'), 'the tests of the site need Chromium: apt-get install chromium'
    opened = Browser(site, tmp_path_factory.mktemp('profile'))
    yield opened
    opened.server.shutdown()


@pytest.mark.parametrize('page', pages)
def test_page_in_a_browser(site, browser, page):
    dom = browser.dom(page)
    assert browser.outside == []
    assert browser.missing == []
    assert dom.count('<mjx-container') == read(site/page).formulas
    assert '<mjx-merror' not in dom and 'data-mjx-error' not in dom


def test_the_browser_sees_what_a_page_may_not_load(tmp_path):
    (tmp_path/'index.html').write_text('''<!doctype html><link rel="icon" href="data:,">
<img src="https://elsewhere.test/x.png"><script src="missing.js"></script>
<script>fetch("http://also.test/y")</script>''')
    other = Browser(tmp_path, tmp_path/'profile')
    other.dom('index.html')
    other.server.shutdown()
    assert sorted(other.outside) == ['http://also.test/y', 'https://elsewhere.test/x.png']
    assert other.missing == ['/missing.js']


def test_search_finds_a_function(browser):
    dom = browser.dom('search.html?q=class_margin')
    assert 'theory/margins.html#largest_margins.margins.class_margin' in dom


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
