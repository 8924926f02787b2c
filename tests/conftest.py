"What several tests need: the built site, and a browser that looks at it."
import fcntl
import shutil
import subprocess
import sys

import pytest
from chromium import Chromium
from pages import build, root


@pytest.fixture(scope='session')
def site():
    "The folder of the built site; `make test` has built it, pytest alone builds it if it is not there."
    with open(root/'docs/build.py') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (build.site/'index.html').exists():
            subprocess.run([sys.executable, root/'docs/build.py', '--check'], check=True)
    return build.site


@pytest.fixture(scope='session')
def browser(site, tmp_path_factory):
    "Chromium with the site open to it."
    assert shutil.which('chromium'), 'the tests of the site need Chromium: apt-get install chromium'
    opened = Chromium(site, tmp_path_factory.mktemp('profile'))
    yield opened
    opened.close()
