"Class and sample margins: against brute force, at tiny and extreme scales, in bounded memory."
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from pairs import named, pairs
from processes import interpret, run_alone
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from largest_margins import margins
from largest_margins.losses import SampleMarginLoss
from largest_margins.margins import (
    class_margin,
    class_sample_margins,
    min_sample_margin,
    neural_collapse,
    norm_ratio,
    sample_margins,
)

mp.dps = 50
BENCHMARK = Path(__file__).parent.parent/'benchmarks'/'margins.py'
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORMS = [(torch.float32, 1e-30), (torch.float32, 1e-20), (torch.float32, 1e20), (torch.float32, 1e30),
         (torch.float64, 1e-200), (torch.float64, 1e200), (torch.bfloat16, 1e-30), (torch.bfloat16, 1e30),
         (torch.float16, 1e-3), (torch.float16, 1e3)]


def true_angle(x, y):
    "Between two rows of floats, with fifty digits."
    x, y = ([mpf(a) for a in row.double().tolist()] for row in (x, y))
    def dot(a, b): return sum(p * q for p, q in zip(a, b))
    return mp.acos(max(-1, min(1, dot(x, y) / mp.sqrt(dot(x, x) * dot(y, y)))))


def brute_class_margin(prototypes):
    return min(true_angle(x, y) for i, x in enumerate(prototypes) for y in prototypes[:i])


def rows(k, d):
    return st.lists(st.lists(st.integers(-4, 4), min_size=d, max_size=d).filter(any), min_size=k, max_size=k)


# --- class margin ---

@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_class_margin_is_brute_force(data):
    k, d = data.draw(st.integers(2, 7)), data.draw(st.integers(1, 4))
    prototypes = torch.tensor(data.draw(rows(k, d)), dtype=data.draw(st.sampled_from(DTYPES)))
    expected = float(brute_class_margin(prototypes))
    assert class_margin(prototypes).item() == pytest.approx(expected, abs=3e-7)


@pytest.mark.parametrize('k', [1023, 1025, 2500])
def test_class_margin_across_tiles(k):
    "The closest pair is found within a tile and across any two."
    torch.manual_seed(0)
    prototypes = torch.randn(k, 8, dtype=torch.float64)
    unit = prototypes / prototypes.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).fill_diagonal_(-1)
    assert class_margin(prototypes).item() == pytest.approx(cosines.max().acos().item(), abs=1e-9)
    for i, j in ((0, k - 1), (k - 2, k - 1), (0, 1), (500, 1022)):
        moved = prototypes.clone()
        moved[j] = moved[i] * 3 + 1e-5
        assert class_margin(moved).item() == pytest.approx(float(true_angle(moved[i], moved[j])), rel=1e-9)


@pytest.mark.parametrize('apart', [1e-6, 1e-5, 1e-3, 1.])
@pytest.mark.parametrize('norm', [1e-30, 1e-3, 1., 1e30])
def test_class_margin_of_nearly_equal_float32_prototypes(apart, norm):
    "On an axis float32 holds the angle; elsewhere the rounded rows have a true angle of their own."
    on_axis = torch.tensor([[norm, 0, 0], [norm * math.cos(apart), norm * math.sin(apart), 0], [0, 0, -norm]])
    assert abs(class_margin(on_axis).item() - apart) <= 1e-7
    torch.manual_seed(0)
    u, v, far = torch.linalg.qr(torch.randn(5, 3).double()).Q.T
    general = norm * torch.stack([u, math.cos(apart) * u + math.sin(apart) * v, far, -u]).float()
    assert abs(class_margin(general).item() - float(brute_class_margin(general))) <= 1e-7


@pytest.mark.parametrize('dtype, norm', NORMS, ids=str)
def test_class_margin_of_any_norm(dtype, norm):
    torch.manual_seed(0)
    prototypes = torch.randn(6, 4).to(dtype) * norm
    assert class_margin(prototypes).item() == pytest.approx(float(brute_class_margin(prototypes)), abs=2e-7)
    norms = torch.tensor([[norm], [1.], [1 / norm]], dtype=torch.float64).to(dtype)
    mixed = torch.tensor([[1., 0], [0, 1], [-1, 1]], dtype=dtype) * norms
    assert class_margin(mixed).item() == pytest.approx(math.pi / 4, abs=2e-7)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_class_margin_from_zero_to_pi(dtype):
    assert class_margin(torch.tensor([[1., 1], [2, 2], [-1, 0]], dtype=dtype)) == pytest.approx(0, abs=1e-7)
    assert class_margin(torch.tensor([[1., 2], [-2, -4]], dtype=dtype)) == pytest.approx(math.pi, abs=2e-7)
    assert class_margin(torch.eye(5, dtype=dtype)) == pytest.approx(math.pi / 2, abs=2e-7)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert class_margin(torch.eye(5, dtype=dtype)).dtype == expected
    assert class_margin(torch.eye(5, dtype=dtype)).shape == ()


