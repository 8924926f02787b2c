"""A loss and a head of ours behave as torch's own: under transforms, in drawn graphs, with hooks, without float64.

And a loss that a user writes in a few lines runs everywhere where ours do.
"""
import math
import warnings

import pytest
import torch
from loss_family import ON_COSINES
from processes import returned, run_on_ranks
from torch import distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from largest_margins.engine.cosines import cosine_matrix
from largest_margins.heads import CosineLinear, MarginHead
from largest_margins.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CosFaceLoss,
    CosineLoss,
    ElasticFaceLoss,
    FocalLoss,
    LMSoftmaxLoss,
    MarginSoftmaxLoss,
    NormFaceLoss,
    SampleMarginLoss,
)
from largest_margins.margins import class_margin, class_sample_margins, min_sample_margin, norm_ratio, sample_margins
from largest_margins.regularizers import zero_centroid

N, D, K = 6, 3, 4
LOSSES = [*(row.make(4., range(K)) for row in ON_COSINES), AdaFaceLoss(4.).eval(),
          CosFaceLoss(4., .2, weight=[1., 2., .5, 1.], reduction='class-mean', sample_margin=.5)]
each_loss = pytest.mark.parametrize('loss', LOSSES, ids=lambda loss: str(loss).replace('scale=4', '')[:40])


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(N, D).to(dtype), torch.randn(K, D).to(dtype), torch.tensor([0, 1, 2, 3, 1, -100])


def ways(loss):
    "From features, prototypes and targets to a loss."
    head = MarginHead(D, K, loss, dtype=torch.float64)
    found = {'fused': loss.linear, 'head': lambda z, w, y: torch.func.functional_call(head, {'weight': w}, (z, y))}
    if not isinstance(loss, AdaFaceLoss): found['dense'] = lambda z, w, y: loss(cosine_matrix(z, w), y)
    return found


@each_loss
def test_function_transforms(loss):
    "`grad`, `vmap(grad)` for each sample, `hessian`, `jvp`: as autograd finds them."
    features, prototypes, targets = inputs()
    counted = targets.clamp_min(0)
    for way in ways(loss).values():
        leaves = features.clone().requires_grad_(), prototypes.clone().requires_grad_()
        true = torch.autograd.grad(way(*leaves, targets), leaves)
        got = torch.func.grad(way, (0, 1))(features, prototypes, targets)
        for g, t in zip(got, true, strict=True): torch.testing.assert_close(g, t)
        each = torch.func.vmap(torch.func.grad(lambda z, y, way=way: way(z[None], prototypes, y[None])))
        for i, slope in enumerate(each(features, counted)):
            leaf = features[i:i + 1].clone().requires_grad_()
            torch.testing.assert_close(slope, torch.autograd.grad(way(leaf, prototypes, counted[i:i + 1]), leaf)[0][0])
        _, along = torch.func.jvp(lambda z, way=way: way(z, prototypes, targets), (features,), (features.sin(),))
        torch.testing.assert_close(along, (true[0] * features.sin()).sum())
    hessian = torch.func.hessian(loss.linear)(features, prototypes, targets)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(
        lambda z: loss.linear(z, prototypes, targets), features))


def test_the_loss_is_that_of_cross_entropy_under_every_transform():
    "Not only consistent with itself."
    features, prototypes, targets = inputs()
    def true(z): return F.cross_entropy(4 * F.normalize(z) @ F.normalize(prototypes).T, targets)
    def ours(z): return NormFaceLoss(4.).linear(z, prototypes, targets)
    for transform in (lambda f: f, torch.func.grad, torch.func.hessian, lambda f: torch.func.grad(
            lambda z: torch.func.grad(f)(z).square().sum())):
        torch.testing.assert_close(transform(ours)(features), transform(true)(features))


@each_loss
def test_fake_tensors(loss):
    "Shapes without values; also of a real model."
    head = MarginHead(D, K, loss)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        features, targets = mode.from_tensor(torch.randn(N, D)), mode.from_tensor(torch.arange(N) % K)
        for module in (head, MarginHead(D, K, loss)):
            assert module(features, targets).shape == () and module(features).shape == (N, K)
            assert module.top(features, 2)[0].shape == (N, 2) and module.sample_margins(features, targets).shape == (N,)


