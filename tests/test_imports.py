"What importing a theory or loss module loads: torch, numpy, scipy, and no training library."
import subprocess
import sys
from pathlib import Path

HEAVY = {'fastai', 'fastcore', 'matplotlib', 'torchvision', 'timm', 'PIL', 'sklearn', 'joblib', 'pandas', 'IPython',
         'nbdev'}
PACKAGE = Path(__file__).parent.parent/'largest_margins'
HEAVY_ROOMS = {'data', 'plots', 'callbacks', 'learner', 'cli', 'reid', 'verification', 'images'}
ROOMS = {'.'.join(p.relative_to(PACKAGE).with_suffix('').parts) for p in PACKAGE.rglob('*.py')
         if not p.stem.startswith('_')}
LIGHT = sorted(room for room in ROOMS - HEAVY_ROOMS if room.split('.')[0] not in ('training', 'study'))


def loaded(modules):
    "The top-level names that `python -X importtime -c 'import …'` reports."
    wanted = ', '.join(f'largest_margins.{module}' for module in modules)
    done = subprocess.run([sys.executable, '-X', 'importtime', '-c', f'import {wanted}'],
                          capture_output=True, text=True, check=True)
    lines = [line.split('|')[-1].strip() for line in done.stderr.splitlines() if line.startswith('import time:')]
    return {name.split('.')[0] for name in lines}


def test_no_training_library_is_loaded():
    names = loaded(LIGHT)
    assert {'largest_margins', 'torch'} <= names
    assert not names & HEAVY


def test_the_core_is_among_them():
    assert {'checks', 'margins', 'losses', 'heads', 'regularizers', 'engine.cosines', 'engine.fused',
            'engine.shards'} <= set(LIGHT)
