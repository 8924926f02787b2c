"The heads: cosines, the loss for those who bring targets, how they are saved, and fixed prototypes."
import copy
import math
import pickle

import numpy as np
import pytest
import torch
from loss_family import ON_COSINES
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
from largest_margins.margins import class_margin, sample_margins


def simplex(k):
    return (k * torch.eye(k, dtype=torch.float64) - 1) / math.sqrt(k * (k - 1))


def test_head_returns_cosines_of_any_norms():
    torch.manual_seed(0)
    head, features = CosineLinear(8, 5), 100 * torch.randn(3, 8)
    with torch.no_grad(): head.weight *= torch.tensor([.1, 1, 10, 100, 1000])[:, None]
    expected = F.normalize(features) @ F.normalize(head.weight).T
    assert torch.allclose(head(features), expected, atol=1e-6)
    assert head.weight.shape == (5, 8) and head(features).abs().max() <= 1 + 1e-6


def test_prototypes_start_as_random_unit_rows():
    torch.manual_seed(0)
    head = CosineLinear(64, 500)
    assert torch.allclose(head.weight.norm(dim=1), torch.ones(500), atol=1e-6)
    assert head.weight.mean().abs() < 5e-3  # no preferred direction
    assert class_margin(head.weight) > .5
    again = head.weight.clone()
    head.reset_parameters()
    assert not torch.equal(head.weight, again)


def test_gradcheck_of_the_head():
    torch.manual_seed(0)
    head = CosineLinear(3, 4).double()
    features = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = head.weight.detach().clone().requires_grad_()
    assert gradcheck(lambda z, w: torch.func.functional_call(head, {'weight': w}, z) * 1, (features, weight))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_device_and_dtype_are_passed_on(dtype):
    head = CosineLinear(4, 3, dtype=dtype)
    assert head.weight.dtype == dtype
    assert head(torch.randn(2, 4, dtype=dtype)).dtype == torch.promote_types(dtype, torch.float32)
    assert CosineLinear(4, 3, device='meta').weight.device.type == 'meta'


def test_shapes_are_inferred_on_meta():
    model = nn.Sequential(nn.Linear(6, 4), CosineLinear(4, 3)).to('meta')
    assert model(torch.empty(2, 6, device='meta')).shape == (2, 3)


def test_state_dict_has_the_layout_of_linear():
    head, linear = CosineLinear(8, 5), nn.Linear(8, 5, bias=False)
    assert list(head.state_dict()) == ['weight']
    head.load_state_dict(linear.state_dict())
    assert torch.equal(head.weight, linear.weight)
    linear.load_state_dict(CosineLinear(8, 5).state_dict())


def test_head_learns():
    torch.manual_seed(0)
    head, features, targets = CosineLinear(6, 4), torch.randn(40, 6), torch.arange(40) % 4
    loss, optimiser = LMSoftmaxLoss(10.), torch.optim.SGD(head.parameters(), .5)
    first = loss(head(features), targets)
    for _ in range(20):
        optimiser.zero_grad()
        loss(head(features), targets).backward()
        optimiser.step()
    assert loss(head(features), targets) < first - .1


def test_fixed_prototypes_stay():
    points = 7 * simplex(5)
    head = CosineLinear(5, 5)
    assert head.fix(points) is head
    assert torch.equal(head.weight, points.float()) and head.weight.dtype == torch.float32
    assert class_margin(head.weight).item() == pytest.approx(math.acos(-1 / 4), abs=1e-6)
    assert not list(head.parameters()) and list(head.state_dict()) == ['weight']
    for parameter in nn.Sequential(head).requires_grad_().parameters(): raise AssertionError(parameter)
    assert not head.weight.requires_grad
    features = torch.randn(3, 5, requires_grad=True)
    head(features).sum().backward()
    assert features.grad.any() and head.weight.grad is None


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_fixed_prototypes_are_a_copy(dtype):
    points = torch.eye(5, dtype=dtype)
    head = CosineLinear(5, 5).fix(points)
    points.zero_()
    assert torch.equal(head.weight, torch.eye(5))


def test_fixed_prototypes_can_be_fixed_again():
    "And stay, when a trainer resets every layer."
    for head in (CosineLinear(5, 5), MarginHead(5, 5, CosFaceLoss())):
        head.fix(simplex(5)).fix(torch.eye(5))
        head.reset_parameters()
        assert torch.equal(head.weight, torch.eye(5))


