"margin_learner with every kind of body, on real digits, through fastai's own tools."
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from fastai.callback.core import (
    Callback,
    CancelBatchException,
    CancelFitException,
    CancelTrainException,
    CancelValidException,
    event,
)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.interpret import ClassificationInterpretation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import create_body
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import interpolate
from torchvision.models import mobilenet_v3_small, resnet18

from largest_margins import learner
from largest_margins.callbacks import MarginRecorder, SampleMarginRegularizer
from largest_margins.codes import simplex
from largest_margins.data import imbalanced_indices, load
from largest_margins.heads import CosineLinear
from largest_margins.learner import ConvBody, class_counts, margin_learner, margin_neck, recommended_loss
from largest_margins.losses import (
    ArcFaceLoss,
    CosFaceLoss,
    FocalLoss,
    LDAMLoss,
    LMSoftmaxLoss,
    NormFaceLoss,
    SampleMarginLoss,
)
from largest_margins.margins import class_margin, sample_margins

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
    torchvision_pooled_otherwise=lambda: (mobilenet_v3_small, 576),
    timm=lambda: ('resnet10t', 512),
    timm_transformer=lambda: ('test_vit', 64),
    users_module=lambda: (nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU()), 24),
    users_maps=lambda: (nn.Conv2d(1, 12, 3), 12))


@pytest.mark.parametrize('body', BODIES)
def test_any_body(dls, body):
    arch, d = BODIES[body]()
    data = dls
    if body == 'timm_transformer': data = enlarged(160)
    learn = margin_learner(data, arch, CosFaceLoss(20., .1), lr=1e-3)
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


def enlarged(size):
    "Eight digits, enlarged to what a transformer expects."
    def grow(images): return interpolate(images[:8].float(), size).to(images.dtype)
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
    assert type(head) is (CosineLinear if cosines else nn.Linear)
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
    learn = margin_learner(dls, resnet18, CosFaceLoss(), opt_func=SGD)
    learn.create_opt()
    assert len(learn.opt.param_lists) >= 2
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


# On a CPU

@pytest.mark.parametrize('has_bfloat16', [True, False])
@pytest.mark.parametrize('body', ['ours', 'torchvision', 'timm_transformer', 'users_module'])
def test_fast_on_a_cpu_where_it_is_safe(dls, body, has_bfloat16, monkeypatch):
    monkeypatch.setattr(learner, 'has_bfloat16', lambda: has_bfloat16)
    data, (arch, _) = enlarged(160) if body == 'timm_transformer' else dls, BODIES[body]()
    def mixed(**kwargs): return hasattr(margin_learner(data, arch, CosFaceLoss(), **kwargs), 'mixed_precision_cpu')
    assert mixed() == (has_bfloat16 and body != 'users_module')
    assert mixed(mixed_precision=True) and not mixed(mixed_precision=False)
    model = margin_learner(data, arch, CosFaceLoss(), mixed_precision=False).model
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
    assert counts[0] // counts[-1] == 10 and isinstance(learn.loss_func, NormFaceLoss)
    cosines, targets = torch.rand(5, 10), torch.arange(5)
    expected = F.cross_entropy(20 * cosines + counts.log(), targets)
    torch.testing.assert_close(learn.loss_func(cosines, targets), expected)
    assert not learn.model[-1].weight.requires_grad
    assert class_margin(learn.model[-1].weight).rad2deg().item() == pytest.approx(96.379, abs=1e-3)
    free = margin_learner(dls, ConvBody(), embedding=4)  # ten prototypes have no simplex in four dimensions
    assert free.model[-1].weight.requires_grad


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
