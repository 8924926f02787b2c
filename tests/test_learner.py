"margin_learner with every kind of body, on real digits, through fastai's own tools."
import warnings
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
import torchvision
from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelFitException,
    CancelTrainException,
    CancelValidException,
    event,
)
from fastai.callback.data import CollectDataCallback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import Normalize
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.losses import BaseLoss, CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.vision.core import imagenet_stats
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import create_body, vision_learner
from fastcore.foundation import L
from pairs import pairs
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import interpolate
from torch.utils._pytree import tree_leaves
from torchvision.models import ResNet18_Weights, mobilenet_v3_small, resnet18

from largest_margins import learner
from largest_margins.callbacks import (
    Checkpoint,
    DeferredReweighting,
    MarginRecorder,
    SampleMarginRegularizer,
    ZeroCentroidRegularizer,
)
from largest_margins.codes import simplex
from largest_margins.data import imbalanced_indices, load
from largest_margins.heads import CosineLinear, MarginHead
from largest_margins.learner import class_counts, margin_learner, margin_neck, recommended_loss
from largest_margins.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CosFaceLoss,
    ElasticFaceLoss,
    FocalLoss,
    LDAMLoss,
    LMSoftmaxLoss,
    NormFaceLoss,
    SampleMarginLoss,
)
from largest_margins.margins import sample_margins
from largest_margins.training.bodies import ConvBody

DIGITS = load('digits')


@pytest.fixture
def dls():
    return DIGITS.subset(torch.arange(256)).dataloaders(batch_size=64, seed=0)


def quiet(learn, f, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args, **kwargs)


BODIES = dict(
    ours=lambda: (ConvBody(), 128),
    torchvision=lambda: (resnet18, 512),
    torchvision_deeper_head=lambda: (mobilenet_v3_small, 1024),
    timm=lambda: ('resnet10t', 512),
    timm_transformer=lambda: ('test_vit', 64),
    users_module=lambda: (nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU()), 24),
    users_maps=lambda: (nn.Conv2d(1, 12, 3), 12))
RANDOM = {body: {} if body in ('ours', 'users_module', 'users_maps') else dict(pretrained=False) for body in BODIES}


@pytest.mark.parametrize('body', BODIES)
def test_any_body(dls, body):
    arch, d = BODIES[body]()
    data = enlarged(160) if body == 'timm_transformer' else dls
    learn = margin_learner(data, arch, CosFaceLoss(20., .1), lr=1e-3, **RANDOM[body])
    assert isinstance(learn.model[-1], CosineLinear) and learn.model[-1].weight.shape == (10, d)
    x = learn.dls.valid.one_batch()[0]
    with torch.no_grad(): features = learn.model[:-1].train()(x)
    assert features.shape == (len(x), d) and (features < 0).any()
    before = [p.clone() for p in learn.model.parameters()]
    quiet(learn, learn.fit, 1)
    moved = [not torch.equal(a, b) for a, b in zip(before, learn.model.parameters(), strict=True)]
    assert all(moved), 'part of the model is not trained'
    history = learn.margin_recorder.history
    assert len(history) == 1 and 0 < history[0]['class_margin'] <= history[0]['bound']


def enlarged(size, channels=1):
    "Eight digits, enlarged to what a transformer expects."
    def grow(images): return interpolate(images[:8].float(), size).to(images.dtype).expand(-1, channels, -1, -1)
    small = replace(DIGITS, train_images=grow(DIGITS.train_images), train_targets=DIGITS.train_targets[:8],
                    test_images=grow(DIGITS.test_images), test_targets=DIGITS.test_targets[:8])
    return small.dataloaders(batch_size=8, seed=0)


@pytest.mark.parametrize('loss,cosines', [
    (NormFaceLoss(), True), (ArcFaceLoss(), True), (LDAMLoss([9] * 10), True), (LMSoftmaxLoss(), True),
    (SampleMarginLoss(), True), (FocalLoss(), False), (CrossEntropyLossFlat(), False),
    (nn.CrossEntropyLoss(label_smoothing=.1), False)], ids=repr)
def test_the_head_fits_the_loss(dls, loss, cosines):
    learn = margin_learner(dls, ConvBody(), loss, embedding=16)
    head = learn.model[-1]
    assert type(head) is (MarginHead if cosines else nn.Linear)
    assert head.in_features == 16 and getattr(head, 'bias', None) is None
    quiet(learn, learn.fit, 1, 1e-3)
    assert learn.recorder.losses[-1].isfinite()


