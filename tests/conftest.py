"What several tests need: the built site."
import fcntl
import subprocess
import sys

import pytest
from pages import build, root


@pytest.fixture(scope='session')
def site():
    "The folder of the built site; `make test` has built it, pytest alone builds it if it is not there."
    with open(root/'docs/build.py') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (build.site/'index.html').exists():
            subprocess.run([sys.executable, root/'docs/build.py', '--check'], check=True)
    return build.site
