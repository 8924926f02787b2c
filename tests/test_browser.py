"Every page in a real Chromium: loaded, read in both themes, on a phone, and by keyboard."
import json
import re
from importlib import import_module

import pytest
from chromium import Chromium
from pages import build, made, pages

import largest_margins
from largest_margins.plots import BLUE, GREEN, GREY, ORANGE

# WCAG 2.2, level AA: text, and what one must see in a figure
text, graphics = 4.5, 3


# widgets draw themselves when they come near the window; scrollIntoView would move where Tab begins
drawn = '''(async () => {
    for (const widget of document.querySelectorAll('[data-widget]')) {
        scrollTo(0, widget.getBoundingClientRect().top + scrollY);
        while (!widget.dataset.state) await new Promise(done => setTimeout(done, 50));
    }
    scrollTo(0, 0);
    return true;
})()'''


@pytest.mark.parametrize('old, new', build.moved.items())
def test_an_old_address_leads_on(site, old, new):
    page = (site/f'{old}.html').read_text(encoding='utf-8')
    address, = re.findall(r'http-equiv="refresh" content="0; url=([^"]+)"', page)
    assert (site/f'{old}.html').parent.joinpath(address).resolve() == (site/f'{new}.html').resolve()
    assert f'<a href="{address}">' in page and f'{new}.html' in pages + made


@pytest.mark.parametrize('page', pages + made)
def test_page(site, browser, page):
    browser.open(page)
    browser.run(drawn)
    assert browser.outside == []
    assert browser.missing == []
    assert browser.complaints == []
    facts = browser.run('facts()')
    assert facts['lang'] == 'en'
    assert facts['titles'] == 1
    assert facts['formulas'] == (site/page).read_text(encoding='utf-8').count('math notranslate nohighlight')
    assert facts['badFormulas'] == 0
    assert facts['withoutAlt'] == facts['unloaded'] == facts['rawTables'] == facts['sideways'] == []

    for theme, found in browser.run(f'faint({text})').items():
        assert found['checked'] > 10
        assert found['bad'] == [], theme

    browser.press('Tab', browser.run('watchFocus()') + 3)
    walk = browser.run('walked()')
    assert 'Skip to main content' in walk['first']
    assert walk['visited'] > 10
    assert walk['missed'] == walk['invisible'] == []
    assert walk['positive'] == walk['mouseOnly'] == walk['nameless'] == []

    browser.resize(390, 844)
    assert browser.run('facts().width') == 390
    assert browser.run('wide()') == []


def test_formulas_stay_inside_the_page_on_a_small_phone(browser):
    browser.open('losses/losses.html', 320, 640)
    assert browser.run('facts().width') == 320
    assert browser.run('wide()') == []


def test_skip_link_leads_to_the_text(browser):
    browser.open('theory/margins.html')
    browser.press('Tab')
    browser.press('Enter', code='Enter', windowsVirtualKeyCode=13, text='\r')
    assert browser.run('location.hash') == '#main-content'
    browser.press('Tab')
    assert browser.run('document.activeElement.closest("main") != null')


def test_theme_button_turns_the_page_dark_and_the_next_page_remembers(browser):
    browser.open('index.html')
    seen = set()
    for mode in 'light', 'dark':
        choice = f'document.querySelector(".bd-header .dropdown-menu button[data-mode={mode}]")'
        browser.run(f'document.querySelector(".bd-header .theme-switch-button").click(); {choice}.click()')
        assert browser.run('document.documentElement.dataset.theme') == mode
        browser.open('theory/margins.html')
        assert browser.run('document.documentElement.dataset.theme') == mode
        seen.add(tuple(browser.run('background(document.querySelector("article"))')))
    browser.run('localStorage.clear()')
    assert len(seen) == 2


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_colours_of_figures_can_be_told_from_the_page(browser, theme):
    browser.open('theory/margins.html')
    for colour, least in ((GREY, text), ('#777777', text), (BLUE, graphics), (ORANGE, graphics), (GREEN, graphics)):
        assert browser.run(f'inFigure("{theme}", "{colour}")') >= least, colour


# --- five readers: from the home page in two clicks, each link and what they look for within one screen ---

SCREEN = 1280, 900
READERS = {
    'a student who wants Theorem 2': (['the errata'], 'h1'),
    'a face engineer': (['How to', 'Faces with a million identities'], 'div.cell_input'),
    'a fastai user with a folder': (['Start', 'Get started'], 'div.highlight-sh'),
    'a teacher': (['Explore', 'Place the points yourself'], '[data-widget=place] svg.sphere'),
    'a researcher with CIFAR-10': (['Reproduce the paper'], 'h1')}

# the first link of this text that is within the screen, clicked where it is
find_link = """text => {
    const link = [...document.querySelectorAll('a')].find(a => {
        const box = a.getBoundingClientRect();
        return a.textContent.trim() === text && box.height > 0 && box.top >= 0 && box.bottom <= innerHeight;
    });
    const box = link?.getBoundingClientRect();
    return box && [box.x + box.width / 2, box.y + box.height / 2, link.href];
}"""


@pytest.mark.parametrize('reader', READERS)
def test_readers_arrive(browser, reader):
    texts, wanted = READERS[reader]
    browser.open('index.html', *SCREEN)
    for text in texts:
        found = browser.run(f'({find_link})({json.dumps(text)})')
        assert found, f'no link "{text}" on the first screen of {browser.run("location.pathname")}'
        x, y, address = found
        for kind in ('mousePressed', 'mouseReleased'):
            browser.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)
        browser.wait_for(f'location.href === {json.dumps(address)} && document.readyState === "complete"')
    top = f'document.querySelector({json.dumps("main " + wanted)})?.getBoundingClientRect().top'
    browser.wait_for(f'{top} < {SCREEN[1] - 40}')