def test_a_body_comes_back_as_it_was(dls):
    body = ConvBody()
    statistics = [b.clone() for b in body.buffers()]
    learn = margin_learner(dls, body, CosFaceLoss())
    assert learn.model[0] is body and body.training
    assert all(torch.equal(a, b) for a, b in zip(statistics, body.buffers(), strict=True))


def test_layer_groups_and_freezing(dls):
    learn = margin_learner(dls, resnet18, CosFaceLoss(), opt_func=SGD, pretrained=False)
    learn.create_opt()
    theirs = vision_learner(dls, resnet18, n_out=10, n_in=1, pretrained=False, loss_func=nn.CrossEntropyLoss())
    theirs.create_opt()
    sizes, theirs = ([sum(p.numel() for p in group) for group in of.opt.param_lists] for of in (learn, theirs))
    assert sizes[:-1] == theirs[:-1] and len(sizes) == 3
    learn.freeze()
    groups = learn.opt.param_lists
    assert learn.opt.frozen_idx == len(groups) - 1
    head = learn.model[-1].weight
    assert head.requires_grad and any(p is head for p in groups[-1])
    first = next(m for m in learn.model[0].modules() if isinstance(m, nn.Conv2d)).weight
    assert not first.requires_grad


def test_fixed_prototypes_stay(dls):
    learn = margin_learner(dls, ConvBody(), LMSoftmaxLoss(20.), embedding=12, cbs=SampleMarginRegularizer())
    learn.model[-1].fix(simplex(10, 12))
    before = learn.model[-1].weight.clone()
    quiet(learn, learn.fit, 2, 1e-3)
    assert torch.equal(learn.model[-1].weight, before)
    assert learn.margin_recorder.history[-1]['class_margin'] == pytest.approx(96.3793702, abs=1e-4)


# Families

FAMILIES = dict(
    resnet18='fc', densenet121='classifier', vgg11_bn='classifier.6', alexnet='classifier.6',
    squeezenet1_1='classifier.1', mobilenet_v2='classifier.1', mobilenet_v3_small='classifier.3',
    efficientnet_b0='classifier.1', efficientnet_v2_s='classifier.1', convnext_tiny='classifier.2',
    vit_b_32='heads.head', swin_t='head', swin_v2_t='head', maxvit_t='classifier.5', shufflenet_v2_x0_5='fc',
    mnasnet0_5='classifier.1', regnet_y_400mf='fc', googlenet='fc aux1 aux2', inception_v3='fc AuxLogits')
OF_TIMM = dict(
    test_vit='head', deit_tiny_patch16_224='head', deit_tiny_distilled_patch16_224='head head_dist',
    swin_tiny_patch4_window7_224='head.fc', test_convnext='head.fc', test_efficientnet='classifier', resnet10t='fc',
    efficientvit_m0='head.linear', volo_d1_224='head aux_head')
OF_TWO = 'deit_tiny_distilled_patch16_224', 'volo_d1_224'  # scores of two classifiers, added


