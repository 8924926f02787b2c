"The optimiser of lists against fastai's own, in a Learner, and how many operations a step takes."
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.optimizer import SGD, Adam, Lamb
from torch import nn

from largest_margins.data import ImageData, load
from largest_margins.learner import margin_learner
from largest_margins.losses import NormFaceLoss
from largest_margins.training.bodies import ConvBody, resnet32
from largest_margins.training.foreach import CountOperations, ForeachOptimizer, foreach
from largest_margins.training.schedules import optimiser_for


@pytest.mark.parametrize('usual', [Adam, partial(SGD, mom=.9, decouple_wd=False)])
def test_a_learner_trains_to_the_same_bits(usual):
    weights = []
    for opt_func in (usual, partial(foreach, opt_func=usual)):
        torch.manual_seed(0)
        data = load('digits')
        dls = data.subset(range(256)).dataloaders(64, seed=0, device='cpu')
        learn = margin_learner(dls, ConvBody(widths=(4, 8)), NormFaceLoss(10.), embedding=8, opt_func=opt_func)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
        weights.append({name: p.detach() for name, p in learn.model.named_parameters()})
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())


def test_frozen_parameters_and_state_are_fastai_s(tmp_path):
    layers = nn.Linear(3, 3), nn.Linear(3, 3)
    opt = foreach([[*x.parameters()] for x in layers], lr=.1)
    opt.freeze_to(-1)
    layers[1](layers[0](torch.ones(2, 3))).sum().backward()
    before = layers[0].weight.clone()
    opt.step()
    assert torch.equal(layers[0].weight, before) and not torch.equal(opt.state[layers[1].weight]['grad_avg'],
                                                                     torch.zeros(3, 3))
    opt.unfreeze()
    opt.step()  # the two groups now have different numbers of steps
    assert opt.state[layers[1].weight]['step'] == 2
    other = Adam([[*x.parameters()] for x in layers], lr=.1)
    other.load_state_dict(opt.state_dict())
    opt.zero_grad()
    assert all(p.grad is None for x in layers for p in x.parameters())


def test_others_are_left_as_they_are():
    p = [nn.Parameter(torch.ones(2))]
    assert isinstance(foreach(p, lr=.1), ForeachOptimizer) and type(foreach(p, lr=.1, opt_func=Lamb)) is not (
        ForeachOptimizer)
    with pytest.raises(NotImplementedError): foreach(p, lr=.1).step(lambda: None)


class Count(Callback):
    "Counts the operations of each training step."
    order = -100

    def before_batch(self):
        if self.training: self.counted = CountOperations().__enter__()

    def after_batch(self):
        if self.training: self.counted.__exit__(None, None, None)


@pytest.mark.parametrize('mixed_precision', [False, True])
def test_a_training_step_of_resnet32_takes_at_most_500_operations(mixed_precision):
    images, targets = torch.zeros(8, 3, 8, 8).byte(), torch.arange(8) % 2
    dls = ImageData('zeros', images, targets, images, targets, ['a', 'b']).dataloaders(4, device='cpu')
    learn = margin_learner(dls, resnet32(), NormFaceLoss(20.), mixed_precision=mixed_precision, cbs=Count(), wd=2e-4,
                           **optimiser_for('steps'))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .1)
    assert 100 < learn.count.counted.total <= 500