def test_fixed_and_free_heads_are_saved_copied_and_pickled():
    features = torch.randn(3, 5)
    for head in (CosineLinear(5, 5), CosineLinear(5, 5).fix(simplex(5)), MarginHead(5, 5, ArcFaceLoss(weight=[1.] * 5)),
                 MarginHead(5, 5, GMSoftmaxLoss()).fix(simplex(5))):
        assert list(head.state_dict()) == ['weight']
        for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), CosineLinear(5, 5),
                      CosineLinear(5, 5).fix(torch.eye(5))):
            other.load_state_dict(head.state_dict())
            assert torch.equal(other(features), head(features))
        assert copy.deepcopy(head).double().weight.dtype == torch.float64
        assert repr(copy.deepcopy(head)) == repr(head)


def test_repr_says_whether_it_is_fixed():
    assert repr(CosineLinear(8, 5)) == 'CosineLinear(in_features=8, out_features=5)'
    assert repr(CosineLinear(5, 5).fix(torch.eye(5))) == 'CosineLinear(in_features=5, out_features=5, fixed)'
    shown = repr(MarginHead(8, 5, NormFaceLoss(prior=[1.] * 5)))
    assert 'in_features=8, out_features=5' in shown and 'NormFaceLoss(scale=20, prior=[5])' in shown


@pytest.mark.parametrize('sizes, name, given', [((0, 5), 'in_features', '0'), ((5, -1), 'out_features', '-1')])
def test_bad_sizes_are_refused(sizes, name, given):
    with pytest.raises(ValueError, match=f'^{name} must be .*got {given}'): CosineLinear(*sizes)


@pytest.mark.parametrize('size', [np.int64(8), np.int32(8), torch.tensor(8)])
def test_sizes_may_be_any_integers(size):
    for head in (CosineLinear(size, size), MarginHead(size, size, CosFaceLoss())):
        assert head(torch.ones(2, 8)).shape == (2, 8) and type(head.in_features) is type(head.out_features) is int


@pytest.mark.parametrize('size', [2.5, 8., '8', None, True, torch.tensor(8.)])
def test_sizes_that_are_no_integers_are_refused(size):
    with pytest.raises(TypeError, match='^in_features must be .*got'): CosineLinear(size, 5)
    with pytest.raises(TypeError, match='^out_features must be .*got'): MarginHead(5, size, CosFaceLoss())


def test_bad_points_are_refused():
    head = CosineLinear(5, 5)
    before = head.weight
    for points, error, message in (
            (torch.eye(4), ValueError, r'^points must be \[5, 5\], got shape \(4, 4\)'),
            (torch.eye(5).long(), TypeError, '^points must .*got torch.int64'),
            ([1.], TypeError, '^points must .*got list'),
            (torch.eye(5)[0], ValueError, '^points must .*got shape'),
            (torch.zeros(5, 5), ValueError, '^points must .*row 0'),
            (torch.full((5, 5), math.nan), ValueError, '^points must .*row 0')):
        with pytest.raises(error, match=message): head.fix(points)
    assert head.weight is before and isinstance(before, nn.Parameter)


def test_bad_features_are_refused():
    head = CosineLinear(5, 3)
    with pytest.raises(ValueError, match=r'^features must be .*got shapes \(2, 4\)'): head(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r'^features must be .*got shapes \(5,\)'): head(torch.randn(5))
    with pytest.raises(TypeError, match='^features must be .*got torch.int64'): head(torch.ones(2, 5).long())


# --- a head that takes targets ---

def inputs(n=9, d=3, k=4):
    torch.manual_seed(0)
    return torch.randn(n, d).double(), torch.arange(n) % k


@pytest.mark.parametrize('row', ON_COSINES, ids=repr)
@pytest.mark.parametrize('chunk_size', ['auto', 2])
def test_a_head_with_targets_is_its_loss(row, chunk_size):
    "With an ordinary scalar out, whatever the size; without targets it returns the dense cosines."
    features, targets = inputs()
    head = MarginHead(3, 4, row.make(8., range(4)), chunk_size=chunk_size, dtype=torch.float64)
    leaf = features.requires_grad_()
    value, cosines = head(leaf, targets), head(leaf)
    assert type(value) is type(cosines) is torch.Tensor and value.shape == () and cosines.shape == (9, 4)
    expected = head.loss(cosine_matrix(leaf, head.weight), targets)
    assert abs(value - expected) < 1e-13
    for got, true in zip(*(torch.autograd.grad(v, (leaf, head.weight)) for v in (value, expected)), strict=True):
        assert (got - true).norm() < 1e-12 * true.norm()
    head.loss.reduction = 'none'
    assert head(leaf, targets).shape == (9,)