@pytest.fixture
def repeated_weights(monkeypatch):
    "Large weights begin as a few thousand random numbers, again and again: a hundred million take seconds."
    def repeating(fill):
        def filled(self, *args, **kwargs):
            if self.numel() < 5000 or not self.is_contiguous(): return fill(self, *args, **kwargs)
            some = fill(self.new_empty(4999), *args, **kwargs)
            return self.copy_(some.repeat(self.numel() // 4999 + 1)[:self.numel()].view_as(self))
        return filled
    for name in ('uniform_', 'normal_'):
        monkeypatch.setattr(torch.Tensor, name, repeating(getattr(torch.Tensor, name)))


@pytest.mark.parametrize('name', [*FAMILIES, *OF_TIMM])
@pytest.mark.usefixtures('repeated_weights')
@pytest.mark.filterwarnings('ignore:The default weight initialization')
def test_the_body_is_the_whole_classifier_without_its_last_layer(name):
    "Every parameter, and the features that the classifier saw; what else is left out is said."
    arch = name if name in OF_TIMM else getattr(torchvision.models, name)
    usual = 224 if name.endswith('224') else 64
    size = dict(vit_b_32=224, maxvit_t=224, test_vit=160, inception_v3=96).get(name, usual)
    whole = timm.create_model(name) if name in OF_TIMM else arch(weights=None)
    classifier, *others = (FAMILIES | OF_TIMM)[name].split()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        learn = margin_learner(enlarged(size, channels=3), arch, CosFaceLoss(), pretrained=False)
    said = [str(w.message) for w in caught if 'leaves out' in str(w.message)]
    assert len(said) == bool(others) and all(other in said[0] for other in others)
    kept = [p for n, p in whole.named_parameters() if not n.startswith((f'{classifier}.', *others))]
    parameters = list(learn.model[0].parameters())
    assert [p.shape for p in parameters] == [p.shape for p in kept]
    for p, q in zip(parameters, kept): p.data = q.data
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        features = learn.model[0].eval()(x)
        if name == 'densenet121': features = features.relu()  # fastai's cut comes before it
        if name not in ('squeezenet1_1', *OF_TWO):
            if features.ndim == 4: features = features.mean((2, 3))
            scores = whole.get_submodule(classifier)(features)
            torch.testing.assert_close(scores, whole.eval()(x), rtol=1e-3, atol=1e-4)
        assert learn.model.train()(x).shape == (2, 10)


def test_what_is_no_classifier_is_refused(dls):
    class Averaged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 9), nn.Linear(64, 9)
        def forward(self, x): return (self.a(x.flatten(1)) + self.b(x.flatten(1))) / 2
    def scaled(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Hardtanh(inplace=True))
    for arch in (Averaged, ConvBody, scaled):
        with pytest.raises(ValueError, match=r'whose output is that of one layer, .* cut='):
            margin_learner(dls, arch, CosFaceLoss(), pretrained=False)
    assert margin_learner(dls, scaled, CosFaceLoss(), pretrained=False, cut=1).model[-1].in_features == 64


@pytest.mark.parametrize('n_in', [1, 2, 4])
def test_channels_as_in_fastai(n_in):
    def arch(pretrained):
        torch.manual_seed(0)
        return resnet18(weights=None)
    images = torch.randint(256, (8, n_in, 32, 32), dtype=torch.uint8)
    data = replace(DIGITS, train_images=images, train_targets=DIGITS.train_targets[:8], test_images=images,
                   test_targets=DIGITS.train_targets[:8]).dataloaders(8)
    learn = margin_learner(data, arch, CosFaceLoss(), pretrained=True)
    theirs = create_body(arch(True), n_in=n_in, pretrained=True, cut=-2)
    assert torch.equal(learn.model[0].conv1.weight, theirs[0].weight)
    with pytest.raises(ValueError, match=f'n_in must be {n_in}'): margin_learner(data, arch, CosFaceLoss(), n_in=3)


def test_cut_and_splitter(dls):
    def halves(model): return [list(model[0][:6].parameters()), [*model[0][6:].parameters(), *model[1:].parameters()]]
    learn = margin_learner(dls, resnet18, CosFaceLoss(), pretrained=False, cut=-3, splitter=halves)
    learn.create_opt()
    assert learn.model[-1].in_features == 256 and len(learn.opt.param_lists) == 2
    for wrong in (lambda m: [list(m[0].parameters())], lambda m: [list(m.parameters()), list(m[2].parameters())]):
        with pytest.raises(ValueError, match='each of 6[0-9] parameters into one group'):
            margin_learner(dls, resnet18, CosFaceLoss(), pretrained=False, splitter=wrong)


# Published weights

@pytest.mark.parametrize('weights', [None, ResNet18_Weights.IMAGENET1K_V1, 'IMAGENET1K_V1'])
def test_published_weights_are_the_default_and_frozen_first(weights, monkeypatch):
    published = resnet18(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', lambda *a, **k: published)
    learn = margin_learner(enlarged(64, channels=3), resnet18, CosFaceLoss(), weights=weights)
    assert torch.equal(learn.model[0][0].weight, published['conv1.weight'])
    assert learn.opt.frozen_idx == len(learn.opt.param_lists) - 1 and not learn.model[0][0].weight.requires_grad
    x = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    seen, = next(iter(learn.dls.test_dl(x)))
    torch.testing.assert_close(seen[0, :, 0, 0], -torch.tensor(imagenet_stats[0]) / torch.tensor(imagenet_stats[1]))


@pytest.mark.parametrize('normalize', [True, False])
def test_published_weights_normalise_fastais_batches(normalize, tmp_path):
    for name in 'ab':
        (tmp_path/name).mkdir()
        for i in range(4): Image.new('RGB', (32, 32)).save(tmp_path/name/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.5, seed=0, bs=2, num_workers=0, device='cpu')
    resnet10t = partial(timm.create_model, 'resnet10t')
    def arch(pretrained): return resnet10t(pretrained=False)
    learn = margin_learner(dls, arch, CosFaceLoss(), pretrained=True, normalize=normalize)
    added = [f for f in learn.dls.after_batch.fs if isinstance(f, Normalize)]
    assert len(added) == normalize
    if normalize: assert added[0].mean.flatten().tolist() == pytest.approx(arch(False).pretrained_cfg['mean'])


@pytest.mark.parametrize('arch', [resnet18, 'resnet10t'])
def test_weights_that_cannot_be_had(arch, dls, monkeypatch):
    def offline(*args, **kwargs): raise URLError('no network')
    monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', offline)
    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(OSError, match=r'cannot be had .*no network.*pretrained=False'):
        margin_learner(dls, arch, CosFaceLoss())


def test_meaningless_arguments(dls):
    loss = CosFaceLoss()
    for kwargs in (dict(pretrained=True), dict(weights='DEFAULT')):
        with pytest.raises(ValueError, match='a module: it has its weights'):
            margin_learner(dls, ConvBody(), loss, **kwargs)
    with pytest.raises(ValueError, match='weights must be None'):
        margin_learner(dls, resnet18, loss, weights='DEFAULT', pretrained=False)
    with pytest.raises(ValueError, match=r"'name.tag'"): margin_learner(dls, 'resnet10t', loss, weights='DEFAULT')
    with pytest.raises(ValueError, match='no published weights'): margin_learner(dls, ConvBody, loss)
    for embedding, error in ((0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError), ('8', TypeError)):
        with pytest.raises(error, match='embedding must be'):
            margin_learner(dls, ConvBody(), loss, embedding=embedding)
    assert margin_learner(dls, ConvBody(), loss, embedding=np.int64(8)).model[-1].in_features == 8
    for kwargs in (dict(n_in=0), dict(widths=()), dict(widths=(8, -1))):
        with pytest.raises(ValueError, match='must'): ConvBody(**kwargs)
    with pytest.raises(TypeError, match='must be a loss, got the class'): margin_learner(dls, ConvBody(), CosFaceLoss)


# The loop

@pytest.mark.parametrize('cancel', [None, 'batch', 'train', 'validate', 'fit'])
def test_events_come_in_fastais_order(dls, cancel):
    "Every callback that defines an event gets it, in the order of fastai's own Learner."
    def events(kind):
        seen = []
        class Late(Callback):
            order = 7
            def before_epoch(self): seen.append('late before_epoch')
            def after_fit(self): seen.append(f'late after_fit {self.run}')
        class Early(Callback):
            order = -7
            def before_epoch(self): seen.append('early before_epoch')
            def before_batch(self):
                if cancel == 'batch': raise CancelBatchException
            def before_train(self):
                if cancel == 'train': raise CancelTrainException
            def before_validate(self):
                if cancel == 'validate': raise CancelValidException
                self.run = False
            def after_loss(self):
                if cancel == 'fit': raise CancelFitException
            def after_fit(self): seen.append('early after_fit')
        given = {name: partial(lambda cb, name: seen.append(name), name=name) for name in every_event}
        learn = kind(dls, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.CrossEntropyLoss(),
                     cbs=[Late(), Callback(**given), Early()])
        quiet(learn, learn.fit, 2)
        quiet(learn, learn.validate)
        return seen, [cb.run for cb in learn.cbs]
    every_event = [name for name in vars(event) if name.startswith(('before', 'after'))]
    ours, theirs = events(learner.MarginLearner), events(Learner)
    assert ours == theirs and len(ours[0]) > 20


# The head gets its targets

class Asks(Callback):
    "A callback that looks at the prediction, so that it must be there."
    def after_pred(self): self.shape = self.learn.pred.shape


@contextmanager
def calls(learn):
    "What the head is called with in training: 'targets' or 'features' alone."
    seen = []
    def note(head, args):
        if head.training: seen.append('targets' if len(args) == 2 else 'features')
    hook = learn.model[-1].register_forward_pre_hook(note)
    try: yield seen
    finally: hook.remove()


def small(loss, cbs=(), **kwargs):
    torch.manual_seed(0)
    dls = DIGITS.subset(torch.arange(512)).dataloaders(128, seed=0)
    return margin_learner(dls, ConvBody(1, (8, 8)), loss, embedding=8, cbs=list(cbs), **kwargs)


REGULARISED = dict(
    alone=list, r_sm=lambda: [SampleMarginRegularizer()], centroid=lambda: [ZeroCentroidRegularizer()],
    reweighted=lambda: [DeferredReweighting(range(1, 11), 0, .9)],
    accumulated=lambda: [GradientAccumulation(256), SampleMarginRegularizer()])
TRAINED = dict(arc=lambda: ArcFaceLoss(20., .1), ldam=lambda: LDAMLoss(range(1, 11)),
               lm=lambda: LMSoftmaxLoss(20., 'logsumexp'), r_sm=SampleMarginLoss,
               prior=lambda: NormFaceLoss(20., prior=torch.arange(1., 11)),
               class_mean=lambda: CosFaceLoss(20., .1, reduction='class-mean'))


class Gradients(Callback):
    "Keeps the gradients of each step, for which it needs no cosines."
    order = 90
    def reads_pred(self, loss): return False
    def before_fit(self): self.steps = []
    def before_step(self):
        grads = [p.grad.flatten() for p in self.learn.model.parameters() if p.grad is not None]
        self.steps.append(torch.cat([self.learn.loss_grad.detach()[None], *grads]))


@pytest.mark.parametrize('cbs,loss', [*((cbs, 'arc') for cbs in REGULARISED), *(('r_sm', loss) for loss in TRAINED)])
def test_training_with_targets_is_training_with_cosines(cbs, loss):
    "The same loss and gradients, whether the head computes the loss or somebody wants to see cosines."
    ends = []
    for asks in (False, True):
        learn = small(TRAINED[loss](), [*REGULARISED[cbs](), Gradients(), *[Asks()] * asks], mixed_precision=False)
        alone = loss == 'class_mean'  # R_sm is another mean: the term stands beside the loss
        with calls(learn) as seen: quiet(learn, learn.fit, 1, 1e-3)
        assert set(seen) == {'features' if asks or alone else 'targets'}
        ends.append(learn.gradients.steps)
        assert learn.loss_func.weight is None and learn.loss_func.sample_margin == float(loss == 'r_sm')
    got, true = (steps[0] for steps in ends)  # later ones differ by what rounding makes of ties
    assert (got - true).norm() < 1e-5 * true.norm() and len(ends[0]) == len(ends[1])


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([CosFaceLoss(20., .1), SampleMarginLoss()])

    def forward(self, cosines, targets): return sum(part(cosines, targets) for part in self.parts)


def wrapped():
    loss = CosFaceLoss(20., .1)
    return dict(module=Sum(), partial=partial(loss), function=lambda p, y: 2 * loss(p, y),
                base=BaseLoss(CosFaceLoss, scale=20.), method=loss.forward)


@pytest.mark.parametrize('kind', wrapped())
def test_a_wrapped_loss_gets_cosines(kind):
    learn = small(wrapped()[kind], [SampleMarginRegularizer()])
    assert isinstance(learn.model[-1], MarginHead)
    with calls(learn) as seen: quiet(learn, learn.fit, 1, 1e-2)
    assert set(seen) == {'features'} and -2 <= learn.margin_recorder.latest['min_sample_margin'] <= 2


@pytest.mark.parametrize('change', [
    lambda learn: setattr(learn, 'loss_func', ArcFaceLoss(20., .1)),
    lambda learn: setattr(learn.loss_func, 'label_smoothing', .1),
    lambda learn: setattr(learn.recorder, 'train_metrics', True),
    lambda learn: learn.add_cb(MixUp()), lambda learn: learn.add_cb(CutMix()),
    lambda learn: learn.add_cb(CollectDataCallback()),
    lambda learn: learn.add_cb(Callback(after_loss=lambda self: self.learn.pred.sum()))])
def test_cosines_where_they_are_asked_for(change):
    learn = small(CosFaceLoss(20., .1))
    change(learn)
    with calls(learn) as seen: quiet(learn, learn.fit, 1, 1e-2)
    assert set(seen) == {'features'} and learn.recorder.losses[-1].isfinite()


@pytest.mark.parametrize('loss', [AdaFaceLoss(20.), ElasticFaceLoss(20.)], ids=repr)
def test_losses_with_numbers_of_each_sample(loss):
    learn = small(loss)
    quiet(learn, learn.fit, 2, 1e-2)
    *_, targets, losses = quiet(learn, learn.get_preds, with_loss=True)
    assert losses.shape == targets.shape and losses.isfinite().all()
    assert losses.mean().item() == pytest.approx(quiet(learn, learn.validate)[0], rel=.02)
    norms = 20. if isinstance(loss, AdaFaceLoss) else None
    assert norms is None or loss.norm_mean.item() < norms, 'the statistics follow the norms'


def test_very_many_classes(monkeypatch):
    "The same table without cosines; predictions are the nearest classes."
    def table():
        learn = small(CosFaceLoss(20., .1), [SampleMarginRegularizer()], mixed_precision=False)
        quiet(learn, learn.fit, 2, 1e-2)
        return learn, list(learn.recorder.values[-1])
    learn, dense = table()
    cosines, targets = quiet(learn, learn.get_preds, act=lambda x: x)
    monkeypatch.setattr(learner, 'MANY_CLASSES', 5)
    many, values = table()
    assert values == pytest.approx(dense, rel=1e-5, abs=1e-6)
    assert list(many.recorder.metric_names) == list(learn.recorder.metric_names)
    (nearest, classes), also = quiet(many, many.get_preds)
    assert torch.equal(classes[:, 0], cosines.argmax(1)) and torch.equal(also, targets)
    torch.testing.assert_close(nearest[:, 0], cosines.amax(1))
    (_, unknown), _ = quiet(many, many.get_preds, dl=many.dls.test_dl(DIGITS.test_images[:20]))
    assert torch.equal(unknown[:, 0], cosines.argmax(1)[:20])
    assert many.features is None


@pytest.mark.parametrize('error, place, loss', pairs(
    [RuntimeError, KeyboardInterrupt, CancelBatchException, CancelFitException],
    [0, 2, 'before_batch', 'after_pred', 'after_loss'], [CosFaceLoss, nn.CrossEntropyLoss]))
def test_nothing_is_left_behind(error, place, loss):
    "Wherever a batch ends: in the body, in the head, or in another callback."
    def fail(*_):
        if learn.training and learn.iter == 1: raise error('no')
    cbs = [SampleMarginRegularizer(), ZeroCentroidRegularizer(), DeferredReweighting(range(1, 11), 0)]
    learn, failing = small(loss(), cbs), []
    if isinstance(place, str): learn.add_cb(Callback(**{place: fail}))
    else: failing.append(learn.model[place].register_forward_pre_hook(fail))
    try: quiet(learn, learn.fit, 1)
    except (RuntimeError, KeyboardInterrupt): assert error in (RuntimeError, KeyboardInterrupt)
    for hook in failing: hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks or 'forward' in vars(m) for m in learn.model.modules())
    assert learn.loss_func.weight is None and getattr(learn.loss_func, 'sample_margin', 0) == 0
    held = [x.shape for cb in cbs[:2] for x in tree_leaves(vars(cb)) if isinstance(x, torch.Tensor) and x.ndim > 1]
    assert not held
    assert learn.features is None
    learn.remove_cbs(L(learn.cbs).filter(lambda cb: cb.name == 'callback'))
    quiet(learn, learn.fit, 1)


@pytest.mark.parametrize('loss', [lambda: CosFaceLoss(20., .1), nn.CrossEntropyLoss])
def test_compiled_it_trains_the_same(loss):
    rows = []
    for compiled in (False, True):
        learn = small(loss(), [SampleMarginRegularizer()], mixed_precision=False)
        learn.create_opt()
        if compiled: learn.model = torch.compile(learn.model, backend='eager')
        quiet(learn, learn.fit, 1, 1e-2)
        rows.append(list(learn.recorder.values[-1]))
    assert rows[0] == pytest.approx(rows[1], rel=1e-4, abs=1e-5)


WITH = dict(
    one_cycle=lambda learn: learn.fit_one_cycle(2, 1e-2), fine_tune=lambda learn: learn.fine_tune(1, 1e-2),
    lr_find=lambda learn: learn.lr_find(num_it=4, show_plot=False), fp16=lambda learn: learn.to_fp16().fit(1),
    bf16=lambda learn: learn.to_bf16().fit(1), mixup=lambda learn: learn.fit(1, cbs=[MixUp()]),
    cutmix=lambda learn: learn.fit(1, cbs=[CutMix()]), clip=lambda learn: learn.fit(1, cbs=[GradientClip()]),
    stopping=lambda learn: learn.fit(3, cbs=[EarlyStoppingCallback('class_margin°', comp=np.greater, min_delta=90)]),
    saving=lambda learn: learn.fit(2, cbs=[SaveModelCallback('mean_sample_margin')]),
    checkpoint=lambda learn: learn.fit(2, cbs=[Checkpoint(learn.path/'point.pt')]),
    tta=lambda learn: tta(learn), summary=lambda learn: learn.summary(), ema=lambda learn: learn.fit(1, cbs=[EMA()]))


class EMA(Callback):
    "Averages the model as many do: on a deep copy."
    def before_fit(self): self.copy = deepcopy(self.learn.model)


def tta(learn):
    learn.dls.valid.dataset.set_split_idx = lambda i: nullcontext()
    scores, targets = learn.tta(n=2)
    assert scores.shape == (len(targets), 10)


@pytest.mark.parametrize('way', WITH)
@pytest.mark.parametrize('loss', [lambda: CosFaceLoss(20., .1), CrossEntropyLossFlat])
def test_works_with(way, loss, tmp_path):
    learn = small(loss(), [SampleMarginRegularizer(), DeferredReweighting(range(1, 11), 1)], path=tmp_path,
                  metrics=learner.accuracy)
    quiet(learn, WITH[way], learn)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert len(quiet(learn, learn.validate)) == 8


# On a CPU

@pytest.mark.parametrize('has_bfloat16', [True, False])
@pytest.mark.parametrize('body', ['ours', 'torchvision', 'timm_transformer', 'users_module'])
def test_fast_on_a_cpu_where_it_is_safe(dls, body, has_bfloat16, monkeypatch):
    monkeypatch.setattr(learner, 'has_bfloat16', lambda: has_bfloat16)
    data, (arch, _) = enlarged(160) if body == 'timm_transformer' else dls, BODIES[body]()
    def made(**kwargs): return margin_learner(data, arch, CosFaceLoss(), **RANDOM[body], **kwargs)
    def mixed(**kwargs): return made(**kwargs).model.mixed_precision
    assert mixed() == (has_bfloat16 and body != 'users_module')
    assert mixed(mixed_precision=True) and not mixed(mixed_precision=False)
    model = made(mixed_precision=False).model
    images = [p for p in model.parameters() if p.ndim == 4]
    assert bool(images) == (body != 'users_module')
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in images)


