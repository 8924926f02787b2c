"The cosine head: what it computes, how it is saved, and fixed prototypes."
import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from largest_margins.heads import CosineLinear
from largest_margins.losses import LMSoftmaxLoss
from largest_margins.margins import class_margin


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
    head = CosineLinear(5, 5).fix(simplex(5)).fix(torch.eye(5))
    assert torch.equal(head.weight, torch.eye(5))


def test_fixed_and_free_heads_are_saved_copied_and_pickled():
    features = torch.randn(3, 5)
    for head in (CosineLinear(5, 5), CosineLinear(5, 5).fix(simplex(5))):
        for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), CosineLinear(5, 5),
                      CosineLinear(5, 5).fix(torch.eye(5))):
            other.load_state_dict(head.state_dict())
            assert torch.equal(other(features), head(features))
        assert copy.deepcopy(head).double().weight.dtype == torch.float64
        assert repr(copy.deepcopy(head)) == repr(head)


def test_repr_says_whether_it_is_fixed():
    assert repr(CosineLinear(8, 5)) == 'CosineLinear(in_features=8, out_features=5)'
    assert repr(CosineLinear(5, 5).fix(torch.eye(5))) == 'CosineLinear(in_features=5, out_features=5, fixed)'


@pytest.mark.parametrize('sizes, name, given', [((0, 5), 'in_features', '0'), ((5, -1), 'out_features', '-1')])
def test_bad_sizes_are_refused(sizes, name, given):
    with pytest.raises(ValueError, match=f'^{name} must be .*got {given}'): CosineLinear(*sizes)


@pytest.mark.parametrize('size', [2.5, '8', None])
def test_sizes_that_are_no_integers_are_refused(size):
    with pytest.raises((TypeError, ValueError), match='^in_features must be .*got'): CosineLinear(size, 5)


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
