"The matrix of cosines, the angle of the target, and the reduction over the other classes."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from torch.autograd import forward_ad, gradcheck
from torch.nn import functional as F

from largest_margins.engine.cosines import angle_from_cosine, cosine_matrix, log_sum_exp_of_others
from largest_margins.heads import CosineLinear
from largest_margins.losses import ArcFaceLoss, CosFaceLoss, CosineLoss
from largest_margins.margins import sample_margins

mp.dps = 40
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORMS = [(torch.float32, 1e-30), (torch.float32, 1e-20), (torch.float32, 1e20), (torch.float32, 1e30),
         (torch.float64, 1e-200), (torch.float64, 1e200), (torch.bfloat16, 1e-30), (torch.bfloat16, 1e30),
         (torch.float16, 1e-3), (torch.float16, 1e3)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_log_sum_exp_of_others_is_a_loop(data):
    n, k = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 6))
    numbers = data.draw(st.lists(st.sampled_from([-1, 0, 1]) | st.floats(-1, 1), min_size=n * k, max_size=n * k))
    targets = data.draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n))
    scale = data.draw(st.sampled_from([1e-3, 1., 64., 256.]))
    cosines = torch.tensor(numbers, dtype=torch.float64).view(n, k)
    expected = [float(mp.log(sum(mp.exp(mpf(scale) * mpf(c)) for j, c in enumerate(row) if j != y)))
                for row, y in zip(cosines.tolist(), targets)]
    got = log_sum_exp_of_others(cosines, torch.tensor(targets), scale)
    assert got.tolist() == pytest.approx(expected, rel=1e-14, abs=1e-13)
    single = log_sum_exp_of_others(cosines.float(), torch.tensor(targets), scale)
    assert single.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_log_sum_exp_of_others_does_not_see_the_target():
    cosines = torch.tensor([[.9, -.1, -.2]], requires_grad=True)
    rest = log_sum_exp_of_others(cosines, torch.tensor([0]), 64.)
    assert rest.item() == pytest.approx(-6.4 + math.log1p(math.exp(-6.4)), rel=1e-6)
    rest.sum().backward()
    assert cosines.grad[0, 0] == 0 and cosines.grad.isfinite().all()
    assert cosines.grad.sum().item() == pytest.approx(64, rel=1e-6)


def test_gradient_of_log_sum_exp_of_others():
    torch.manual_seed(0)
    cosines, targets = torch.rand(5, 4).double().requires_grad_(), torch.tensor([0, 1, 2, 3, 1])
    assert gradcheck(lambda c: log_sum_exp_of_others(c, targets, 7.), cosines)


# --- cosines ---

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_cosines_are_those_of_torch_in_at_least_float32(dtype):
    torch.manual_seed(0)
    features, prototypes = torch.randn(6, 5).to(dtype), torch.randn(4, 5).to(dtype)
    cosines = cosine_matrix(features, prototypes)
    expected = F.normalize(features.double()) @ F.normalize(prototypes.double()).T
    assert cosines.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(cosines.double(), expected, rtol=0, atol=1e-14 if dtype == torch.float64 else 3e-7)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(cosine_matrix(features, prototypes), cosines)
    assert cosine_matrix(features, prototypes.double()).dtype == torch.float64


@pytest.mark.parametrize('dtype, norm', NORMS, ids=str)
def test_cosines_of_any_norm(dtype, norm):
    torch.manual_seed(0)
    features, prototypes = torch.randn(6, 5).to(dtype), torch.randn(4, 5).to(dtype)
    large = features * norm
    features = large.double() / norm  # what the rounding of the product left
    tolerance = 1e-14 if dtype == torch.float64 else 5e-7
    expected = F.normalize(features) @ F.normalize(prototypes.double()).T
    assert torch.allclose(cosine_matrix(large, prototypes).double(), expected, rtol=0, atol=tolerance)
    assert torch.allclose(cosine_matrix(prototypes, large).double(), expected.T, rtol=0, atol=tolerance)