def test_a_body_over_volumes_keeps_its_layout(dls):
    class Volumes(nn.Conv3d):
        def forward(self, x): return super().forward(x[:, None]).flatten(1)
    assert margin_learner(dls, Volumes(1, 2, (1, 8, 8)), CosFaceLoss()).model[0].weight.is_contiguous()


@pytest.mark.parametrize('mixed_precision', [True, False])
def test_the_same_seed_gives_the_same_weights(mixed_precision):
    def weights():
        torch.manual_seed(3)
        dls = DIGITS.subset(torch.arange(256)).dataloaders(batch_size=64, seed=3)
        learn = margin_learner(dls, ConvBody(), CosFaceLoss(), mixed_precision=mixed_precision)
        quiet(learn, learn.fit_one_cycle, 2, 1e-2)
        return learn.model.state_dict()
    a, b = weights(), weights()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_mixed_precision_learns_as_well():
    def reached(mixed_precision):
        torch.manual_seed(0)
        learn = margin_learner(DIGITS.dataloaders(batch_size=64, seed=0), ConvBody(), CosFaceLoss(20., .1),
                               embedding=16, mixed_precision=mixed_precision)
        quiet(learn, learn.fit_one_cycle, 3, 1e-2)
        return learn.recorder.values[-1][2], learn.margin_recorder.history[-1]['class_margin']
    (accuracy, margin), (mixed_accuracy, mixed_margin) = reached(False), reached(True)
    assert accuracy > .95 and mixed_accuracy > .95 and abs(margin - mixed_margin) < 5