def test_a_head_hands_numbers_of_each_sample_on():
    features, targets = inputs()
    head, margins = MarginHead(3, 4, ArcFaceLoss(8.), dtype=torch.float64), torch.linspace(0, 1, 9).double()
    assert head(features, targets, m2=margins) == head.loss.linear(features, head.weight, targets, m2=margins)
    assert head(features, targets, margin=.1) != head(features, targets)
    with pytest.raises(TypeError, match='m4'): head(features, targets, m4=margins)
    with pytest.raises(TypeError, match='^targets must'): head(features, m2=margins)


def test_the_output_stays_when_the_weights_move():
    head, targets = MarginHead(4, 2**16, CosFaceLoss(20., .1)), torch.randint(2**16, (8,))
    features = torch.randn(8, 4)
    value = head(features, targets)
    before, out = value.item(), head(features)
    first = out[0].tolist()
    value.backward()
    torch.optim.SGD(head.parameters(), 50.).step()
    assert value.item() == before and out[0].tolist() == first
    assert head(features, targets).item() < before


@pytest.mark.parametrize('n', [1, 3, 6])
def test_the_nearest_classes(n, monkeypatch):
    "In one chunk and in many."
    features, _ = inputs(50, 3, 6)
    head = MarginHead(3, 6, CosFaceLoss(), dtype=torch.float64)
    true = head(features).topk(n)
    for size in (72 * 2**20, 100):
        monkeypatch.setattr('largest_margins.engine.fused.BUFFER_BYTES', size)
        cosines, classes = head.top(features.requires_grad_(), n)
        assert torch.equal(classes, true.indices) and (cosines - true.values).abs().max() < 1e-14
        assert not cosines.requires_grad
        assert head.top(features)[1].shape == (50, 1)
    for bad in (0, 7, -1):
        with pytest.raises(ValueError, match='^n must'): head.top(features, bad)
    with pytest.raises(TypeError, match='^n must'): head.top(features, 2.)
    with pytest.raises(ValueError, match='^features must'): head.top(features[:, :2])


def test_the_sample_margins(monkeypatch):
    features, targets = inputs(50)
    head = MarginHead(3, 4, CosFaceLoss(), dtype=torch.float64)
    true = sample_margins(head(features), targets)
    for size in (72 * 2**20, 100):
        monkeypatch.setattr('largest_margins.engine.fused.BUFFER_BYTES', size)
        assert (head.sample_margins(features, targets) - true).abs().max() < 1e-14
    for wrong, error in ((targets + 1, ValueError), (targets - 1, ValueError), (targets[:5], ValueError),
                         (targets.float(), TypeError)):
        with pytest.raises(error, match='^targets must'): head.sample_margins(features, wrong)


@pytest.mark.parametrize('loss', [FocalLoss(), nn.CrossEntropyLoss(), CosFaceLoss, None, 'CosFace'])
def test_a_head_takes_a_loss_of_ours_on_cosines(loss):
    with pytest.raises(TypeError, match='^loss must'): MarginHead(3, 4, loss)


@pytest.mark.parametrize('chunk_size, error', [(0, ValueError), (-5, ValueError), (2.5, TypeError), ('all', TypeError)])
def test_bad_chunk_sizes_of_a_head(chunk_size, error):
    with pytest.raises(error, match='^chunk_size must'): MarginHead(3, 4, CosFaceLoss(), chunk_size=chunk_size)
    head = MarginHead(3, 4, CosFaceLoss())
    with pytest.raises(error, match='^chunk_size must'): head.chunk_size = chunk_size
    assert head.chunk_size == 'auto'


def test_half_heads_keep_what_their_loss_counts():
    features, targets = inputs()
    for loss in (NormFaceLoss(prior=[70001., 3., 9., 1e6]), AdaFaceLoss(), ElasticFaceLoss()):
        head = MarginHead(3, 4, loss).half()
        assert head.weight.dtype == torch.float16 and all(b.dtype == torch.float32 for b in loss.buffers())
        value = head(features.half(), targets)
        assert value.dtype == torch.float32 and value.isfinite()


