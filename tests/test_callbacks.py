"The callbacks in a real Learner: what they add, what they work with, and that they leave no trace."
import copy
import pickle
import warnings
from functools import partial
from math import degrees, inf

import fastai.callback.schedule
import numpy as np
import pytest
import torch
from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelFitException,
    CancelTrainException,
    CancelValidException,
)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from pairs import pairs
from processes import returned, run_on_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from largest_margins import checks
from largest_margins.bounds import class_margin_bound
from largest_margins.callbacks import (
    Checkpoint,
    DeferredReweighting,
    HeadCallback,
    MarginModel,
    MarginRecorder,
    SampleMarginRegularizer,
    ZeroCentroidRegularizer,
    find_head,
    find_loss,
    has_bfloat16,
    solvable_loss,
)
from largest_margins.engine.cosines import cosine_matrix
from largest_margins.heads import CosineLinear, MarginHead, ShardedMarginHead
from largest_margins.losses import (
    ArcFaceLoss,
    CosFaceLoss,
    FocalLoss,
    GMSoftmaxLoss,
    LDAMLoss,
    LMSoftmaxLoss,
    NormFaceLoss,
    SampleMarginLoss,
    SphereFaceLoss,
    class_balanced_weights,
)
from largest_margins.margins import class_margin, class_sample_margins, norm_ratio, sample_margins
from largest_margins.regularizers import zero_centroid
from largest_margins.training.measures import MEASURES, has_optimum

K, D = 4, 6
COUNTS = [40, 30, 20, 10]
assert fastai.callback.schedule


