"Optima: certificates, the ratio at which rare classes merge, and what a finite scale guarantees."
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from largest_margins.claims import descend
from largest_margins.codes import best_packing, simplex
from largest_margins.losses import (
    ArcFaceLoss,
    CosFaceLoss,
    GMSoftmaxLoss,
    LDAMLoss,
    LMSoftmaxLoss,
    NormFaceLoss,
    SampleMarginLoss,
    SphereFaceLoss,
)
from largest_margins.margins import class_margin, min_sample_margin
from largest_margins.regularizers import zero_centroid
from largest_margins.theory.finite_scales import (
    admissible_margin,
    guaranteed_margin,
    residual_centroid,
    scale_for_margin,
)
from largest_margins.theory.optima import certify_optimum, class_frequencies, collapse_ratio

COUNTS = torch.tensor([50., 20, 5, 2, 1], dtype=torch.float64)
CONVEX = [NormFaceLoss(6., weight=COUNTS), CosFaceLoss(6., .3, weight=COUNTS), LDAMLoss(COUNTS, 6.),
          GMSoftmaxLoss(6., .7, .5, .1, .2, weight=COUNTS), LMSoftmaxLoss(6., weight=COUNTS),
          LMSoftmaxLoss(6., 'logsumexp', weight=COUNTS), NormFaceLoss(6., reduction='sum'), SampleMarginLoss()]


def rows(seed, *shape):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


# --- certificates ---

@pytest.mark.parametrize('loss', CONVEX, ids=repr)
@pytest.mark.parametrize('strength', [0., 3.])
def test_nothing_is_below_the_bound_in_any_dimension(loss, strength):
    targets = torch.arange(5).repeat(2)

    def value(W, Z): return (loss(Z @ W.T, targets) + strength * zero_centroid(W)).item()
    _, W, Z = descend(lambda W, Z: loss(Z @ W.T, targets) + strength * zero_centroid(W), rows(0, 5, 3), rows(1, 10, 3),
                      iterations=60)
    places = [(W, Z), (rows(2, 5, 3), rows(3, 10, 3))]
    lowest = min(descend(lambda W, Z: loss(Z @ W.T, targets) + strength * zero_centroid(W), rows(s, 5, d),
                         rows(s + 9, 10, d), iterations=200)[0] for s, d in ((4, 2), (6, 7), (7, 12)))
    for W, Z in places:
        found = certify_optimum(loss, W, Z, targets, centroid=strength)
        assert found.value == pytest.approx(value(W, Z), abs=1e-12)
        assert found.bound <= lowest + 1e-9 and found.gap >= -1e-12


@pytest.mark.parametrize('loss', CONVEX[:-1], ids=repr)
@pytest.mark.parametrize('strength', [0., 3.])
def test_with_more_dimensions_than_classes_descents_reach_the_optimum(loss, strength):
    targets, values = torch.arange(5), []
    for seed in range(3):
        start = rows(seed, 5, 6), rows(seed + 9, 5, 6)
        for _ in range(2):
            _, *start = descend(lambda W, Z: loss(Z @ W.T, targets) + strength * zero_centroid(W), *start,
                                iterations=2000)
        found = certify_optimum(loss, *start, centroid=strength)
        assert found.gap < 1e-5 * max(1, abs(found.value)) and found.eigenvalue > -1e-4
        values.append(found.value)
    assert max(values) - min(values) < 1e-6


def test_a_rest_in_few_dimensions_has_a_gap():
    loss, targets = LMSoftmaxLoss(5., weight=class_frequencies(6, 100, 'step')), torch.arange(6)
    value, W, Z = descend(lambda W, Z: loss(Z @ W.T, targets), rows(0, 6, 2), rows(1, 6, 2))
    best, *_ = descend(lambda W, Z: loss(Z @ W.T, targets), rows(0, 6, 7), rows(1, 6, 7))
    found = certify_optimum(loss, W, Z)
    assert found.gap > value - best - 1e-9 > 1e-3 and found.eigenvalue < -1e-3


def test_all_prototypes_in_one_point_are_no_optimum():
    W = torch.eye(6, dtype=torch.float64)[:1].expand(5, 6)
    found = certify_optimum(LMSoftmaxLoss(5.), W, rows(0, 5, 6))
    assert found.gap > .1 and math.isfinite(found.bound)