@pytest.mark.parametrize('loss', [NormFaceLoss(), ArcFaceLoss(), LMSoftmaxLoss()], ids=repr)
def test_make_fx(loss):
    features, prototypes, targets = inputs()
    def slope(z, w, y): return torch.func.grad(lambda z: loss.linear(z, w, y))(z)
    graph, other = make_fx(slope)(features, prototypes, targets), features.flip(0).contiguous()
    torch.testing.assert_close(graph(other, prototypes, targets), slope(other, prototypes, targets))


class Model(nn.Module):
    def __init__(self, head, loss=None):
        super().__init__()
        self.body, self.head, self.loss = nn.Linear(5, D), head, loss

    def forward(self, x, y=None):
        if self.loss is None: return self.head(self.body(x)) if y is None else self.head(self.body(x), y)
        return self.loss(self.head(self.body(x)), y)


@pytest.mark.parametrize('make', [lambda: (CosineLinear(D, K), CosFaceLoss()),
                                  lambda: (MarginHead(D, K, ArcFaceLoss()), None),
                                  lambda: (nn.Linear(D, K), FocalLoss())], ids=['dense', 'head', 'focal'])
def test_drawn_graphs(make):
    "fx draws a head or a loss as one node, whose numbers are its own."
    model, x, y = Model(*make()), torch.randn(N, 5), torch.arange(N) % K
    traced = torch.fx.symbolic_trace(model)
    value, true = traced(x, y), model(x, y)
    assert torch.equal(value, true)
    for got, expected in zip(*(torch.autograd.grad(v, list(model.parameters())) for v in (value, true)), strict=True):
        assert torch.equal(got, expected)
    for module in ('head', 'loss'):
        alone = getattr(model, module)
        if alone is None: continue
        args = (x[:, :D],) if module == 'head' else ((x[:, :K] / 9).clamp(-1, 1), y)
        concrete = dict(targets=None) if isinstance(alone, MarginHead) else None
        torch.testing.assert_close(torch.fx.symbolic_trace(alone, concrete)(*args), alone(*args))


def test_the_features_of_a_model():
    for head in (CosineLinear(D, K), MarginHead(D, K, CosFaceLoss())):
        model, x = nn.Sequential(nn.Linear(5, D), nn.ReLU(), head), torch.randn(N, 5)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            found = create_feature_extractor(model, {'1': 'features', '2': 'cosines'})(x)
        assert torch.equal(found['features'], model[:2](x)) and torch.equal(found['cosines'], model(x))


def test_hooks():
    "Forward hooks and full backward hooks of a head are called, with its output and gradients."
    for head in (CosineLinear(D, 2**12), MarginHead(D, 2**12, CosFaceLoss())):
        seen, features, targets = [], torch.randn(N, D, requires_grad=True), torch.arange(N)
        head.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        head.register_full_backward_hook(lambda module, inside, outside,
                                         seen=seen: seen.append((inside[0], outside[0])))
        out = head(features, targets) if isinstance(head, MarginHead) else head(features)
        (out if out.ndim == 0 else CosFaceLoss()(out, targets)).backward()
        shown, (inside, outside) = seen
        assert torch.equal(shown, out) and torch.equal(inside, features.grad) and outside.shape == out.shape


@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('large', [False, True])
def test_checkpointing(reentrant, large):
    "The body and the head get the gradients that they get without."
    k = 2**16 if large else K
    head, body = MarginHead(D, k, ArcFaceLoss(sample_margin=.5)), nn.Linear(5, D)
    x, y = torch.randn(N, 5, requires_grad=True), torch.randint(k, (N,))
    leaves = [x, *body.parameters(), *head.parameters()]
    def run(x, y): return head(body(x), y)
    true = torch.autograd.grad(run(x, y), leaves)
    checkpoint(run, x, y, use_reentrant=reentrant).backward()
    for leaf, t in zip(leaves, true, strict=True): assert torch.equal(leaf.grad, t)


def test_without_gradients():
    head, features, targets = MarginHead(D, K, CosFaceLoss()), torch.randn(N, D,
                                                                           requires_grad=True), torch.arange(N) % K
    with torch.no_grad(): value = head(features, targets)
    with torch.inference_mode(): inferred, out = head(features, targets), head(features)
    assert value == inferred == head(features, targets)
    for x in (value, inferred, out): assert not x.requires_grad
    with pytest.raises(RuntimeError): value.backward()
    with torch.no_grad(): frozen = head(features.detach())
    with pytest.raises(RuntimeError): CosFaceLoss()(frozen, targets).backward()
    assert head.weight.grad is None