def test_mixed_precision_is_for_the_cpu():
    elsewhere = DIGITS.dataloaders(batch_size=64, device='meta')
    with pytest.raises(ValueError, match='batches are on meta'):
        margin_learner(elsewhere, ConvBody(), CosFaceLoss(), mixed_precision=True)


def test_errors(dls):
    with pytest.raises(ValueError, match=r'\[N, d, h, w\], got \(2, 3, 4\)'): margin_neck((2, 3, 4))
    with pytest.raises(ValueError, match='arch must give features'):
        margin_learner(dls, nn.Unflatten(2, (2, 4)), CosFaceLoss())
    with pytest.raises(RuntimeError, match='resnet999'): margin_learner(dls, 'resnet999', CosFaceLoss())
    with pytest.raises(TypeError, match='arch must be a function'): margin_learner(dls, None, CosFaceLoss())
    nameless = DIGITS.dataloaders(batch_size=64)
    nameless.c, nameless.vocab = 0, []
    with pytest.raises(ValueError, match='number of classes'): margin_learner(nameless, ConvBody(), CosFaceLoss())


# fastai's own tools

@pytest.fixture
def trained(tmp_path):
    torch.manual_seed(0)
    dls = DIGITS.dataloaders(batch_size=64, seed=0)
    learn = margin_learner(dls, ConvBody(), CosFaceLoss(20., .1), embedding=16, path=tmp_path,
                           cbs=SampleMarginRegularizer())
    quiet(learn, learn.fit_one_cycle, 2, 1e-2)
    return learn