def data(n=96, image=False):
    "Four overlapping clusters, the first half for training."
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % K
    x = torch.randn(K, 8, generator=g)[y] + .8 * torch.randn(n, 8, generator=g)
    if image: x = x.view(n, 1, 2, 4)
    items = list(zip(x, y))
    dls = DataLoaders(DataLoader(items[:n // 2], bs=12), DataLoader(items[n // 2:], bs=24))
    dls.c = K
    return dls


def network(head='cosine', image=False):
    torch.manual_seed(0)
    last = CosineLinear(D, K) if head == 'cosine' else nn.Linear(D, K)
    return nn.Sequential(*[nn.Flatten()] * image, nn.Linear(8, D), nn.BatchNorm1d(D), last)


def learner(head='cosine', loss=None, cbs=None, metrics=None, image=False, tmp=None, **kwargs):
    loss = loss or (CosFaceLoss(20., .1) if head == 'cosine' else CrossEntropyLossFlat())
    sgd = partial(OptimWrapper, opt=torch.optim.SGD)
    return Learner(data(image=image), network(head, image), loss, opt_func=sgd, lr=.1, cbs=cbs,
                   metrics=metrics, path=tmp, **kwargs)


def quiet(learn, f, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)


def everything(start=0):
    regularisers = [SampleMarginRegularizer(), ZeroCentroidRegularizer(10.)]
    return [*regularisers, MarginRecorder(), DeferredReweighting(COUNTS, start)]


class FirstGradients(Callback):
    "Keeps the gradients of the first step and stops."
    order = 100

    def before_step(self):
        self.grads = [p.grad.clone() for p in self.learn.model.parameters()]
        raise CancelFitException


def first_gradients(learn, cbs):
    keep = FirstGradients()
    quiet(learn, learn.fit, 1, cbs=[*cbs, keep])
    return keep.grads


def by_hand(head, total):
    "Gradients of `total(features, weight, scores, y)` at the first batch."
    model = network(head).train()
    x, y = data().train.one_batch()
    features = model[:-1](x)
    total(features, model[-1].weight, model[-1](features), y).backward()
    return [p.grad for p in model.parameters()]


def same(a, b, tolerance=1e-5):
    return all(torch.allclose(x, y, atol=tolerance, rtol=1e-4) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize('head', ['cosine', 'linear'])
def test_the_regularisers_add_what_they_say(head):
    base = CosFaceLoss(20., .1) if head == 'cosine' else F.cross_entropy

    def total(features, weight, scores, y):
        cosines = F.linear(F.normalize(features), F.normalize(weight))
        others = cosines.masked_fill(F.one_hot(y, K).bool(), -9).amax(1)
        r_sm = (others - cosines[range(len(y)), y]).mean()
        return base(scores, y) + .5 * r_sm + 10 * F.normalize(weight).mean(0).square().sum()
    ours = first_gradients(learner(head), [SampleMarginRegularizer(.5), ZeroCentroidRegularizer(10.)])
    assert same(ours, by_hand(head, total))
    assert not same(ours, first_gradients(learner(head), []))


def test_class_mean_regulariser():
    cb = SampleMarginRegularizer(1., reduction='class-mean')
    def total(features, weight, scores, y):
        margins = sample_margins(scores, y)
        return CosFaceLoss(20., .1)(scores, y) - torch.stack([margins[y == c].mean() for c in y.unique()]).mean()
    assert same(first_gradients(learner(), [cb]), by_hand('cosine', total))


def test_gradient_accumulation_scales_the_whole_sum():
    "Four batches of 12 accumulated give the gradient of their mean, regularisers included."
    cbs = [SampleMarginRegularizer(.5), ZeroCentroidRegularizer(10.)]
    got = first_gradients(learner(), [*cbs, GradientAccumulation(48)])
    model = network().train()
    for x, y in data().train:
        scores = model(x)
        loss = CosFaceLoss(20., .1)(scores, y) + .5 * SampleMarginLoss()(scores, y)
        ((loss + 10 * zero_centroid(model[-1].weight)) / 4).backward()
    assert same(got, [p.grad for p in model.parameters()])


@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('head', ['cosine', 'linear'])
def test_mixed_targets_are_mixed_in_the_term_too(mix, head):
    class Check(Callback):
        order, run_valid, seen = 3, False, 0
        def after_loss(self):
            m, term = self.learn.cbs.filter(lambda c: isinstance(c, mix))[0], self.learn.sample_margin_regularizer
            cosines = term.batch_cosines()
            own, other = (-sample_margins(cosines, y) for y in (self.learn.yb[0], m.yb1[0]))
            wanted = (m.lam * own + (1 - m.lam) * other).mean()
            assert torch.allclose(term.value, wanted, atol=1e-6)
            assert torch.allclose(self.learn.loss_grad, self.learn.loss + .5 * wanted, atol=1e-6)
            Check.seen += 1
    learn = learner(head, image=True, metrics=accuracy)
    quiet(learn, learn.fit_one_cycle, 2, cbs=[mix(), SampleMarginRegularizer(), MarginRecorder(), Check()])
    assert Check.seen == 8
    assert not hasattr(learn, 'sample_margin_regularizer')


@pytest.mark.parametrize('head', ['cosine', 'linear'])
def test_recorder_measures_the_validation_set(head):
    learn = learner(head, metrics=accuracy, cbs=MarginRecorder())
    quiet(learn, learn.fit, 3)
    learn.model.eval()
    x, y = (torch.cat(t) for t in zip(*learn.dls.valid))
    with torch.no_grad(): cosines = cosine_matrix(learn.model[:-1](x), learn.model[-1].weight)
    weight, history = learn.model[-1].weight.detach(), learn.margin_recorder.history
    last = history[-1]
    assert [e['epoch'] for e in history] == [0, 1, 2]
    assert last['class_margin'] == pytest.approx(degrees(class_margin(weight)), abs=1e-5)
    assert last['bound'] == pytest.approx(degrees(class_margin_bound(K, D).radians))
    assert last['bound'] == pytest.approx(109.4712, abs=1e-3)
    assert last['mean_sample_margin'] == pytest.approx(sample_margins(cosines, y).mean().item(), abs=1e-6)
    assert last['min_sample_margin'] == pytest.approx(sample_margins(cosines, y).min().item(), abs=1e-6)
    assert last['class_sample_margins'] == pytest.approx(class_sample_margins(cosines, y).tolist(), abs=1e-6)
    assert last['norm_ratio'] == pytest.approx(norm_ratio(weight).item(), rel=1e-5)
    assert last['centroid_norm'] == pytest.approx(F.normalize(weight).mean(0).norm().item(), abs=1e-6)
    names = list(learn.recorder.metric_names)
    row = dict(zip(names[1:], learn.recorder.values[-1]))
    assert row['class_margin°'] == last['class_margin'] and row['min_sample_margin'] == last['min_sample_margin']
    assert names[:4] == ['epoch', 'train_loss', 'valid_loss', 'accuracy']


def test_history_is_of_training_only(tmp_path):
    learn = learner(metrics=accuracy, cbs=MarginRecorder(), tmp=tmp_path)
    quiet(learn, learn.fit, 2)
    kept = list(learn.margin_recorder.history)
    validated = quiet(learn, learn.validate)
    assert validated[2] == kept[-1]['class_margin']
    quiet(learn, learn.get_preds)
    quiet(learn, learn.lr_find, num_it=4, show_plot=False)
    assert learn.margin_recorder.history == kept
    axes = learn.margin_recorder.plot()
    assert len(axes) == 3


def test_plot_without_history_says_so():
    learn = learner(cbs=MarginRecorder())
    with pytest.raises(ValueError, match='history'): learn.margin_recorder.plot()


@pytest.mark.parametrize('head', ['cosine', 'linear'])
@pytest.mark.parametrize('extra', ['plain', 'mixup', 'accumulate', 'fp16', 'bf16', 'one cycle', 'lr_find', 'save'])
def test_works_with(head, extra, tmp_path):
    learn = learner(head, metrics=accuracy, cbs=everything(1), tmp=tmp_path)
    cbs = dict(mixup=[MixUp()], accumulate=[GradientAccumulation(24)], fp16=[MixedPrecision()],
               bf16=[MixedPrecision(amp_mode='bf16')], save=[SaveModelCallback(monitor='class_margin°')]).get(extra, [])
    if extra == 'lr_find': quiet(learn, learn.lr_find, num_it=4, show_plot=False)
    elif extra == 'one cycle': quiet(learn, learn.fit_one_cycle, 2)
    else: quiet(learn, learn.fit, 2, cbs=cbs)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    if extra != 'lr_find': assert len(learn.margin_recorder.history) == 2
    preds, _ = quiet(learn, learn.get_preds)
    assert preds.shape == (48, K) and torch.allclose(preds.sum(1), torch.ones(48), atol=1e-5)
    assert (tmp_path/'models'/'model.pth').exists() == (extra == 'save')


@pytest.mark.parametrize('loss', [NormFaceLoss(), ArcFaceLoss(), SphereFaceLoss(), LDAMLoss(COUNTS), GMSoftmaxLoss(),
                                  LMSoftmaxLoss(), LMSoftmaxLoss(20., 'logsumexp'), SampleMarginLoss(),
                                  CosFaceLoss(reduction='class-mean')], ids=repr)
def test_every_loss_trains(loss):
    learn = learner(loss=loss, cbs=everything(1), metrics=accuracy)
    quiet(learn, learn.fit, 2)
    assert learn.recorder.losses[-1].isfinite()


def test_focal_loss_trains_a_linear_head():
    learn = learner('linear', loss=FocalLoss(), cbs=everything(1), metrics=accuracy)
    quiet(learn, learn.fit, 2)
    assert learn.recorder.losses[-1].isfinite()


# Deferred reweighting

@pytest.mark.parametrize('head', ['cosine', 'linear'])
def test_reweighting_starts_on_time_and_weighs_right(head):
    weights = class_balanced_weights(COUNTS, .9)
    class Check(Callback):
        run_valid, seen = False, []
        def after_loss(self):
            base = CosFaceLoss(20., .1, weight=weights) if head == 'cosine' else nn.CrossEntropyLoss(weight=weights)
            weighted = base(self.learn.pred, self.learn.yb[0])
            Check.seen.append(torch.allclose(self.learn.loss_grad, weighted, atol=1e-6)
                              and torch.allclose(self.learn.loss, weighted, atol=1e-6))
    Check.seen = []
    learn = learner(head)
    quiet(learn, learn.fit, 2, cbs=[DeferredReweighting(COUNTS, 1, .9), Check()])
    assert Check.seen == [False] * 4 + [True] * 4


def test_reweighting_refuses_what_cannot_be_weighted():
    learn = learner('linear', loss=F.cross_entropy)
    with pytest.raises(TypeError, match='weight'): quiet(learn, learn.fit, 1, cbs=DeferredReweighting(COUNTS, 0))
    with pytest.raises(ValueError, match='start_epoch'): DeferredReweighting(COUNTS, -1)
    with pytest.raises(ValueError, match='class_counts'): DeferredReweighting([3, 0], 1)


# Mixed precision

def mixed(head, image=False):
    model = MarginModel(*network(head, image))
    model.mixed_precision = True
    return model


class Types(Callback):
    "Looks at what the layers give, in training and in validation."
    def __init__(self): self.seen = []

    def before_fit(self):
        self.hooks = [m.register_forward_hook(self.look) for m in self.learn.model.children()]

    def look(self, module, inputs, output):
        self.seen.append((self.learn.training, type(module).__name__, output.dtype, torch.is_autocast_enabled('cpu')))

    def after_pred(self): assert not torch.is_autocast_enabled('cpu') and self.learn.pred.dtype == torch.float32

    def after_fit(self): [h.remove() for h in self.hooks]


@pytest.mark.parametrize('head', ['cosine', 'linear'])
def test_body_in_bfloat16_head_in_float32_and_only_while_training(head):
    learn, types = learner(head), Types()
    learn.model = mixed(head)
    quiet(learn, learn.fit, 1, cbs=types)
    last = 'CosineLinear' if head == 'cosine' else 'Linear'
    assert types.seen[:3] == [(True, 'Linear', torch.bfloat16, True), (True, 'BatchNorm1d', torch.bfloat16, True),
                              (True, last, torch.float32, False)]
    assert {dtype for training, _, dtype, _ in types.seen if not training} == {torch.float32}
    assert len(types.seen) == 3 * (4 + 2)
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())


@pytest.mark.parametrize('head', ['cosine', 'linear'])
def test_mixed_precision_rounds_the_body_and_nothing_else(head):
    "The gradients are those by hand, of a body under autocast and all else outside."
    base = CosFaceLoss(20., .1) if head == 'cosine' else F.cross_entropy
    model = network(head).train()
    x, y = data().train.one_batch()
    with torch.autocast('cpu', torch.bfloat16): features = model[:-1](x)
    features = features.float()
    scores = model[-1](features)
    cosines = scores if head == 'cosine' else cosine_matrix(features, model[-1].weight)
    (base(scores, y) + .5 * SampleMarginLoss()(cosines, y)).backward()
    learn = learner(head)
    learn.model = mixed(head)
    got = first_gradients(learn, [SampleMarginRegularizer(.5)])
    assert all(torch.equal(a, p.grad) for a, p in zip(got, model.parameters(), strict=True))
    exact = first_gradients(learner(head), [SampleMarginRegularizer(.5)])
    got, exact = (torch.cat([g.flatten() for g in grads]) for grads in (got, exact))
    assert 1e-3 < (got - exact).norm() / exact.norm() < .02


@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_precision_with_mixed_images(mix):
    learn = learner('linear', image=True, cbs=SampleMarginRegularizer(), metrics=accuracy)
    learn.model, types = mixed('linear', image=True), Types()
    quiet(learn, learn.fit_one_cycle, 3, cbs=[mix(), types])
    assert (True, 'Linear', torch.bfloat16, True) in types.seen
    assert learn.recorder.losses[-1].isfinite() and learn.recorder.values[-1][2] > .5


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('place', [0, 2])
def test_no_autocast_is_left_when_the_forward_pass_fails(error, place):
    class Broken(nn.Linear):
        def forward(self, x):
            assert torch.is_autocast_enabled('cpu') == (place == 0)
            raise error('out of memory')
    learn = learner('linear')
    learn.model = mixed('linear')
    learn.model[place] = Broken(D, K)
    with pytest.raises(error, match='out of memory'): quiet(learn, learn.fit, 1)
    assert not torch.is_autocast_enabled('cpu')


@pytest.mark.parametrize('capabilities,answer', [
    (dict(avx512_bf16=True), True), (dict(amx_bf16=True, avx512_bf16=True), False), (dict(avx512_f=True), False),
    (dict(bf16=True, architecture='aarch64'), False), ({}, False)])
def test_has_bfloat16(capabilities, answer, monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    assert has_bfloat16() is answer
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: False)
    assert has_bfloat16() is False


def test_has_bfloat16_where_torch_cannot_tell(monkeypatch):
    monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    assert has_bfloat16() is False


# No trace

class NoValidation(Callback):
    def before_validate(self): raise CancelValidException


def test_a_cancelled_validation_records_nothing():
    learn = learner(cbs=[NoValidation(), MarginRecorder()])
    quiet(learn, learn.fit, 1)
    assert learn.margin_recorder.history == []


class Raises(Callback):
    order, run_valid = 200, False

    def __init__(self, event, error):
        def act(): raise error
        setattr(self, event, act)


def state(learn):
    loss = getattr(learn.loss_func, 'func', learn.loss_func)
    hooks = [h for m in learn.model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    lent = [m for m in learn.model.modules() if 'forward' in vars(m)]
    return (list(learn.metrics), sorted(cb.name for cb in learn.cbs), learn.loss_func, loss.weight, loss.reduction,
            hooks, lent, torch.is_autocast_enabled('cpu'),
            {k for k in vars(learn) if 'margin' in k or 'centroid' in k or 'reweight' in k or 'precision' in k})


ENDS = dict(
    normal=None,
    cancel_fit=('after_step', CancelFitException()),
    cancel_train=('after_loss', CancelTrainException()),
    cancel_batch=('before_batch', CancelBatchException()),
    cancel_fit_before_the_model=('before_batch', CancelFitException()),
    error_before_the_model=('before_batch', RuntimeError('no')),
    interrupt_before_the_model=('before_batch', KeyboardInterrupt()),
    error_in_step=('before_step', RuntimeError('no')),
    error_in_loss=('after_loss', RuntimeError('no')),
    error_after_validation=('after_epoch', RuntimeError('no')),
    interrupt=('after_batch', KeyboardInterrupt()))


@pytest.mark.parametrize('end, head, where', pairs(list(ENDS), ['cosine', 'linear'], ['fit', 'learner']))
def test_no_trace(end, head, where):
    ours = everything()
    learn = learner(head, metrics=accuracy, cbs=ours if where == 'learner' else None)
    before = state(learn)
    cbs = (ours if where == 'fit' else []) + ([Raises(*ENDS[end])] if ENDS[end] else [])
    try: quiet(learn, learn.fit, 1, cbs=cbs)
    except (RuntimeError, KeyboardInterrupt): assert 'error' in end or 'interrupt' in end
    assert state(learn) == before


@pytest.mark.parametrize('error', [RuntimeError, CancelBatchException])
@pytest.mark.parametrize('place', [0, 2])
def test_no_trace_when_the_forward_pass_fails(error, place):
    "Before the head, and in it."
    learn = learner('linear', metrics=accuracy, cbs=everything())
    before = state(learn)
    class Broken(nn.Linear):
        def forward(self, x): raise error('out of memory')
    learn.model[place], working = Broken(D, K), learn.model[place]
    if error is CancelBatchException: quiet(learn, learn.fit, 1, cbs=NoValidation())
    else:
        with pytest.raises(error, match='out of memory'): quiet(learn, learn.fit, 1)
    learn.model[place] = working
    assert state(learn) == before
    quiet(learn, learn.fit, 1)
    assert state(learn) == before


def test_a_model_is_whole_after_ctrl_c_in_its_forward_pass():
    "It can be saved and copied; the copy computes with its own weights, and the next fit leaves nothing."
    learn = learner('linear', cbs=[SampleMarginRegularizer(), MarginRecorder()])
    before, stop = state(learn), learn.model[0].register_forward_pre_hook(partial(interrupt, [3]))
    with pytest.raises(KeyboardInterrupt): quiet(learn, learn.fit, 1)
    stop.remove()
    copies = copy.deepcopy(learn.model), pickle.loads(pickle.dumps(learn.model))
    for model in copies:
        nn.init.zeros_(model[-1].weight)
        assert model.train()(torch.ones(2, *learn.dls.one_batch()[0].shape[1:])).eq(model[-1].bias).all()
    quiet(learn, learn.fit, 1)
    assert state(learn) == before


def interrupt(left, *_):
    left[0] -= 1
    if not left[0]: raise KeyboardInterrupt


def test_detaching_takes_the_columns_away():
    learn, recorder = learner(metrics=accuracy), MarginRecorder()
    learn.add_cb(recorder)
    assert [m.name for m in learn.metrics][1:] == [MEASURES[name].heading.replace(' ', '_')
                                                  for name in MarginRecorder.names]
    learn.remove_cb(recorder)
    assert [m.name for m in learn.metrics] == ['accuracy'] and not hasattr(learn, 'margin_recorder')


# The classifier

class Branches(nn.Module):
    "A classifier, and layers that are registered after it, used or not."

    def __init__(self, head, last=None, out=lambda x: x):
        super().__init__()
        self.body, self.head, self.out = nn.Linear(8, D), head, out
        self.projector, self.last = nn.Linear(D, K), last

    def forward(self, x):
        z = self.body(x)
        self.projector(z)
        if isinstance(self.last, nn.MultiheadAttention): z = self.last(z[:, None], z[:, None], z[:, None])[0][:, 0]
        elif self.last is not None: self.last(z)
        return self.out(self.head(z))


class OwnCosines(nn.Module):
    "A cosine classifier that somebody has written."

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, D))

    def forward(self, x): return F.linear(F.normalize(x), F.normalize(self.weight))


HEADS = dict(cosine=lambda: CosineLinear(D, K), linear=lambda: nn.Linear(D, K), own=OwnCosines,
             margin=lambda: MarginHead(D, K, CosFaceLoss(20., .1)))
LAST = dict(nothing=lambda: None, linear=lambda: nn.Linear(D, K), cosine=lambda: CosineLinear(D, K),
            attention=lambda: nn.MultiheadAttention(D, 2, batch_first=True))


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('last', LAST)
def test_the_classifier_is_what_comes_out(head, last):
    "And its margins are the recorded ones, whatever is registered after it."
    torch.manual_seed(0)
    model = Branches(HEADS[head](), LAST[last]())
    x, _ = data().train.one_batch()
    assert find_head(model, x) is model.head
    learn = learner('linear' if head == 'linear' else 'cosine', cbs=everything(1))
    learn.model = model
    quiet(learn, learn.fit, 2)
    assert learn.margin_recorder.latest['class_margin'] == pytest.approx(degrees(class_margin(model.head.weight.data)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_scaled_cosines_are_measured_on_the_features():
    model = Branches(CosineLinear(D, K), out=lambda x: 30 * x)
    x, _ = data().train.one_batch()
    assert find_head(model, x) is model.head
    learn = learner('linear', cbs=[MarginRecorder(), SampleMarginRegularizer()])
    learn.model = model
    quiet(learn, learn.fit, 2)
    x, y = (torch.cat(t) for t in zip(*learn.dls.valid))
    with torch.no_grad(): margins = sample_margins(model.eval()(x) / 30, y)
    assert learn.margin_recorder.latest['min_sample_margin'] == pytest.approx(margins.min().item(), abs=1e-5)


class OtherInTraining(nn.Module):
    "After the cosines comes what evaluation does not show."

    def __init__(self, change):
        super().__init__()
        self.body, self.head, self.change = nn.Linear(8, D), CosineLinear(D, K), change

    def forward(self, x):
        cosines = self.head(self.body(x))
        return self.change(cosines) if self.training else cosines


@pytest.mark.parametrize('change', [lambda x: x.clamp(-.1, .1), nn.Dropout(.5), lambda x: x.flip(1)])
def test_what_training_alone_adds_to_the_cosines(change):
    "The term is of the cosines."
    class Watch(Callback):
        order = 2
        def after_loss(self):
            if not self.training: return
            true = -sample_margins(model.head(model.body(self.x)), self.y).mean()
            torch.testing.assert_close(self.learn.sample_margin_regularizer.value, true)
    model = OtherInTraining(change)
    learn = Learner(data(), model, F.cross_entropy, cbs=[SampleMarginRegularizer(), Watch()])
    quiet(learn, learn.fit, 1)


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_head_inside_a_checkpoint(reentrant):
    "The term reaches the body, or it is an error."
    class Checkpointed(OtherInTraining):
        def forward(self, x): return checkpoint(super().forward, x.requires_grad_(), use_reentrant=reentrant)
    def gradients(kind):
        torch.manual_seed(0)
        learn = learner('linear', cbs=[SampleMarginRegularizer(), keep := FirstGradients()])
        learn.model = kind(nn.Identity())
        quiet(learn, learn.fit, 1)
        return keep.grads
    if not reentrant: assert same(gradients(Checkpointed), gradients(OtherInTraining))
    else:
        with pytest.raises(RuntimeError, match='use_reentrant=False'): gradients(Checkpointed)


@pytest.mark.parametrize('ignored', [-100, 255])
def test_ignored_samples_have_no_margin(ignored):
    "Neither in the term nor in the table."
    loss, loaders = NormFaceLoss(8., ignore_index=ignored), []
    torch.manual_seed(0)
    x, y = torch.randn(40, 8), torch.arange(40) % K
    targets = y.masked_fill(y.eq(1), ignored)
    for labels in (targets, targets.where(y.ne(1), 0)):
        samples = [(a, b) for a, b, c in zip(x, labels, y) if c != 1 or labels is targets]
        loaders.append(DataLoaders(*(DataLoader(samples, bs=len(samples)) for _ in range(2))))
        loaders[-1].c = K
    weights = []
    for dls in loaders:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, D), CosineLinear(D, K))
        learn = Learner(dls, model, loss, lr=.1, cbs=[SampleMarginRegularizer(), MarginRecorder()])
        quiet(learn, learn.fit, 1)
        weights.append((model[-1].weight.detach(), learn.margin_recorder.history))
    (first, history), (second, other) = weights
    torch.testing.assert_close(first, second)
    assert history[0]['mean_sample_margin'] == pytest.approx(other[0]['mean_sample_margin'], abs=1e-6)
    assert history[0]['class_sample_margins'][1] == inf


@pytest.mark.parametrize('model', [
    lambda: Branches(nn.Linear(D, K), out=lambda x: x / .1), lambda: Branches(CosineLinear(D, K), out=torch.relu),
    lambda: Branches(nn.Linear(D, K), CosineLinear(D, K), out=lambda x: 2 * x), nn.ReLU,
    lambda: Branches(nn.Linear(D, K), out=lambda x: dict(logits=x))])
def test_what_is_not_clear_is_an_error_that_names_candidates(model):
    model, (x, _) = model(), data().train.one_batch()
    with pytest.raises(ValueError, match='head= must say which layer .* candidates: ') as error: find_head(model, x)
    if isinstance(model, Branches): assert 'head (' in str(error.value) and 'projector (Linear)' in str(error.value)


def test_a_model_without_inputs():
    model = network()
    assert find_head(model) is model[-1] and find_head(nn.Sequential(nn.ReLU(), model)) is model[-1]
    assert find_head(nn.DataParallel(model)) is model[-1] and find_head(torch.compile(model)) is model[-1]
    only = Branches(CosineLinear(D, K))
    assert find_head(only) is only.head
    for unclear in (Branches(nn.Linear(D, K)), Branches(CosineLinear(D, K), CosineLinear(D, K))):
        with pytest.raises(ValueError, match='head='): find_head(unclear)


def test_a_given_head_is_a_layer_of_the_model():
    learn = learner()
    learn.model = Branches(nn.Linear(D, K), out=lambda x: x / .1)
    for wrong in (nn.Linear(D, K), network()[-1]):
        with pytest.raises(ValueError, match='must be a layer of the model'):
            quiet(learn, learn.fit, 1, cbs=ZeroCentroidRegularizer(head=wrong))
    learn.loss_func = CrossEntropyLossFlat()
    quiet(learn, learn.fit, 1, cbs=[SampleMarginRegularizer(head=learn.model.head), MarginRecorder(learn.model.head)])
    wide = learner('linear')
    wide.model = nn.Sequential(nn.Linear(8, K + 2))
    with pytest.raises(ValueError, match=f'the {K} classes of the data'):
        quiet(wide, wide.fit, 1, cbs=MarginRecorder())


@pytest.mark.parametrize('wrap', [lambda loss: loss, lambda loss: partial(loss), lambda loss: lambda p, y: loss(p, y),
                                  lambda loss: Wrapped(loss)])
@pytest.mark.parametrize('model', [lambda: Branches(nn.Linear(D, K)),
                                   lambda: Branches(CosineLinear(D, K), out=lambda x: 9 * x)])
def test_logits_for_a_loss_on_cosines_are_refused_on_a_gpu_too(wrap, model, monkeypatch):
    "Where the loss does not look at values, as on a GPU."
    monkeypatch.setattr(checks, 'values_are_cheap', lambda x: False)
    learn = learner(loss=wrap(CosFaceLoss(20., .1)))
    learn.model = model()
    with torch.no_grad(): learn.model.head.weight.mul_(9)
    with pytest.raises(ValueError, match='must return cosines for CosFaceLoss'):
        quiet(learn, learn.fit, 1, cbs=SampleMarginRegularizer())


class Wrapped(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, cosines, targets): return self.loss(cosines, targets) + 1


def test_the_loss_inside():
    loss = CosFaceLoss(20., .1)
    class Attribute:
        def __init__(self): self.base = loss
        def __call__(self, p, y): return self.base(p, y)
    class Slot:
        __slots__ = ('base',)
        def __init__(self): self.base = loss
        def __call__(self, p, y): return self.base(p, y)
    class OfClass:
        base = loss
        def __call__(self, p, y): return self.base(p, y)
    class Around(nn.Module):
        def forward(self, p, y): return loss(p, y)
    def by_keyword(p, y, *, base=loss): return base(p, y)
    for whole in (loss, Wrapped(loss), partial(Wrapped(loss)), lambda p, y: loss(p, y), Attribute(), loss.forward,
                  nn.ModuleDict(dict(a=nn.ModuleList([loss]))), lambda p, y, base=loss: base(p, y), by_keyword, Slot(),
                  OfClass(), Around(), torch.compile(lambda p, y: loss(p, y), backend='eager')):
        assert find_loss(whole) is loss, whole
    for other in (F.cross_entropy, CrossEntropyLossFlat(), nn.MSELoss(), lambda p, y: p.sum()):
        assert find_loss(other) is None, other


def test_meaningless_arguments():
    for reduction in ('sum', 'none', 'average'):
        with pytest.raises(ValueError, match='reduction must be'): SampleMarginRegularizer(reduction=reduction)
    for kind in (SampleMarginRegularizer, ZeroCentroidRegularizer):
        for weight, error in ((-1, ValueError), (float('inf'), ValueError), ('1', TypeError), (True, TypeError)):
            with pytest.raises(error, match='weight must be'): kind(weight)
        assert kind(np.float32(2)).weight == kind(torch.tensor(2)).weight == 2
    for start, error in ((1.5, TypeError), (-1, ValueError), (True, TypeError)):
        with pytest.raises(error, match='start_epoch must be'): DeferredReweighting(COUNTS, start)
    assert DeferredReweighting(COUNTS, np.int64(3)).start_epoch == 3
    with pytest.raises(ValueError, match='most_classes'): MarginRecorder(most_classes=0)
    for cb, name, wrong in ((SampleMarginRegularizer(), 'weight', -1), (ZeroCentroidRegularizer(), 'weight', '1'),
                            (MarginRecorder(), 'most_classes', 0), (DeferredReweighting(COUNTS, 1), 'start_epoch', -1),
                            (Checkpoint('file'), 'every', 0)):
        with pytest.raises((TypeError, ValueError), match=f'^{name} must be'): setattr(cb, name, wrong)


def test_the_class_margin_is_left_out_above_most_classes():
    for most, measured in ((K, True), (K - 1, False)):
        learn = Learner(data(), network(), CosFaceLoss(20., .1), cbs=[MarginRecorder(most_classes=most)])
        quiet(learn, learn.validate)
        seen = learn.margin_recorder.latest
        assert np.isfinite([seen['class_margin'], seen['bound']]).tolist() == 2 * [measured]
        assert np.isfinite(seen['mean_sample_margin']) and len(seen['class_sample_margins']) == K


# Classes shared out over processes

def _sharded(rank):
    torch.manual_seed(0)
    head = ShardedMarginHead(D, K, CosFaceLoss(20., .1))
    model = MarginModel(nn.Linear(8, D), head)
    assert find_head(model) is head
    learn = Learner(data(), model, head.loss, metrics=accuracy, cbs=[MarginRecorder(), SampleMarginRegularizer()])
    quiet(learn, learn.validate)
    with pytest.raises(ValueError, match='must see all classes'):
        quiet(learn, learn.fit, 1, cbs=ZeroCentroidRegularizer())
    return learn.margin_recorder.latest['class_margin'], degrees(class_margin(head.full_weight())), len(head.weight)


def test_a_sharded_head_is_measured_as_a_whole():
    (first, true, rows), (second, also, others) = returned(run_on_ranks(_sharded, 2, seconds=120))
    assert rows + others == K and first == second == pytest.approx(true) == pytest.approx(also)


def test_the_optimum_that_is_known_in_spite_of_callbacks():
    class Term(HeadCallback): moves_optimum = True
    loss = CosFaceLoss(20., .1)
    assert solvable_loss(loss, [ZeroCentroidRegularizer(1.), HeadCallback()]) is loss
    assert solvable_loss(loss, [Term()]) is solvable_loss(F.cross_entropy, []) is None
    with_term = solvable_loss(Wrapped(loss), [SampleMarginRegularizer(.5)])
    assert (with_term.sample_margin, loss.sample_margin) == (.5, 0)
    assert has_optimum(with_term, [5] * K, D) and not has_optimum(with_term, [4, *[5] * (K - 1)], D)