# --- a device without float64 ---

class NoFloat64(TorchDispatchMode):
    "A device that has no float64, as every Apple GPU."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{func} makes a float64 tensor")
        return out


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('size', [1, 1e-30])
def test_no_float64(dtype, size):
    "Nothing needs it: heads, losses, their gradients, margins; for rows of any norm."
    features, prototypes, targets = inputs(dtype)
    counted = targets.clamp_min(0)
    losses = [*LOSSES, ElasticFaceLoss(), AdaFaceLoss(), CosFaceLoss(prior=range(1, K + 1))]
    for loss in (x for x in losses if not any(b.dtype == torch.float64 for b in x.buffers())):
        head = MarginHead(D, K, loss, dtype=dtype)
        leaf = (features * size).clone().requires_grad_()
        with NoFloat64():
            head(leaf, targets).backward()
            if not isinstance(loss, AdaFaceLoss): loss(head(leaf), targets).backward()
            head.top(leaf)
            head.sample_margins(leaf, counted)
            loss.decodes(loss.activation(head(leaf)))
        assert leaf.grad.isfinite().all() or size < 1
    with NoFloat64():
        cosines = cosine_matrix(features, prototypes)
        for margin in (sample_margins, class_sample_margins, min_sample_margin): margin(cosines, counted)
        for measure in (class_margin, norm_ratio, zero_centroid):
            leaf = (prototypes * size).clone().requires_grad_()
            measure(leaf).backward()
        FocalLoss()(features @ prototypes.T, targets)
    assert abs(class_margin(prototypes) - math.pi) > .1
    with NoFloat64(): found = class_margin(prototypes)
    assert (found - class_margin(prototypes)).abs() < 1e-6
    with pytest.raises(TypeError, match='float64'), NoFloat64(): torch.ones(2).double()


# --- a loss of a user's own ---

class Curves(MarginSoftmaxLoss):
    "Curves only."

    def __init__(self, scale=8., slack=.1, **options):
        super().__init__(scale, **options)
        self.slack = slack

    def curves(self, own): return own.cosine - self.slack, own.cosine * (1 + self.slack)


class Angular(MarginSoftmaxLoss):
    "Curves of the angle, without slopes, and a number for each sample."
    angular, numbers, bend = True, {'bend': 'bend'}, .3

    def curves(self, own, bend): return (x := -bend * own.angle.square() + own.cosine), x


class Hinge(CosineLoss):
    "No softmax at all: a hinge of the target's cosine against the soft maximum of the others."
    scale = 8.

    def per_sample(self, own, rest): return (rest / self.scale - own.cosine + .2).relu()


def hinge(cosines, targets):
    own = cosines.gather(1, targets[:, None])[:, 0]
    return ((8 * cosines.scatter(1, targets[:, None], -torch.inf)).logsumexp(1) / 8 - own + .2).relu()


def softmax(num, den):
    def losses(cosines, targets):
        own = cosines.gather(1, targets[:, None])[:, 0]
        others = (8 * cosines).scatter(1, targets[:, None], 8 * den(own)[:, None])
        return others.logsumexp(1) - 8 * num(own)
    return losses


def bent(own): return own - .3 * own.acos().square()


OWN = {'curves': (Curves, softmax(lambda c: c - .1, lambda c: 1.1 * c)),
       'angular': (lambda **o: Angular(8., **o), softmax(bent, bent)),
       'per_sample': (Hinge, hinge)}