@pytest.mark.parametrize('norm', [1e-30, 1e-18, 1., 1e18, 1e30])
def test_gradient_of_cosines_of_any_norm(norm):
    "The gradient scales with 1/norm, and is orthogonal to the feature."
    z = torch.tensor([[3., 4., 0]])
    w = torch.tensor([[0., 1, 0], [0, 0, 2]])
    features = (z * norm).requires_grad_()
    cosine_matrix(features, w)[0, 0].backward()
    expected = torch.tensor([-12 / 125, 9 / 125, 0])
    assert torch.allclose(features.grad[0] * norm, expected, rtol=1e-5, atol=1e-7)


def test_a_zero_row_has_cosine_zero_and_a_finite_gradient():
    features = torch.zeros(2, 3, requires_grad=True)
    cosines = cosine_matrix(features, torch.eye(3))
    assert not cosines.any()
    ArcFaceLoss()(cosines, torch.tensor([0, 2])).backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize('n, k', [(3, 5), (64, 2**16)])
def test_cosines_are_an_ordinary_tensor(n, k):
    "Of any size: a plain tensor without attributes, whose values stay when the weights move."
    torch.manual_seed(0)
    head, features, targets = CosineLinear(4, k), torch.randn(n, 4), torch.randint(k, (n,))
    out = head(features)
    assert type(out) is torch.Tensor and not vars(out) and out.shape == (n, k)
    before, detached = out.detach().clone(), out.detach()
    optimiser = torch.optim.SGD(head.parameters(), 5.)
    CosFaceLoss(20., .1)(out, targets).backward()
    optimiser.step()
    assert torch.equal(out, before) and torch.equal(detached, before)
    assert not torch.allclose(head(features), before, atol=1e-4)
    for result, true in ((30 * out, before.mul(30)), (out / .1, before / .1), (-out, before.neg()),
                         (out > .5, before.gt(.5)),
                         (out == before, torch.ones_like(before, dtype=torch.bool)),
                         (out.clone().mul_(30), before * 30)):
        assert type(result) is torch.Tensor and torch.equal(result, true)
    rows = list(out)
    assert len(rows) == n and all(torch.equal(row, b) for row, b in zip(rows, before))


def test_an_in_place_change_of_cosines_is_seen_or_refused():
    "Before the loss it counts; between the loss and its way back it is refused."
    torch.manual_seed(0)
    features, prototypes, targets = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3), torch.arange(5) % 4
    cosines = cosine_matrix(features, prototypes) * 1
    with torch.no_grad(): cosines[:, 0] = .25
    assert ArcFaceLoss()(cosines, targets) == ArcFaceLoss()(cosines.detach().clone(), targets)
    value = ArcFaceLoss()(cosines, targets)
    with torch.no_grad(): cosines.mul_(.5)
    with pytest.raises(RuntimeError, match='inplace'): value.backward()


def test_no_gradient_appears_that_was_not_asked_for():
    head, targets = CosineLinear(3, 4), torch.tensor([0, 1])
    with torch.no_grad(): out = head(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match='does not require grad'): CosFaceLoss()(out, targets).backward()


class Angle(CosineLoss):
    "A user's loss that shows what the engine says of the target's angle."
    angular, scale = True, 1.

    def per_sample(self, own, rest): return own.angle + 0 * rest


def target_angles(features, prototypes, targets):
    "The angles and their gradients, as the fused engine makes them."
    leaves = [x.clone().requires_grad_() for x in (features, prototypes)]
    angles = Angle(reduction='none').linear(*leaves, targets)
    return angles.detach(), torch.autograd.grad(angles.sum(), leaves)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('theta', [1e-6, 1e-4, 1e-2, 1., 3.])