def test_weights_are_sample_counts_and_norms_do_not_matter():
    W, Z = rows(0, 5, 6), rows(1, 5, 6)
    counts = COUNTS.long()
    by_weight = certify_optimum(NormFaceLoss(6., weight=COUNTS), W, Z)
    targets = torch.arange(5).repeat_interleave(counts)
    by_samples = certify_optimum(NormFaceLoss(6.), 7 * W, 3 * Z[targets], targets)
    assert by_weight.value == pytest.approx(by_samples.value, abs=1e-12)
    assert by_weight.bound == pytest.approx(by_samples.bound, abs=1e-9)
    single = certify_optimum(NormFaceLoss(6., weight=COUNTS), W.float(), Z.float())
    assert single.bound == pytest.approx(by_weight.bound, abs=1e-4)


@pytest.mark.parametrize('loss', [ArcFaceLoss(6., .5), ArcFaceLoss(64., .1), SphereFaceLoss(6., 1.35),
                                  lambda cosines, targets: (cosines**2).sum().neg()],
                         ids=['ArcFace', 'ArcFace at 64', 'SphereFace', 'concave'])
def test_what_is_not_convex_is_refused(loss):
    with pytest.raises(ValueError, match='convex'): certify_optimum(loss, rows(0, 5, 6), rows(1, 5, 6))


def test_arguments_of_the_certificate():
    loss, W, Z = NormFaceLoss(6.), rows(0, 5, 6), rows(1, 5, 6)
    for wrong in (dict(features=Z[:, 1:]), dict(features=Z[:3]), dict(features=Z * math.nan), dict(prototypes=W[:1]),
                  dict(targets=torch.arange(5) + 1), dict(centroid=-1.), dict(centroid=math.inf),
                  dict(centroid=math.nan)):
        with pytest.raises(ValueError): certify_optimum(loss, **{**dict(prototypes=W, features=Z), **wrong})
    with pytest.raises(TypeError): certify_optimum(loss, W.tolist(), Z)


# --- merging ---

@pytest.mark.parametrize('s,B', [(.3, 2), (1., 3), (2., 10), (8., 5)])
def test_one_frequent_class_has_closed_ratios(s, B):
    E = math.exp(-2 * s)
    square = (B + E)**2 - 2 * E**2
    assert collapse_ratio(LMSoftmaxLoss(s), 1, B) == pytest.approx(B * square / (2 * E * (B - 1 + E)), rel=1e-9)
    expected = square * (1 + B * E) / (2 * E**2 * (B + E))
    assert collapse_ratio(NormFaceLoss(s), 1, B) == pytest.approx(expected, rel=1e-7)
    assert collapse_ratio(CosFaceLoss(s, 0.), 1, B) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize('loss,A,B', [(LMSoftmaxLoss(1.), 2, 3), (CosFaceLoss(1., .35), 1, 3),
                                      (NormFaceLoss(.5), 4, 2)])
def test_optima_merge_above_the_ratio_and_not_below(loss, A, B):
    ratio, k = collapse_ratio(loss, A, B), A + B
    angles = []
    for factor in (.9, 1.1):
        weighted = type(loss)(**{**({'margin': loss.margin} if hasattr(loss, 'margin') else {}), 'scale': loss.scale,
                                 'weight': torch.tensor([factor * ratio] * A + [1.] * B).double()})
        start = rows(0, k, k + 1), rows(1, k, k + 1)
        for _ in range(2):
            _, *start = descend(lambda W, Z, f=weighted: f(Z @ W.T, torch.arange(k)), *start, iterations=2000)
        angles.append(class_margin(start[0]).rad2deg().item())
    assert angles[0] > 1 and angles[1] < .05


def test_weights_do_not_count_and_classes_of_one_size_must_be_alike():
    plain = collapse_ratio(LMSoftmaxLoss(1.), 1, 2)
    for reduction in ('mean', 'sum'):
        loss = LMSoftmaxLoss(1., weight=torch.tensor([9., 1, 1]), reduction=reduction)
        assert collapse_ratio(loss, 1, 2) == plain and len(loss.weight) == 3
    assert collapse_ratio(LDAMLoss([9, 9, 1, 1], 5.), 2, 2) > 1
    for loss in (LDAMLoss([9, 1, 1, 1], 5.), NormFaceLoss(5., prior=[9, 1, 1, 1]), NormFaceLoss(5., sample_margin=.5),
                 NormFaceLoss(5., reduction='none')):
        with pytest.raises(ValueError, match='loss must'): collapse_ratio(loss, 2, 2)
    with pytest.raises(ValueError, match='one number'):
        certify_optimum(NormFaceLoss(6., reduction='none'), rows(0, 5, 6), rows(1, 5, 6))