def value_and_gradients(function, *leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def assert_close(got, true):
    for g, t in zip(got, true, strict=True): torch.testing.assert_close(g, t, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('name', OWN)
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_a_loss_of_a_users_own(name, reduction):
    "Dense, fused, in chunks, in a head, twice differentiated, with options that it inherits."
    (make, formula), (features, prototypes, targets) = OWN[name], inputs()
    targets = targets.clamp_min(0)
    def true(z, w):
        losses = formula(F.normalize(z) @ F.normalize(w).T, targets) * torch.tensor([1., 2, 3, 4])[targets]
        return losses if reduction == 'none' else losses.sum() / torch.tensor([1., 2, 3, 4])[targets].sum()
    loss = make(weight=[1., 2., 3., 4.], reduction=reduction)
    expected = value_and_gradients(true, features, prototypes)
    found = [lambda z, w: loss.linear(z, w, targets, chunk_size=2), *(
        lambda z, w, way=way: way(z, w, targets) for way in ways(loss).values())]
    for way in found: assert_close(value_and_gradients(way, features, prototypes), expected)
    torch.testing.assert_close(torch.func.hessian(lambda z: loss.linear(z, prototypes, targets).sum())(features),
                               torch.func.hessian(lambda z: true(z, prototypes).sum())(features))
    assert 'weight=[4]' in repr(loss)
    if name == 'curves': assert 'slack=0.5' in repr(Curves(slack=.5)) and 'slack' not in repr(Curves())


def own_losses_on_ranks(rank):
    features, prototypes, targets = inputs()
    targets = targets.clamp_min(0)
    for make, _ in OWN.values():
        loss, mine, shard = make(), slice(3 * rank, 3 * rank + 3), slice(3 * rank, 3 * rank + 3 - 2 * rank)
        value, z, w = value_and_gradients(lambda z, w, loss=loss: loss.linear(z, w, targets), features, prototypes)
        got = value_and_gradients(lambda z, w, loss=loss, mine=mine: loss.linear(z, w, targets[mine],
                                                                                 group=dist.group.WORLD),
                                  features[mine], prototypes[shard])
        assert_close(got, [value, z[mine], w[shard]])
    return True


def test_a_loss_of_a_users_own_on_several_processes():
    assert all(returned(run_on_ranks(own_losses_on_ranks, 2)))


def test_numbers_for_each_sample_of_a_users_own_loss():
    features, prototypes, targets = inputs()
    bends, loss = torch.linspace(0, .5, N).double(), Angular(8., reduction='none')
    for i, bend in enumerate(bends.tolist()):
        one = Angular(8., reduction='none')
        one.bend = bend
        for way in (loss.linear, lambda z, w, y, **given: loss(cosine_matrix(z, w), y, **given)):
            torch.testing.assert_close(way(features, prototypes, targets, bend=bends)[i],
                                       one.linear(features, prototypes, targets)[i])


class Learned(MarginSoftmaxLoss):
    "A margin that is learned, handed to each sample."
    numbers = {'slack': 'slack'}  # noqa: RUF012

    def __init__(self):
        super().__init__(8.)
        self.own = nn.Parameter(torch.tensor(.2, dtype=torch.float64))

    def per_batch(self, given, features, targets, group=None): return dict(slack=self.own.expand(len(targets)))

    def curves(self, own, slack): return (x := own.cosine - slack), x


class Forgotten(Learned):
    "The same, read behind autograd's back."
    numbers = {}  # noqa: RUF012

    def per_batch(self, given, features, targets, group=None): return {}

    def curves(self, own): return (x := own.cosine - self.own), x


def test_a_parameter_of_a_loss_gets_its_gradient_or_is_refused():
    features, prototypes, targets = inputs()
    true, = torch.autograd.grad(CosFaceLoss(8.)(cosine_matrix(features, prototypes), targets, margin=(
        x := torch.tensor(.2, dtype=torch.float64, requires_grad=True))), x)
    for make in (Learned, Forgotten):
        loss, z = make(), features.clone().requires_grad_()
        for way in (loss.linear, lambda z, w, y, loss=loss: loss(cosine_matrix(z, w), y)):
            if make is Forgotten:
                with pytest.raises(TypeError, match='per_batch'): way(z, prototypes, targets)
                continue
            got, = torch.autograd.grad(way(z, prototypes, targets), loss.own)
            torch.testing.assert_close(got, true)
        assert loss.linear(features, prototypes, targets.clamp_min(0)).isfinite()


def test_a_loss_that_says_nothing_is_refused():
    class Nothing(CosineLoss): scale = 1.
    class Straight(MarginSoftmaxLoss):
        def curves(self, own): return own.angle, own.angle
    features, prototypes, targets = inputs()
    for loss, message in ((Nothing(), 'per_sample'), (Straight(), 'angular')):
        with pytest.raises(TypeError, match=message): loss.linear(features, prototypes, targets)
    assert SampleMarginLoss().linear(features, prototypes, targets).isfinite()