def test_class_margin_is_differentiable():
    torch.manual_seed(0)
    prototypes = (torch.randn(6, 3, dtype=torch.float64) * torch.tensor([1, 2, .5, 3, 1, 1])[:, None])
    assert gradcheck(class_margin, prototypes.requires_grad_())
    gradient, = torch.autograd.grad(class_margin(prototypes), prototypes)
    assert gradient.any(1).sum() == 2  # only the closest pair moves
    near = torch.tensor([[2., 0], [2 * math.cos(1e-6), 2 * math.sin(1e-6)]], requires_grad=True)
    gradient, = torch.autograd.grad(class_margin(near), near)
    assert gradient.norm(dim=1).tolist() == pytest.approx([.5, .5], rel=1e-6)  # 1 / norm, apart along the tangent
    assert gradient[0, 1] < 0 < gradient[1, 1]


def test_class_margin_where_there_is_no_float64(monkeypatch):
    "As on Apple's GPUs: of pairs whose cosines are 1 in float32, the closest is found by its chord."
    monkeypatch.setattr(margins, 'precise', lambda x: torch.float32)
    apart = torch.tensor([4e-5, 1e-5, 7e-5])
    first = torch.eye(3)
    second = first + apart[:, None] * first.roll(1, 1)
    assert class_margin(torch.cat([first, second])).item() == pytest.approx(1e-5, rel=1e-4)


# --- class margin: two passes, float32 and float64 ---

def brute_pairs(prototypes):
    "All angles in float64 by chords, by no product; π on the diagonal."
    unit = prototypes.double() / prototypes.double().abs().amax(1, keepdim=True)
    unit /= unit.norm(dim=1, keepdim=True)
    chords = torch.cdist(unit, unit, compute_mode='donot_use_mm_for_euclid_dist')
    return (2 * (chords / 2).clamp(max=1).asin()).fill_diagonal_(math.pi)


def frame(d): return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q


def bent_axes(d):
    "Equal angles but for the last pair, so that the first row of tiles shows nothing of it."
    rows = torch.eye(d)
    rows[-1, -2] = .3
    return rows


def cluster(k, d, radius):
    return torch.randn(d, dtype=torch.float64) + radius * torch.randn(k, d, dtype=torch.float64)


ARRANGEMENTS = {
    'random': lambda: torch.randn(1100, 24),
    'orthonormal frame': lambda: frame(700),
    'frame but for one pair': lambda: bent_axes(700),
    'axes': lambda: torch.eye(700),
    'cross-polytope': lambda: torch.cat([frame(400), -frame(400)]),
    'simplex': lambda: (torch.eye(700, dtype=torch.float64) - 1 / 700) @ frame(700),
    'all the same': lambda: torch.randn(1, 32).repeat(1100, 1),
    'two the same': lambda: torch.randn(1100, 32).index_copy_(0, torch.tensor([1099]), torch.ones(1, 32)).index_copy_(
        0, torch.tensor([3]), torch.full((1, 32), 2.)),
    'one cluster': lambda: cluster(1100, 40, 1e-7),
    'clusters': lambda: torch.cat([cluster(20, 40, r) for r in torch.logspace(-7, 0, 60).tolist()]),
    'nearly an orthonormal frame': lambda: frame(700) + 1e-7 * torch.randn(700, 700),
    'two opposite': lambda: torch.cat([cluster(1, 20, 0).repeat(600, 1), -cluster(1, 20, 0).repeat(600, 1)]),
}


@pytest.mark.parametrize('name, dtype, orders', pairs(
    list(ARRANGEMENTS), [torch.float32, torch.float64, torch.bfloat16], [0, 30]), ids=named)
def test_class_margin_of_hard_arrangements(name, dtype, orders):
    "With norms of one size, and from 1e-30 to 1e30 (1e-180 to 1e180 in float64)."
    torch.manual_seed(0)
    prototypes = ARRANGEMENTS[name]().double()
    if dtype == torch.float64: orders *= 6
    norms = 10 ** (orders * (2 * torch.rand(len(prototypes), 1, dtype=torch.float64) - 1))
    prototypes = (prototypes * norms).to(dtype)
    rounding = 0 if dtype == torch.float64 else 2**-23  # of the answer, at most π
    assert abs(class_margin(prototypes).item() - brute_pairs(prototypes).min().item()) <= 1e-7 + rounding


