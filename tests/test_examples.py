"The examples run, learn, and say what is so."
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from largest_margins.margins import class_margin

ROOT = Path(__file__).parent.parent
LINE = re.compile(r'epoch (\d+): loss (\S+), accuracy (\S+), class margin (\S+) degrees')


def epochs(*command, seconds=900):
    "[(epoch, loss, accuracy, class margin)] that an example prints."
    quiet = dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='error::FutureWarning',
                 PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    process = subprocess.Popen([sys.executable, *map(str, command)], env=os.environ | quiet, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try: output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its workers
        process.wait()
        raise
    assert process.returncode == 0, output
    return [tuple(map(float, found)) for found in LINE.findall(output)]


def test_plain_pytorch():
    found = epochs(ROOT/'examples'/'plain_pytorch.py')
    assert [epoch for epoch, *_ in found] == list(range(10))
    (_, _, first, narrow), *_, (_, _, last, wide) = found
    assert last > .95 and last > first and wide > narrow > 0


@pytest.mark.parametrize('launch', [(), ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2)],
                         ids=['one process', 'torchrun, two processes'])
def test_train_sharded(launch, tmp_path):
    path = tmp_path/'prototypes.safetensors'
    found = epochs(*launch, ROOT/'examples'/'train_sharded.py', '--epochs', 4, '--path', path)
    assert [epoch for epoch, *_ in found] == [0, 1, 2, 3]  # by one rank only
    (_, start, *_), *_, (_, end, accuracy, margin) = found
    assert accuracy > .93 and end < start
    weight = load_file(path)['weight']
    assert weight.shape == (10, 32) and list(tmp_path.iterdir()) == [path]
    assert class_margin(weight).rad2deg().item() == pytest.approx(margin, abs=.06)
