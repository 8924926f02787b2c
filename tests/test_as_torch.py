"A loss and a head of ours behave as torch's own: under transforms, in drawn graphs, with hooks, without float64."
import math
import warnings

import pytest
import torch
from loss_family import ON_COSINES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
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
    ElasticFaceLoss,
    FocalLoss,
    GMSoftmaxLoss,
    LMSoftmaxLoss,
    NormFaceLoss,
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
        with forward_ad.dual_level():
            dual = way(forward_ad.make_dual(features, features.sin()), prototypes, targets)
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along)
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


class Linear(nn.Module):
    "A model that calls `linear` of its loss."
    def __init__(self):
        super().__init__()
        self.head, self.loss = CosineLinear(D, K), CosFaceLoss(4., .2)

    def forward(self, x, y, margin): return self.loss.linear(x, self.head.weight, y, margin=margin)


def test_a_drawn_graph_of_linear():
    model, args = Linear(), (torch.randn(N, D), torch.arange(N) % K, torch.rand(N))
    value, true = torch.fx.symbolic_trace(model)(*args), model(*args)
    assert torch.equal(value, true)
    for got, expected in zip(*(torch.autograd.grad(v, model.head.weight) for v in (value, true)), strict=True):
        assert torch.equal(got, expected)


def test_numbers_of_each_class_that_are_fake():
    with FakeTensorMode():
        loss = GMSoftmaxLoss(4., alpha1=torch.ones(K), weight=torch.ones(K))
        assert loss.linear(torch.randn(N, D), torch.randn(K, D), torch.zeros(N, dtype=torch.long)).shape == ()


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