@settings(max_examples=80, deadline=None, derandomize=True)
@given(k=st.integers(2, 1700), d=st.integers(1, 12), seed=st.integers(0, 2**20), levels=st.integers(1, 4),
       dtype=st.sampled_from(DTYPES), repeated=st.integers(0, 3))
def test_class_margin_of_any_number_of_prototypes(k, d, seed, levels, dtype, repeated):
    "On a grid, so that many pairs are equally close, and with some rows used twice."
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randint(-levels, levels + 1, (k, d), generator=generator).double()
    prototypes[prototypes.eq(0).all(1), 0] = 1
    rows = torch.randint(k, (2, repeated), generator=generator)
    prototypes[rows[0]] = prototypes[rows[1]] * 2
    expected = brute_pairs(prototypes).min().item()
    assert abs(class_margin(prototypes.to(dtype)).item() - expected) <= 1e-7 + 2**-23


@pytest.mark.parametrize('precision, bound', [('ieee', 64 * 2**-24), ('bf16', 2**-7)])
@pytest.mark.parametrize('seed', range(3))
def test_class_margin_survives_the_worst_rounding(monkeypatch, precision, bound, seed):
    """Float32 products as wrong as they may be: the closest pair's too small, all others too large.

    Nineteen pairs in other tiles are nearly as close. Bfloat16 is what torch may be told to round to.
    """
    torch.manual_seed(seed)
    k, d = 2000, 64
    prototypes = torch.randn(k, d, dtype=torch.float64)
    for i, (first, second) in enumerate([(900, 1000), *((37 * j, k - 1 - 53 * j) for j in range(19))]):
        axis, side = torch.linalg.qr(torch.randn(d, 2, dtype=torch.float64)).Q.T
        angle = .3 + 1e-6 * i
        prototypes[first], prototypes[second] = axis, math.cos(angle) * axis + math.sin(angle) * side
    prototypes = (prototypes * (1 + torch.rand(k, 1))).float()
    angles, product = brute_pairs(prototypes), torch.mm
    closest = prototypes[[900, 1000]]
    assert angles.argmin() == 900 * k + 1000

    def wrong(left, right):
        out = product(left, right)
        if out.dtype == torch.float64: return out
        ours = (left[:, None] == closest).all(2).any(1)
        return out.add_(torch.where(ours, -bound, bound)[:, None] * left.norm(dim=1, keepdim=True))
    monkeypatch.setattr(torch, 'mm', wrong)
    kept, torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision, precision
    try: assert abs(class_margin(prototypes).item() - angles.min().item()) <= 1e-7
    finally: torch.backends.mkldnn.matmul.fp32_precision = kept


def test_autocast_changes_no_class_margin():
    torch.manual_seed(0)
    prototypes = torch.randn(1100, 8)
    expected = class_margin(prototypes)
    with torch.autocast('cpu', torch.bfloat16): assert class_margin(prototypes) == expected


def test_class_margin_of_many_is_differentiable():
    "Two of 1200 move, as if they were alone."
    torch.manual_seed(0)
    prototypes = torch.randn(1200, 16).requires_grad_()
    class_margin(prototypes).backward()
    rows = prototypes.grad.any(1).nonzero()[:, 0]
    angles = brute_pairs(prototypes.detach())
    assert sorted(rows.tolist()) == sorted(divmod(angles.argmin().item(), 1200))
    pair = prototypes.detach()[rows].requires_grad_()
    class_margin(pair).backward()
    assert torch.allclose(pair.grad, prototypes.grad[rows], rtol=1e-6)


def test_class_margin_of_any_layout():
    "Rows that are columns of another tensor, or every other row of one."
    torch.manual_seed(0)
    wide = torch.randn(16, 2400)
    assert class_margin(wide.T[::2]) == class_margin(wide.T[::2].contiguous())


# --- memory ---

@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read from /proc')
@pytest.mark.parametrize('name, k, d, gradients', [
    ('class margin', 20_000, 128, 0), ('norm ratio', 500_000, 64, 0), ('zero centroid', 500_000, 64, 32_000_000)])