@pytest.mark.parametrize('size', [1e-42, 1e-30, 1e30, 3e38])
def test_evaluation_by_rows_of_any_norm(size):
    "Also with prototypes whose squares, products or norms leave the range of float32."
    features, targets = (x.float() if x.is_floating_point() else x for x in inputs())
    head = MarginHead(3, 4, CosFaceLoss())
    with torch.no_grad(): head.weight[1] = size * head.weight[1].sign()
    true = F.normalize(features.double()) @ F.normalize(head.weight.detach().double(), eps=0).T
    assert (head.top(features, 4)[0] - true.sort(1, descending=True)[0]).abs().max() < 1e-6
    assert (head.sample_margins(features, targets) - sample_margins(true, targets)).abs().max() < 1e-6


def test_evaluation_by_rows_at_its_boundaries():
    features, targets = inputs()
    head, wrong = MarginHead(3, 4, CosFaceLoss(), dtype=torch.float64), features.clone()
    assert head.top(features[:0], 2)[1].shape == (0, 2) and head.sample_margins(features[:0], targets[:0]).shape == (0,)
    wrong[2] = math.nan
    for call in (head.top, lambda z: head.sample_margins(z, targets)):
        with pytest.raises(ValueError, match='^features must be finite, row 2'): call(wrong)
    with torch.no_grad(): head.weight[3] = math.inf
    for call in (head.top, lambda z: head.sample_margins(z, targets)):
        with pytest.raises(ValueError, match='^prototypes must be finite, row 3'): call(features)
    with pytest.raises(ValueError, match='k ≥ 2'):
        MarginHead(3, 1, CosFaceLoss(), dtype=torch.float64).sample_margins(features, targets * 0)


def test_a_parametrized_head_is_not_fixed():
    features, targets = inputs()
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        head = wrap(MarginHead(3, 4, NormFaceLoss(8.), dtype=torch.float64))
        assert 'fixed' not in repr(head).split('\n')[1]
        true = F.cross_entropy(8 * F.normalize(features) @ F.normalize(head.weight).T, targets)
        torch.testing.assert_close(head.eval()(features, targets), true)
        with pytest.raises(RuntimeError, match='parametrization'): head.fix(torch.eye(4)[:, :3] + 1)


def test_what_is_set_later_or_no_dtype_is_refused():
    head = MarginHead(3, 4, CosFaceLoss())
    with pytest.raises(TypeError, match='^loss must'): head.loss = nn.CrossEntropyLoss()
    for dtype in ('float32', float, torch.float8_e4m3fn, torch.int64):
        with pytest.raises(TypeError, match='^dtype must'): MarginHead(3, 4, CosFaceLoss(), dtype=dtype)
    for args in ((np.ones((2, 3), np.float32), torch.arange(2)), (torch.ones(2, 3), np.arange(2))):
        with pytest.raises(TypeError, match='got ndarray'): head(*args)


def test_heads_made_on_meta():
    "What a loss knows of the classes is kept, or its loss is told; statistics start anew."
    with torch.device('meta'): head = MarginHead(3, 4, NormFaceLoss(prior=[1, 2, 3, 4]))
    for _ in range(2):
        assert head.to_empty(device='cpu').loss.prior.tolist() == [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match='^prior of NormFaceLoss lost its numbers'):
        head.to('meta').to_empty(device='cpu')
    with torch.device('meta'): loss = AdaFaceLoss()
    loss.to_empty(device='cpu').reset_parameters()
    assert loss.norm_mean == 20 and loss.norm_std == 100


@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('make', [ElasticFaceLoss, AdaFaceLoss])
def test_losses_that_move_on_are_not_computed_again(make, reentrant):
    "Else the gradient would be that of other margins than the value."
    features, targets = inputs()
    head = MarginHead(3, 4, make(), dtype=torch.float64)
    value = checkpoint(head, features.requires_grad_(), targets, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match='keep the head out of the checkpoint'): value.backward()
    checkpoint(head.eval(), features, targets, use_reentrant=reentrant).backward()


def test_the_state_of_a_head_is_tensors(tmp_path):
    "So that it can be saved as safetensors."
    features, targets = inputs()
    head = MarginHead(3, 4, ElasticFaceLoss(), dtype=torch.float64)
    save_file(head.state_dict(), tmp_path/'head.safetensors')
    expected = head(features, targets)
    head.load_state_dict(load_file(tmp_path/'head.safetensors'))
    assert head(features, targets) == expected != head(features, targets)