def test_predictions_are_probabilities_in_the_order_of_the_test_set(trained):
    accuracy = trained.recorder.values[-1][2]  # get_preds starts the recorder's table again
    probabilities, targets = quiet(trained, trained.get_preds)
    assert torch.equal(torch.as_tensor(targets), DIGITS.test_targets)
    assert torch.allclose(probabilities.sum(1), torch.ones(len(targets)), atol=1e-5)
    cosines, _ = quiet(trained, trained.get_preds, act=lambda x: x)
    assert torch.allclose(probabilities, (20 * cosines).softmax(1), atol=1e-6)
    reached = (cosines.argmax(1) == targets).float().mean().item()
    assert reached > .9 and reached == pytest.approx(accuracy, abs=1e-6)
    recorded = trained.margin_recorder.history[-1]['mean_sample_margin']
    assert sample_margins(cosines, targets).mean().item() == pytest.approx(recorded, abs=1e-5)


def test_losses_of_samples_and_interpretation(trained):
    *_, losses = quiet(trained, trained.get_preds, with_loss=True)
    assert losses.shape == (len(DIGITS.test_targets),)
    assert losses.mean().item() == pytest.approx(quiet(trained, trained.validate)[0], rel=1e-3)
    interpretation = quiet(trained, ClassificationInterpretation.from_learner, trained)
    confusion = interpretation.confusion_matrix()
    assert confusion.sum() == len(DIGITS.test_targets) and confusion.trace() > .9 * confusion.sum()
    top, _ = interpretation.top_losses(3)
    assert torch.allclose(torch.as_tensor(top), losses.topk(3).values, atol=1e-5)