def test_peak_memory(name, k, d, gradients):
    "At most 32 MiB in a fresh process; the prototypes take 10 and 122 MiB, a matrix of cosines would take 1.5 GiB."
    _, added = run_alone(interpret, BENCHMARK, '--peak', name, '--shape', f'{k}x{d}')
    assert int(added) - 4 * gradients < 32 * 2**20


# --- sample margins ---

def brute_margins(cosines, targets):
    return [row[y] - max(c for j, c in enumerate(row) if j != y) for row, y in zip(cosines.tolist(), targets.tolist())]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_sample_margins_are_brute_force(data):
    n, k = data.draw(st.integers(1, 8)), data.draw(st.integers(2, 6))
    dtype = data.draw(st.sampled_from(DTYPES))
    values = st.sampled_from([-1, 0, 1]) | st.floats(-1, 1)
    numbers = data.draw(st.lists(values, min_size=n * k, max_size=n * k))
    cosines = torch.tensor(numbers, dtype=torch.float64).to(dtype).view(n, k)
    targets = torch.tensor(data.draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n)),
                           dtype=data.draw(st.sampled_from([torch.long, torch.int32, torch.uint8])))
    expected = brute_margins(cosines.double(), targets)
    margins = sample_margins(cosines, targets)
    assert margins.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert margins.tolist() == pytest.approx(expected, abs=1e-6)
    of_class = [min((m for m, y in zip(expected, targets.tolist()) if y == j), default=math.inf) for j in range(k)]
    assert class_sample_margins(cosines, targets).tolist() == pytest.approx(of_class, abs=1e-6)
    assert min_sample_margin(cosines, targets).item() == pytest.approx(min(expected), abs=1e-6)
    assert min_sample_margin(cosines, targets) == class_sample_margins(cosines, targets).min()
    losses = SampleMarginLoss(reduction='none')(cosines, targets)
    assert torch.equal(losses, -margins)


def test_sample_margins_are_differentiable():
    torch.manual_seed(0)
    cosines = (1.9 * torch.rand(6, 4).double() - .95).requires_grad_()
    targets = torch.tensor([0, 1, 1, 3, 0, 2])
    for margin in (sample_margins, min_sample_margin, class_sample_margins):
        assert gradcheck(lambda c, margin=margin: margin(c, targets), cosines)


def test_tied_wrong_classes_share_the_gradient():
    cosines = torch.tensor([[.5, .2, .2, .1]], requires_grad=True)
    sample_margins(cosines, torch.tensor([0])).sum().backward()
    assert cosines.grad.tolist() == [[1, -.5, -.5, 0]]


def test_the_own_cosine_is_no_rival():
    "Not even where all others are at −1."
    cosines = torch.tensor([[1., -1.], [-1., -1.]], requires_grad=True)
    margins = sample_margins(cosines, torch.tensor([0, 1]))
    margins.sum().backward()
    assert margins.tolist() == [2, 0]
    assert cosines.grad.tolist() == [[1, -1], [-1, 1]]


# --- norms ---

@pytest.mark.parametrize('dtype, norm', NORMS, ids=str)
def test_norm_ratio_of_any_norm(dtype, norm):
    prototypes = torch.tensor([[3., 4], [1, 0], [0, 2]], dtype=dtype) * norm
    assert norm_ratio(prototypes).item() == pytest.approx(5, rel=1e-2 if dtype.itemsize == 2 else 1e-6)
    assert norm_ratio(prototypes).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm_ratio(torch.eye(3, dtype=dtype) * norm) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_norm_ratio_of_many_in_blocks(dtype):
    torch.manual_seed(0)
    prototypes = torch.randn(9000, 100).to(dtype)
    norms = prototypes.double().norm(dim=1)
    assert norm_ratio(prototypes).item() == pytest.approx((norms.max() / norms.min()).item(), rel=2e-7)


def test_norm_ratio_is_differentiable():
    torch.manual_seed(0)
    assert gradcheck(norm_ratio, torch.randn(6, 3, dtype=torch.float64).requires_grad_())


# --- bad input ---

@pytest.mark.parametrize('margin', [class_margin, norm_ratio])
def test_bad_prototypes_are_refused(margin):
    good = torch.randn(3, 2)
    def with_row(row): return torch.cat([good, torch.tensor([row])])
    for prototypes, error, shown in (
            ([[1., 0]], TypeError, 'list'), (torch.ones(3, 2).long(), TypeError, 'int64'),
            (torch.ones(3, 2, dtype=torch.complex64), TypeError, 'complex64'),
            (good[0], ValueError, r'\(2,\)'), (good[None], ValueError, r'\(1, 3, 2\)'),
            (good[:1], ValueError, r'\(1, 2\)'), (good[:0], ValueError, r'\(0, 2\)'),
            (good[:, :0], ValueError, r'\(3, 0\)')):
        with pytest.raises(error, match=f'^prototypes must .*got .*{shown}'): margin(prototypes)
    for row in ([math.nan, 0.], [0., math.inf], [0., 0.]):
        with pytest.raises(ValueError, match='^prototypes must .*row 3'): margin(with_row(row))


