"Cosines that nobody has computed: losses, margins, metrics and fastai take them as they take the matrix."
import pytest
import torch
from fastai.callback.mixup import MixUp
from loss_family import FAMILY, ON_COSINES

import largest_margins.heads
from largest_margins.callbacks import DeferredReweighting, SampleMarginRegularizer
from largest_margins.chunked import LazyCosines
from largest_margins.data import load
from largest_margins.engine.cosines import cosine_matrix
from largest_margins.heads import CosineLinear
from largest_margins.learner import ConvBody, margin_learner
from largest_margins.losses import ArcFaceLoss, CosFaceLoss, LMSoftmaxLoss
from largest_margins.margins import class_sample_margins, min_sample_margin, sample_margins


def pair(n=7, d=3, k=4, dtype=torch.float64):
    torch.manual_seed(0)
    return (torch.randn(n, d, dtype=dtype, requires_grad=True), torch.randn(k, d, dtype=dtype, requires_grad=True),
            torch.arange(n) % k)


@pytest.mark.parametrize('row', FAMILY, ids=repr)
def test_every_loss_takes_them(row):
    features, prototypes, targets = pair()
    loss = row.make(8., range(4))
    lazy, dense = (loss(cosines, targets) for cosines in (LazyCosines(features, prototypes),
                                                          cosine_matrix(features, prototypes)))
    gradients = [torch.autograd.grad(value, (features, prototypes)) for value in (lazy, dense)]
    assert abs(lazy - dense) < 1e-13
    for got, true in zip(*gradients, strict=True): assert (got - true).norm() <= 1e-12 * true.norm()


def test_every_margin_function_takes_them():
    features, prototypes, targets = pair()
    lazy, dense = LazyCosines(features, prototypes), cosine_matrix(features, prototypes)
    for function in (sample_margins, class_sample_margins, min_sample_margin):
        torch.testing.assert_close(function(lazy, targets), function(dense, targets), rtol=0, atol=1e-14)
    slopes = [torch.autograd.grad(sample_margins(cosines, targets).square().sum(), (features, prototypes))
              for cosines in (lazy, dense)]
    for got, true in zip(*slopes, strict=True): assert (got - true).norm() <= 1e-12 * true.norm()


def test_they_answer_like_the_matrix():
    features, prototypes, _ = pair()
    lazy, dense = LazyCosines(features, prototypes), cosine_matrix(features, prototypes)
    assert lazy.shape == dense.shape and lazy.dtype == dense.dtype and len(lazy) == 7 and lazy.ndim == 2
    for dim in (1, -1, 0): assert torch.equal(lazy.argmax(dim), dense.argmax(dim))
    assert torch.equal(lazy.argmax(1, keepdim=True), torch.argmax(dense, 1, keepdim=True))
    assert torch.equal(torch.argmax(lazy, dim=1), dense.argmax(1))
    assert torch.equal(lazy[2:4, 1], dense[2:4, 1])
    assert torch.equal(lazy.softmax(1), dense.softmax(1))
    assert torch.equal(torch.cat([lazy, lazy]), torch.cat([dense, dense]))
    assert not lazy.detach().matrix().requires_grad and lazy.matrix().requires_grad
    with pytest.raises(AttributeError, match='no attribute'): lazy.nothing()
    with pytest.raises(ValueError, match='same d'): LazyCosines(features, prototypes[:, :2])


def test_half_precision_and_extreme_norms():
    features, prototypes, targets = pair(dtype=torch.float32)
    for z, w in ((features.bfloat16(), prototypes), (1e30 * features, 1e-30 * prototypes), (0 * features, prototypes)):
        lazy, dense = LazyCosines(z, w), cosine_matrix(z, w)
        assert lazy.dtype == torch.float32
        torch.testing.assert_close(sample_margins(lazy, targets), sample_margins(dense, targets), rtol=0, atol=1e-6)


