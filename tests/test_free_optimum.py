"Free optima against the paper's printed angles, their own symmetries, and what is refused."
import math

import pytest
import torch

from largest_margins.data import imbalanced_counts
from largest_margins.losses import ArcFaceLoss, CosFaceLoss, LDAMLoss, LMSoftmaxLoss, NormFaceLoss
from largest_margins.theory.free_optimum import fit_scale, free_optimum

SETTINGS = {'long-tailed': (100, 10), 'step': (100, 10)}
COUNTS = [imbalanced_counts(5000, 10, ratio, kind) for kind, ratios in SETTINGS.items() for ratio in ratios]
PRINTED = {  # the class margins of the paper's Table 2, CIFAR-10: degrees
    'NormFace': (62.72, 82.60, 51.00, 77.82), 'LDAM': (73.30, 88.19, 61.42, 85.21),
    'CosFace': (58.77, 81.61, None, 75.96)}
MAKE = {'NormFace': lambda n: NormFaceLoss(5.), 'LDAM': lambda n: LDAMLoss(n, 5., max_margin=.5),
        'CosFace': lambda n: CosFaceLoss(5., .35)}


@pytest.mark.parametrize('name', PRINTED)
def test_the_paper_s_angles_are_optima_at_scale_five(name):
    for counts, printed in zip(COUNTS, PRINTED[name], strict=True):
        if printed is None: continue
        found = free_optimum(MAKE[name](counts), counts)
        assert math.degrees(found.class_margin) == pytest.approx(printed, abs=.35) and found.gap < 1e-7


def test_another_scale_misses_by_half_a_degree():
    for s in (4.9, 5.1):
        found = math.degrees(free_optimum(NormFaceLoss(s), COUNTS[0]).class_margin)
        assert abs(found - PRINTED['NormFace'][0]) > .4


def test_a_fit_finds_the_scale_that_made_the_angles():
    made = [(NormFaceLoss(9.), n, math.degrees(free_optimum(NormFaceLoss(7.), n).class_margin)) for n in COUNTS[:2]]
    fit = fit_scale(made)
    assert fit.scale == pytest.approx(7., abs=1e-2) and max(map(abs, fit.residuals)) < 1e-2
    with pytest.raises(ValueError, match='two or more'): fit_scale(made[:1])


def test_no_scale_fits_angles_that_do_not_depend_on_it():
    even = [(NormFaceLoss(5.), [1, 1, 1], degrees) for degrees in (100., 110.)]
    with pytest.raises(ArithmeticError, match='do not depend'): fit_scale(even)


def test_only_ratios_of_counts_matter_and_the_loss_is_left_alone():
    loss = LMSoftmaxLoss(5., weight=torch.ones(4))
    one, ten = (free_optimum(loss, [f * n for n in (8, 4, 2, 1)]).class_margin for f in (1, 10))
    assert one == pytest.approx(ten, abs=1e-5) and torch.equal(loss.weight, torch.ones(4))
    even = free_optimum(LMSoftmaxLoss(5., reduction='class-mean'), (8, 4, 2, 1)).class_margin
    assert even == pytest.approx(math.acos(-1 / 3), abs=1e-4) and one < even


@pytest.mark.parametrize('make', [LMSoftmaxLoss, NormFaceLoss, lambda s: CosFaceLoss(s, .35)])
def test_large_scales_and_ratios_have_optima_too(make):
    "Where a descent from random points ends early, and the loss is far below one."
    for s, ratio in ((30., 1e4), (128., 10.)):
        counts = [ratio ** (-n / 4) for n in range(5)]
        found = free_optimum(make(s), counts)
        assert found.gap < 1e-4 * abs(found.value)


def test_what_cannot_be_certified_is_not():
    assert free_optimum(ArcFaceLoss(5., .3), [1, 1, 1]).gap is None


@pytest.mark.parametrize('arguments, message', [
    ((NormFaceLoss(5.), [1]), 'class_counts'), ((NormFaceLoss(5.), [1, 0]), 'class_counts'),
    ((NormFaceLoss(5., sample_margin=.5), [1, 1]), 'smooth')])
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message): free_optimum(*arguments)
