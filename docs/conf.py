import json
from configparser import ConfigParser
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup

ini = ConfigParser(delimiters=['='])
ini.read(get_config().config_path/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
project, author, release = cfg['lib_name'], cfg['author'], cfg['version']

extensions = ['myst_nb', 'sphinx_proof', 'sphinx_design', 'sphinx_copybutton', 'sphinx.ext.mathjax',
              'sphinx.ext.linkcode', 'sphinxcontrib.bibtex']
html_theme = 'pydata_sphinx_theme'
html_title = project
html_static_path = ['_static']
templates_path = ['_templates']
html_sidebars = {'**': ['kinds.html'], **{page: [] for page in ('search', 'genindex')}}
html_baseurl = cfg['doc_url']
bibtex_bibfiles = ['references.bib']
bibtex_reference_style = 'author_year'
html_css_files = ['site.css']
html_js_files = [('site.js', {'defer': 'defer'})]
html_favicon = html_logo = '_static/icon.svg'
html_copy_source = html_show_sourcelink = False     # the notebooks themselves are on GitHub
html_domain_indices = False                 # the theorems are listed on the page of the theory
html_extra_path = ['extra']                 # llms.txt and the pages as Markdown, written by build.py

nb_execution_mode = 'off'          # outputs are the notebooks' own, made by `nbdev-test --save`
nb_merge_streams = True
nb_code_prompt_show = nb_code_prompt_hide = 'Code'    # of cells that are folded
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_inline', 'deflist', 'fieldlist']
myst_heading_anchors = 3
myst_url_schemes = ['http', 'https', 'mailto']
mathjax_path = 'mathjax/tex-chtml-full.js'   # served from the site itself
mathjax3_config = {'chtml': {'mtextInheritFont': True}, 'options': {'enableMenu': False},
                   'tex': {'macros': {'R': r'\mathbb{R}'}}}
copybutton_image_svg = '''<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.5">
<title>Copy</title><rect x="8" y="8" width="12" height="12" rx="2"/>
<path d="M16 8V6a2 2 0 0 0-2-2H6a2 2 0 0 0-2 2v8a2 2 0 0 0 2 2h2"/></svg>'''
python_use_unqualified_type_names = True     # of types; names have their module
python_maximum_signature_line_length = 88
prf_realtyp_to_countertyp = {k: 'theorem' for k in ('lemma', 'proposition', 'corollary', 'definition')}

# pages with wide tables: they take the whole width, without the list of what is on the page
wide = ['start/choose_a_loss', 'study/tables',
        'results/balanced', 'results/glyphs', 'results/imbalanced', 'results/sphere', 'results/tails']
navigation = json.loads((Path(__file__).parent/'navigation.json').read_text(encoding='utf-8'))
html_context = {'default_mode': 'auto',     # light or dark as the reader's machine is
                'navigation': navigation, 'wide': wide,
                'card': f"{cfg['doc_url']}_static/card.png", 'about': cfg['description']}
html_theme_options = dict(
    logo=dict(text=project), github_url=cfg['git_url'], navbar_center=['bar.html'],
    show_toc_level=2, show_prev_next=True, back_to_top_button=False,
    pygments_light_style='a11y-high-contrast-light', pygments_dark_style='a11y-high-contrast-dark',
    footer_start=['copyright'], footer_end=[],
    secondary_sidebar_items={'**': ['page-toc'], **{page: [] for page in wide}})


def linkcode_resolve(domain, info):
    "The line on GitHub, as nbdev knows it."
    return NbdevLookup().code(info['fullname']) if domain == 'py' else None
