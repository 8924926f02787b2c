"The examples run, learn, and say what is so."
import re
from pathlib import Path

import pytest
from processes import interpret, run_alone, torchrun
from safetensors.torch import load_file

from largest_margins.margins import class_margin

ROOT = Path(__file__).parent.parent
LINE = re.compile(r'epoch (\d+): loss (\S+), accuracy (\S+), class margin (\S+) degrees')


def epochs(printed):
    "[(epoch, loss, accuracy, class margin)] that an example printed."
    return [tuple(map(float, found)) for found in LINE.findall(printed)]


def test_plain_pytorch():
    status, printed = run_alone(interpret, ROOT/'examples'/'plain_pytorch.py')
    assert status == 0, printed
    found = epochs(printed)
    assert [epoch for epoch, *_ in found] == list(range(10))
    (_, _, first, narrow), *_, (_, _, last, wide) = found
    assert last > .95 and last > first and wide > narrow > 0


@pytest.mark.parametrize('ranks', [0, 2], ids=['one process', 'two processes'])
def test_train_sharded(ranks, tmp_path):
    path = tmp_path/'prototypes.safetensors'
    argv = ROOT/'examples'/'train_sharded.py', '--epochs', 4, '--path', path
    found = epochs(''.join(torchrun(ranks, *argv)) if ranks else run_alone(interpret, *argv)[1])
    assert [epoch for epoch, *_ in found] == [0, 1, 2, 3]  # by one rank only
    (_, start, *_), *_, (_, end, accuracy, margin) = found
    assert accuracy > .93 and end < start
    weight = load_file(path)['weight']
    assert weight.shape == (10, 32) and list(tmp_path.iterdir()) == [path]
    assert class_margin(weight).rad2deg().item() == pytest.approx(margin, abs=.06)