def test_export_and_load(trained):
    batches = trained.dls.valid
    before, _ = quiet(trained, trained.get_preds, dl=batches)
    trained.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(trained.path/'export.pkl')
    after, _ = quiet(loaded, loaded.get_preds, dl=batches)
    assert torch.equal(before, after)
    assert isinstance(loaded.margin_recorder, MarginRecorder)
    assert loaded.margin_recorder.history == trained.margin_recorder.history


def test_save_and_load(trained):
    weight = trained.model[-1].weight.detach().clone()
    trained.save('kept')
    with torch.no_grad(): trained.model[-1].weight.zero_()
    trained.load('kept')
    assert torch.equal(trained.model[-1].weight, weight)


def test_create_body_is_a_body(dls):
    "A body that a user cut with fastai's own tool works as it is."
    learn = margin_learner(dls, create_body(resnet18(weights=None), n_in=1, pretrained=False), CosFaceLoss())
    assert learn.model[-1].in_features == 512


def test_the_recommended_loss_follows_the_training_counts():
    data = load('digits')
    dls = data.subset(imbalanced_indices(data.train_targets, 10)).dataloaders(64, device='cpu')
    learn = margin_learner(dls, ConvBody(), embedding=16)
    counts = torch.tensor(class_counts(dls), dtype=torch.float32)
    assert counts[0] // counts[-1] == 10 and isinstance(learn.loss_func, FocalLoss)
    logits, targets = torch.randn(5, 10), torch.arange(5)
    torch.testing.assert_close(learn.loss_func(logits, targets), F.cross_entropy(logits + counts.log(), targets))
    assert type(learn.model[-1]) is nn.Linear and learn.model[-1].weight.requires_grad
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.margin_recorder.history[0]['class_margin'] > 0


def test_the_recommended_loss_needs_every_class():
    data = load('digits')
    dls = data.subset(torch.nonzero(data.train_targets != 3)[:, 0]).dataloaders(64, device='cpu')
    with pytest.raises(ValueError, match='training item of each class, class 3 has none'): recommended_loss(dls)


def test_class_counts_of_a_data_block(tmp_path):
    for name, n in (('a', 3), ('b', 2)):
        (tmp_path/name).mkdir()
        for i in range(n): Image.new('L', (8, 8)).save(tmp_path/name/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path, valid_pct=.2, seed=0, bs=2, num_workers=0, device='cpu')
    assert sum(class_counts(dls)) == 4 and len(class_counts(dls)) == 2
    with pytest.raises(ValueError, match='neither targets nor tls'): class_counts(DataLoaders(DataLoader([1, 2])))
