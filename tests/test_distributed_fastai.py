"The example that trains a margin_learner in several processes, run as a user runs it."
from pathlib import Path

import pytest
import torch
from processes import torchrun

from largest_margins.data import load
from largest_margins.learner import margin_learner
from largest_margins.losses import LMSoftmaxLoss
from largest_margins.training.bodies import ConvBody

example = Path(__file__).parent.parent/'examples'/'fastai_distributed.py'


@pytest.fixture(scope='module')
def ends(tmp_path_factory):
    "What each of two processes has after two epochs."
    out = tmp_path_factory.mktemp('ends')
    printed = torchrun(2, example, '--epochs', '2', '--out', out)
    assert ''.join(printed).count('class_margin') == 1, 'one process prints the table'
    return [torch.load(out/f'{rank}.pt', weights_only=True) for rank in range(2)]


def test_both_processes_end_with_the_same_model(ends):
    a, b = (end['model'] for end in ends)
    assert set(a) == set(b) and any(name.endswith('running_mean') for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert ends[0]['steps'] == 2 * (1347 // 2 // 32), 'each takes half of the images'


def test_what_they_report_is_of_the_whole_test_split(ends):
    learn = margin_learner(load('digits').dataloaders(batch_size=64), ConvBody(), LMSoftmaxLoss(20.), embedding=32)
    learn.model.load_state_dict(ends[0]['model'])
    with learn.no_bar(): _, accuracy, *_ = learn.validate()
    assert accuracy > .9
    for end in ends:
        assert end['accuracy'] == pytest.approx(accuracy, abs=1e-6)
        latest = learn.margin_recorder.latest
        for key in end['margins'].keys() - {'epoch'}:  # no gap to an optimum with R_sm
            assert end['margins'][key] == pytest.approx(latest[key], abs=1e-5), key