@pytest.mark.parametrize('row', [row for row in ON_COSINES if row.name != 'R_sm'], ids=repr)
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none', 'class-mean'])
def test_the_sample_margin_term_in_every_loss(row, reduction):
    "λ·R_sm in the loss is what it is as a loss of its own."
    features, prototypes, targets = pair()
    own = next(r for r in ON_COSINES if r.name == 'R_sm').make(1., range(4), reduction=reduction)
    loss = row.make(8., range(4), reduction=reduction, sample_margin=.7)
    plain = row.make(8., range(4), reduction=reduction)
    cosines = cosine_matrix(features, prototypes)
    expected = plain(cosines, targets) + .7 * own(cosines, targets)
    for value in (loss(cosines, targets), loss.linear(features, prototypes, targets, chunk_size=3)):
        assert (value - expected).norm() < 1e-12
        got, true = (torch.autograd.grad(v.sum(), (features, prototypes), retain_graph=True) for v in (value, expected))
        for g, t in zip(got, true, strict=True): assert (g - t).norm() <= 1e-12 * t.norm()


def test_a_sample_margin_below_zero_is_refused():
    with pytest.raises(ValueError, match='sample_margin must be ≥ 0'): CosFaceLoss(sample_margin=-1.)


def test_a_head_with_many_classes_returns_them(monkeypatch):
    head, features = CosineLinear(3, 5), torch.randn(4, 3)
    assert isinstance(head(features), torch.Tensor)
    monkeypatch.setattr(largest_margins.heads, 'LAZY_FROM', 20)
    assert isinstance(head(features), LazyCosines)
    assert torch.equal(head(features).matrix(), cosine_matrix(features, head.weight))
    compiled = torch.compile(head, fullgraph=True, backend='eager')(features)
    assert isinstance(compiled, torch.Tensor)


def test_the_term_leaves_the_loss_alone():
    features, prototypes, targets = pair()
    loss, lazy = CosFaceLoss(8.), LazyCosines(features, prototypes)
    lazy.sample_margin = .5
    with_term = CosFaceLoss(8., sample_margin=.5).linear(features, prototypes, targets)
    assert torch.equal(loss(lazy, targets), with_term)
    assert loss.sample_margin == 0


def trained(cbs, loss):
    "Two epochs on digits; what the recorder and the model know afterwards."
    torch.manual_seed(0)
    learn = margin_learner(load('digits').dataloaders(256, seed=0), ConvBody(1, (8, 8)), loss(), embedding=8, cbs=cbs(),
                           mixed_precision=False)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2)
    values = list(learn.recorder.values)
    predictions, targets = learn.get_preds()
    return values, predictions, targets, learn.model[-1].weight.detach()


@pytest.mark.parametrize('cbs', [list, lambda: [SampleMarginRegularizer(.5)],
                                 lambda: [SampleMarginRegularizer(.5, reduction='class-mean')],
                                 lambda: [MixUp(), SampleMarginRegularizer(.5)],
                                 lambda: [DeferredReweighting(range(1, 11), 1, .9), SampleMarginRegularizer(.5)]],
                         ids=['alone', 'with R_sm', 'with R_sm by class', 'with MixUp', 'with DRW'])
@pytest.mark.parametrize('loss', [lambda: ArcFaceLoss(20., .1), lambda: LMSoftmaxLoss(20., 'logsumexp')],
                         ids=['ArcFace', 'LM log-sum-exp'])
def test_fastai_trains_with_them_as_with_the_matrix(cbs, loss, monkeypatch):
    dense = trained(cbs, loss)
    monkeypatch.setattr(largest_margins.heads, 'LAZY_FROM', 0)
    lazy = trained(cbs, loss)
    for got, true in zip(lazy[0], dense[0], strict=True):  # the training loss contains R_sm where the walk adds it
        torch.testing.assert_close(torch.tensor(got[1:]), torch.tensor(true[1:]), rtol=2e-3, atol=2e-3)
    for got, true in zip(lazy[1:], dense[1:], strict=True): torch.testing.assert_close(got, true, rtol=2e-3, atol=2e-3)