def test_the_angle_of_the_target_survives_low_precision(theta, dtype):
    features = torch.tensor([[2 * math.cos(theta), 2 * math.sin(theta), 0]]).to(dtype)
    x, y, _ = features.double()[0].tolist()
    expected = math.atan2(y, x)  # of the rounded feature
    angle, (slope, _) = target_angles(features, 3 * torch.eye(3, dtype=dtype), torch.tensor([0]))
    assert angle.item() == pytest.approx(expected, rel=1e-6)
    length = 1 / math.hypot(x, y)
    tangent = torch.tensor([[-math.sin(expected), math.cos(expected), 0]])
    assert (slope - length * tangent).norm() <= length * (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize('sign', [1, -1])
def test_the_angle_of_the_target_has_gradient_zero_at_its_ends(sign):
    angle, slopes = target_angles(torch.tensor([[sign * 2., 0]]), torch.eye(2), torch.tensor([0]))
    assert angle.item() == pytest.approx(0 if sign == 1 else math.pi, abs=3e-7)
    assert all(x.isfinite().all() and x.norm() < 1e-6 for x in slopes)


@pytest.mark.parametrize('resolution', [2**-53, 2**-24])
def test_angle_from_cosine(resolution):
    "The slope at ±1, which is infinite, is that of the neighbouring number."
    exact = [1., 1 - 2 ** -53, 1 - 1e-12, .999, .5, 0., -.5, -1 + 1e-12, -1.]
    cosine = torch.tensor(exact, dtype=torch.float64, requires_grad=True)
    angles = angle_from_cosine(cosine, resolution)
    assert angles.tolist() == pytest.approx([float(mp.acos(mpf(c))) for c in exact], rel=1e-14)
    angles.sum().backward()
    inside = [max(min(mpf(c), 1 - mpf(resolution)), mpf(resolution) - 1) for c in exact]
    assert cosine.grad.tolist() == pytest.approx([float(-1 / mp.sqrt(1 - c ** 2)) for c in inside], rel=1e-12)


def test_half_precision_and_extreme_norms_keep_their_margins():
    torch.manual_seed(0)
    features, prototypes, targets = torch.randn(7, 3), torch.randn(4, 3), torch.arange(7) % 4
    true = sample_margins(cosine_matrix(features.double(), prototypes.double()), targets)
    for z, w in ((features * 1e30, prototypes * 1e-30), (features * 1e-30, prototypes * 1e37)):
        torch.testing.assert_close(sample_margins(cosine_matrix(z, w), targets).double(), true, rtol=0, atol=1e-6)
    assert not sample_margins(cosine_matrix(0 * features, prototypes), targets).any()


def test_cosines_have_tangents_second_derivatives_and_many_gradients_at_once():
    torch.manual_seed(0)
    z, w, dz, dw = (torch.randn(n, 4, dtype=torch.float64) for n in (5, 3, 5, 3))
    true, tangent = torch.func.jvp(cosine_matrix, (z, w), (dz, dw))
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(cosine_matrix(forward_ad.make_dual(z, dz), forward_ad.make_dual(w, dw)))
    for mine, func in zip(got, (true, tangent), strict=True):
        torch.testing.assert_close(mine, func, rtol=1e-14, atol=1e-15)
    rows = z.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradgradcheck(cosine_matrix, rows)
    jacobians = (torch.autograd.functional.jacobian(cosine_matrix, rows, vectorize=v) for v in (True, False))
    for many, one in zip(*jacobians, strict=True): torch.testing.assert_close(many, one, rtol=1e-13, atol=1e-15)


def test_features_that_do_not_fit_are_refused():
    z, w = torch.randn(3, 4), torch.randn(2, 4)
    for features, prototypes, error, message in (
            (z[:, :3], w, ValueError, r'^features must .*same d, got shapes \(3, 3\) and \(2, 4\)'),
            (z[0], w, ValueError, r'^features must .*got shapes \(4,\)'),
            (z, w[0], ValueError, r'^features must .*and \(4,\)'),
            (z.long(), w, TypeError, '^features must .*got torch.int64'),
            ('z', w, TypeError, '^features must .*got str'),
            (torch.nested.nested_tensor([z, z]), w, TypeError, '^features must .*got a nested tensor'),
            (torch.nested.nested_tensor([z, z], layout=torch.jagged), w, TypeError, '^features must .*got a nested'),
            (z, w.bool(), TypeError, '^prototypes must .*got torch.bool')):
        for way in (cosine_matrix, lambda z, w: CosFaceLoss().linear(z, w, torch.arange(3))):
            with pytest.raises(error, match=message): way(features, prototypes)