def test_ratios_rise_with_the_scale():
    for A, B in ((2, 2), (9, 2)):
        ratios = [collapse_ratio(LMSoftmaxLoss(s), A, B) for s in (.5, 1., 4.)]
        assert all(1 < a < b for a, b in zip(ratios, ratios[1:]))


def test_what_never_merges_and_what_is_refused():
    assert collapse_ratio(LMSoftmaxLoss(5., reduction='class-mean'), 5, 5) == math.inf
    assert collapse_ratio(SampleMarginLoss(), 3, 3) == math.inf
    for wrong in ((LMSoftmaxLoss(5., 'logsumexp'), 5, 5), (ArcFaceLoss(5., .5), 5, 5), (NormFaceLoss(5.), 0, 5),
                  (NormFaceLoss(5.), 5, 1), (GMSoftmaxLoss(5., .7, .5), 5, 5), (NormFaceLoss(5e-4), 2, 2)):
        with pytest.raises(ValueError): collapse_ratio(*wrong)
    for wrong in (2., True, '2'):
        with pytest.raises(TypeError): collapse_ratio(NormFaceLoss(5.), wrong, 5)
    assert collapse_ratio(NormFaceLoss(1.), np.int64(2), 3) == collapse_ratio(NormFaceLoss(1.), 2, 3)


# --- finite scales ---

def test_a_guarantee_is_the_solution_of_its_equation():
    for counts in (None, [5, 3, 1, 1, 7, 2, 2, 9]):
        p = 1 / 8 if counts is None else 1 / 30
        for s, m in ((5., 0.), (20., .3), (64., -.2), (30., .9)):
            rho, _ = admissible_margin(8, 3)
            gamma = guaranteed_margin(8, 3, s, margin=m, class_counts=counts)
            left = p * math.log1p(math.exp(-s * (gamma - m)))
            assert left == pytest.approx(math.log1p(7 * math.exp(-s * (rho - m))), rel=1e-9)
            if m < rho and s >= math.log(7 / p) / (rho - m): assert gamma >= rho - math.log(14 / p) / s


def test_guarantees_rise_with_the_scale_to_the_largest_margin_and_fall_with_imbalance():
    scales = np.geomspace(.01, 1e6, 40)
    for m in (0., .5):
        found = [guaranteed_margin(10, 16, s, margin=m) for s in scales]
        assert all(a < b for a, b in zip(found, found[1:])) and found[-1] == pytest.approx(10 / 9, abs=1e-4)
    counts = [100] + [1] * 9
    assert guaranteed_margin(10, 16, 20., class_counts=counts) < guaranteed_margin(10, 16, 20.)
    assert math.isfinite(guaranteed_margin(10, 16, 1e-3, margin=50.))


@pytest.mark.parametrize('m', [0., .35])
def test_optima_keep_what_is_guaranteed(m):
    weight = class_frequencies(6, 20, 'step')
    for k_d in ((6, 2), (6, 8)):
        d = k_d[1]
        W, Z = rows(0, 6, d), rows(1, 6, d)
        for s in (5., 15., 40.):
            loss = CosFaceLoss(s, m, weight=weight)
            _, W, Z = descend(lambda W, Z, f=loss: f(Z @ W.T, torch.arange(6)).log() / f.scale, W, Z, iterations=2000)
        reached = min_sample_margin(Z @ W.T, torch.arange(6)).item()
        low, (best, _) = guaranteed_margin(6, d, 40., margin=m, class_counts=weight), admissible_margin(6, d)
        assert 0 < low <= reached <= best + 1e-9


def test_a_scale_for_a_margin_is_the_smallest():
    for options in ({}, dict(margin=.3), dict(class_counts=range(1, 11))):
        s = scale_for_margin(10, 64, .8, **options)
        assert guaranteed_margin(10, 64, s, **options) >= .8 * 10 / 9 - 1e-12
        assert guaranteed_margin(10, 64, .999 * s, **options) < .8 * 10 / 9
    with pytest.raises(ValueError, match='margin'): scale_for_margin(10, 2, margin=.35)


def test_admissible_margins_are_reached_and_bounded():
    for k, d in ((2, 2), (5, 8), (7, 3), (12, 2), (9, 5), (10, 5)):
        low, high = admissible_margin(k, d)
        assert low == pytest.approx(1 - math.cos(best_packing(k, d).class_margin), abs=1e-12) and low <= high
    many = [admissible_margin(k, 100)[0] for k in (10**3, 10**4, 10**6, 10**9)]
    assert all(a > b > 0 for a, b in zip(many, many[1:]))
    assert all(admissible_margin(k, 100)[1] >= low for k, low in zip((10**3, 10**4), many))


