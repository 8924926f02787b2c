"What several tests need: the built site, and a browser that looks at it."
import fcntl
import shutil
import signal
import subprocess
import sys

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts us in the background has it ignored


@pytest.fixture
def ends():
    "Fails what takes two minutes of the processor, whoever else keeps it busy: it would not end."
    def give_up(*_): raise AssertionError('not done after two minutes of the processor')
    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, 120)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


@pytest.fixture(scope='session')
def site():
    "The folder of the built site; `make test` has built it, pytest alone builds it if it is not there."
    from pages import build, root  # here, since few tests need it
    with open(root/'docs/build.py') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (build.site/'index.html').exists():
            subprocess.run([sys.executable, root/'docs/build.py', '--check'], check=True)
    return build.site


@pytest.fixture(scope='session')
def chromium(site, tmp_path_factory):
    "Chromium with the site open to it."
    from chromium import Chromium
    assert shutil.which('chromium'), 'the tests of the site need Chromium: apt-get install chromium'
    opened = Chromium(site, tmp_path_factory.mktemp('profile'))
    yield opened
    opened.close()


@pytest.fixture
def browser(chromium):
    "The same; what moves on a page does not go on moving while other tests run."
    yield chromium
    chromium.leave()


def pytest_collection_modifyitems(items):
    "Pages first, which take longest: no worker is left alone with them in the end."
    items.sort(key=lambda item: 'test_notebooks' not in item.nodeid)
