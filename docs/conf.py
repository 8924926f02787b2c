from configparser import ConfigParser

from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup

ini = ConfigParser(delimiters=['='])
ini.read(get_config().config_path/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
project, author, release = cfg['lib_name'], cfg['author'], cfg['version']

extensions = ['myst_nb', 'sphinx_proof', 'sphinx_design', 'sphinx_copybutton', 'sphinx.ext.mathjax',
              'sphinx.ext.linkcode']
html_theme = 'pydata_sphinx_theme'
html_title = project
html_static_path, templates_path = ['_static'], ['_templates']
html_sidebars = {'**': ['pages.html']}      # every page in the left column, not only the children of this one
html_css_files = ['site.css']
html_favicon = html_logo = '_static/icon.svg'
html_show_sourcelink = False
exclude_patterns = ['_build']

nb_execution_mode = 'off'          # outputs are the notebooks' own, made by `nbdev-test --save`
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_inline', 'deflist', 'fieldlist']
myst_heading_anchors = 3
myst_url_schemes = ['http', 'https', 'mailto']
mathjax_path = 'mathjax/tex-chtml-full.js'   # served from the site itself
mathjax3_config = {'chtml': {'mtextInheritFont': True}, 'options': {'enableMenu': False},
                   'tex': {'macros': {'R': r'\mathbb{R}'}}}
python_use_unqualified_type_names = True
add_module_names = False
python_maximum_signature_line_length = 88
prf_realtyp_to_countertyp = {k: 'theorem' for k in ('lemma', 'proposition', 'corollary', 'definition')}

html_theme_options = dict(
    logo=dict(text=project), github_url=cfg['git_url'], navbar_center=[], show_toc_level=2, show_prev_next=True,
    pygments_light_style='a11y-high-contrast-light', pygments_dark_style='a11y-high-contrast-dark',
    footer_start=['copyright'], footer_end=[], secondary_sidebar_items=['page-toc'])


def linkcode_resolve(domain, info):
    "The line on GitHub, as nbdev knows it."
    return NbdevLookup().code(info['fullname']) if domain == 'py' else None