@pytest.mark.parametrize('margin', [sample_margins, class_sample_margins, min_sample_margin])
def test_bad_cosines_are_refused(margin):
    cosines, targets = torch.eye(3), torch.arange(3)
    for bad, error, shown in (
            ((cosines.tolist(), targets), TypeError, 'list'), ((cosines.long(), targets), TypeError, 'int64'),
            ((cosines[0], targets), ValueError, r'\(3,\)'), ((cosines[:0], targets[:0]), ValueError, r'\(0, 3\)'),
            ((cosines[:, :1], targets * 0), ValueError, r'\(3, 1\)'), ((cosines * 2, targets), ValueError, '2'),
            ((cosines / 0, targets), ValueError, 'nan'), ((cosines - 1.01, targets), ValueError, '-1.01')):
        with pytest.raises(error, match=f'^cosines must .*got .*{shown}'): margin(*bad)
    for bad, error, shown in (
            (targets.tolist(), TypeError, 'list'), (targets.float(), TypeError, 'float32'),
            (targets[:2], ValueError, r'\(2,\)'), (targets + 1, ValueError, '3'), (targets - 1, ValueError, '-1')):
        with pytest.raises(error, match=f'^targets must .*got .*{shown}'): margin(cosines, bad)


def test_no_value_is_read_on_a_gpu():
    with FakeTensorMode():  # raises where a number would have to be known
        prototypes = torch.rand(2500, 3, device='cuda')
        cosines, targets = torch.rand(7, 4, device='cuda'), torch.zeros(7, dtype=torch.long, device='cuda')
        assert class_margin(prototypes).device.type == norm_ratio(prototypes).device.type == 'cuda'
        assert sample_margins(cosines, targets).shape == (7,)
        assert class_sample_margins(cosines, targets).shape == (4,)
        assert min_sample_margin(cosines, targets).shape == ()
        with pytest.raises(ValueError, match='^prototypes must'): class_margin(prototypes[0])


def test_neural_collapse_is_the_definition():
    "With NumPy, class by class; the classes have 2, 7 and 30 samples, so that no mean is one over all samples."
    rng = np.random.default_rng(0)
    targets = np.repeat(np.arange(3), [2, 7, 30])
    features, prototypes = rng.standard_normal((39, 5)) + 2 * np.eye(3, 5)[targets], rng.standard_normal((3, 5))
    groups = [features[targets == c] for c in range(3)]
    means = np.stack([g.mean(0) for g in groups])
    within = np.mean([np.cov(g.T, bias=True) for g in groups], 0)
    between = np.cov(means.T, bias=True)
    centred, simplex = means - means.mean(0), (np.eye(3) - 1 / 3) / 2**.5
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-9)) / 3
    nc2, nc3 = (np.linalg.norm(g / np.linalg.norm(g) - simplex) for g in (centred @ centred.T, prototypes @ centred.T))
    by_mean = np.linalg.norm(features[:, None] - means, axis=2).argmin(1)
    by_prototype = (features @ (prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)).T).argmax(1)
    found = neural_collapse(torch.tensor(features), torch.tensor(targets), torch.tensor(prototypes))
    assert [x.item() for x in found] == pytest.approx([nc1, nc2, nc3, np.mean(by_mean != by_prototype)], rel=1e-9)
    assert 0 < found.nc4 < 1


@pytest.mark.parametrize('dtype, size', [(torch.float64, 1e200), (torch.float64, 1e-200), (torch.float32, 3e37)])
def test_neural_collapse_of_any_size(dtype, size):
    "No square leaves the range."
    features, targets, prototypes = torch.randn(9, 3).to(dtype), torch.arange(9) % 3, torch.randn(3, 3).to(dtype)
    usual = torch.stack(neural_collapse(features, targets, prototypes))
    for found in (neural_collapse(features * size, targets, prototypes),
                  neural_collapse(features, targets, prototypes * size)):
        torch.testing.assert_close(torch.stack(found), usual, rtol=1e-5, atol=1e-6)