def test_the_bar_has_the_version_and_its_menu_the_changelog(browser):
    browser.open('index.html')
    button = 'document.querySelector(".bd-header .version button")'
    assert browser.run(f'{button}.textContent.trim()') == largest_margins.__version__
    browser.run(f'{button}.click()')
    shown = browser.run('[...document.querySelectorAll(".bd-header .version .dropdown-item")].filter(shown)'
                        '.map(a => a.textContent)')
    assert shown == [title for title, _ in build.menu]


def test_the_sidebar_tells_the_kinds_of_page_apart(browser):
    for page in ('index.html', 'losses/losses.html', 'start/get_started.html'):
        browser.open(page)
        headings = '[...document.querySelectorAll(".bd-sidebar-primary .kind")]'
        kinds = browser.run(f'{headings}.filter(shown).map(e => e.innerText)')
        assert kinds == [kind.title for kind in build.kinds]
    here = browser.run('document.querySelector(".bd-sidebar-primary [aria-current=page]").innerText')
    assert here == 'Get started'


@pytest.mark.parametrize('page', ['start/choose_a_loss.html', 'results/imbalanced.html'])
def test_tables_scroll_inside_themselves_and_numbers_stay_whole(browser, page):
    browser.open(page, 390, 844)
    assert browser.run('facts().width') == 390
    broken = browser.run("""[...document.querySelectorAll('td')].map(td => td.textContent)
        .filter(text => / ± /.test(text))""")
    assert broken == []
    scrolls = browser.run("""[...document.querySelectorAll('article table')].every(t => {
        const box = t.closest('.pst-scrollable-table-container');
        const look = box && getComputedStyle(box);
        return look && look.overflowX === 'auto' && look.backgroundImage.includes('gradient');
    })""")
    assert scrolls


def test_the_table_of_losses_needs_no_scrolling_on_a_desktop(browser):
    browser.open('start/choose_a_loss.html', *SCREEN)
    widths = browser.run("""[...document.querySelectorAll('.pst-scrollable-table-container')]
        .map(t => [t.scrollWidth, t.clientWidth])""")
    assert widths and all(needed <= given for needed, given in widths)


# --- search ---

def first_results(browser, names):
    "The address to which the first result of a search leads, by name."
    browser.open('search.html?q=margin')
    browser.wait_for('typeof Search == "object" && Search.hasIndex()')
    return browser.run(f'''Object.fromEntries({json.dumps(names)}.map(name => {{
        const [docname, , anchor] = Search._performSearch(...Search._parseQuery(name)).pop() ?? ['', '', ''];
        return [name, docname + '.html' + anchor];
    }}))''')


def test_search_finds_every_name_at_its_entry(browser):
    entries = {}
    for mod, names in build.symbols(build.get_config(build.root)).items():
        for full, (page, _) in names.items():
            name = full.removeprefix(f'{mod}.')
            if name in import_module(mod).__all__:
                entries.setdefault(name.lower(), set()).add(f'{page.split("#")[0]}#{full}')
    found = first_results(browser, sorted(entries))
    assert len(entries) > 100
    # a word of the glossary, as simplex, may lead there
    assert {name: at for name, at in found.items()
            if at not in entries[name] and not at.startswith('glossary.html#term-')} == {}


def test_typing_into_the_search_finds_a_loss(browser):
    browser.open('index.html')
    browser.press('k', code='KeyK', windowsVirtualKeyCode=75, modifiers=2)
    browser.wait_for('document.activeElement.matches("input[type=search]")')
    browser.call('Input.insertText', text='ArcFaceLoss')
    browser.press('Enter', code='Enter', windowsVirtualKeyCode=13, text='\r')
    browser.wait_for('document.querySelector("#search-results li a")')
    address = browser.run('document.querySelector("#search-results li a").href')
    assert address == f'{browser.origin}/losses/losses.html#largest_margins.losses.ArcFaceLoss'
    assert browser.outside == browser.missing == browser.complaints == []


# --- the tests themselves can fail ---

def test_the_browser_sees_what_is_wrong_with_a_page(tmp_path):
    (tmp_path/'index.html').write_text('''<!doctype html><link rel="icon" href="data:,">
<article><h1>One</h1><h1>Two</h1><p style="color:#999; background:#fff">Faint</p>
<p style="width:600px">Wide</p>
<a href="/" tabindex="2" style="outline: none">Link</a><a href="/" style="outline: none"></a><button inert>No</button>
<img src="https://elsewhere.test/x.png"><img alt="" src="missing.png"></article>
<script>fetch("http://also.test/y").catch(() => 0); console.error("broken"); nowhere()</script>''')
    other = Chromium(tmp_path, tmp_path/'profile')
    other.open('index.html')
    assert sorted(other.outside) == ['http://also.test/y', 'https://elsewhere.test/x.png']
    assert other.missing == ['/missing.png']
    assert len(other.complaints) >= 3
    facts = other.run('facts()')
    assert facts['titles'] == 2 and facts['lang'] == ''
    assert len(facts['withoutAlt']) == len(facts['unloaded']) == 2
    assert [bad.endswith('p. "Faint"') for bad in other.run('faint(4.5)')['light']['bad']] == [True]
    other.press('Tab', other.run('watchFocus()') + 1)
    walk = other.run('walked()')
    assert walk['visited'] == len(walk['invisible']) == 2
    assert walk['positive'] == ['a. "Link"'] and walk['nameless'] == ['a. ""']
    other.resize(390, 844)
    assert other.run('facts().width') > 390
    other.close()
