"The pages of the site, as docs/build.py names them."
import importlib.util
from pathlib import Path

root = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location('build', root/'docs/build.py')
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

notebooks = sorted(p.relative_to(root/'nbs') for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_' not in str(p))
pages = [build.page_path(p).with_suffix('.html').as_posix() for p in notebooks]
pages += [Path(d.lower()).with_suffix('.html').as_posix() for d in build.documents]
pages += [f'{name}.html' for name in build.written]
pages += [f'{address}.html' for address in build.own_pages(notebooks)]
made = ['genindex.html', 'search.html']    # Sphinx's own
moved = [f'{page}.html' for page in build.moved]    # old addresses, which lead on