def test_a_greedy_choice_finds_as_many_points_as_the_caps_say():
    low, _ = admissible_margin(1001, 3)
    assert low == pytest.approx(2 / 1000, rel=1e-9) and type(low) is float
    assert admissible_margin(10**18, 3)[0] == pytest.approx(2e-18, rel=1e-9)
    # in 3 dimensions a cap of angle δ has the share (1 − cos δ)/2


@pytest.mark.parametrize('call', [admissible_margin, lambda k, d: guaranteed_margin(k, d, 20.), scale_for_margin])
def test_sizes_are_checked(call):
    for wrong in ((1, 3), (3, 1), (0, 3)):
        with pytest.raises(ValueError): call(*wrong)
    assert type(call(torch.tensor(2), np.int64(3))) is type(call(2, 3))
    for wrong in ((2., 3), (True, 3), ('3', 3), ([2], 3)):  # 2.0 also after 2
        with pytest.raises(TypeError): call(*wrong)


def test_numbers_of_the_guarantee_are_checked():
    for wrong in (dict(scale=0.), dict(scale=math.inf), dict(scale=math.nan), dict(margin=math.nan),
                  dict(class_counts=[1, 2]), dict(class_counts=[0] + [1] * 9), dict(class_counts=[math.nan] + [1] * 9)):
        with pytest.raises(ValueError): guaranteed_margin(**{**dict(num_classes=10, dimension=64, scale=20.), **wrong})
    for fraction in (0., 1., 2.):
        with pytest.raises(ValueError): scale_for_margin(10, 64, fraction)
    with pytest.raises(TypeError): guaranteed_margin(10, 64, '20')


# --- the zero centroid ---

@pytest.mark.parametrize('loss', [LMSoftmaxLoss(3.), LMSoftmaxLoss(30.), CosFaceLoss(4., .35), NormFaceLoss(3.)])
@pytest.mark.parametrize('counts', [[9., 3, 2, 1], [1., 1, 1, 50, 50]])
def test_the_centroid_that_a_large_weight_leaves(loss, counts):
    k, targets, weight = len(counts), torch.arange(len(counts)), torch.tensor(counts).double()
    options = dict(margin=loss.margin) if hasattr(loss, 'margin') else {}
    weighted = type(loss)(loss.scale, weight=weight, **options)
    start, strength = simplex(k, k), 1e4
    _, W, _ = descend(lambda W, Z: weighted(Z @ W.T, targets) + strength * zero_centroid(W), start.clone(),
                      start.clone(), iterations=3000)
    assert strength * W.mean(0).norm().item() == pytest.approx(residual_centroid(loss, counts), rel=2e-3)


def test_the_centroid_is_that_of_a_mean_over_samples_of_a_loss_that_treats_classes_alike():
    plain = residual_centroid(LMSoftmaxLoss(9.), [9, 1, 1])
    for options in (dict(aggregation='logsumexp'), dict(weight=torch.tensor([5., 2, 3]), reduction='sum')):
        assert residual_centroid(LMSoftmaxLoss(9., **options), [9, 1, 1]) == pytest.approx(plain, rel=1e-9)
    assert residual_centroid(LMSoftmaxLoss(9., reduction='class-mean'), [9, 1, 1]) == 0
    for loss in (ArcFaceLoss(9., .5), SphereFaceLoss(9., 1.35), LDAMLoss([9, 1, 1], 9.), SampleMarginLoss(),
                 NormFaceLoss(9., prior=[9, 1, 1]), GMSoftmaxLoss(9., .7, .5), NormFaceLoss(9., sample_margin=.5)):
        with pytest.raises(ValueError, match='loss must'): residual_centroid(loss, [9, 1, 1])


def test_equal_shares_and_two_classes_leave_nothing():
    assert residual_centroid(LMSoftmaxLoss(), [7] * 9) == pytest.approx(0, abs=1e-7)
    assert residual_centroid(LMSoftmaxLoss(), [100, 1]) == 0
    W = rows(0, 2, 3)
    loss = LMSoftmaxLoss(5., weight=torch.tensor([100., 1]))
    _, W, _ = descend(lambda W, Z: loss(Z @ W.T, torch.arange(2)) + zero_centroid(W), W, rows(1, 2, 3))
    assert class_margin(W).item() == pytest.approx(math.pi, abs=1e-6)
    for wrong in ([1], [[1, 2, 3]], [1, 0, 2], [1, math.inf, 2]):
        with pytest.raises(ValueError): residual_centroid(LMSoftmaxLoss(), wrong)
