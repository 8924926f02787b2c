"Every loss against formulas written out again, at the edges, in its limits, and against bad input."
import copy
import inspect
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_family import (
    ANGULAR,
    COUNTS,
    FAMILY,
    ON_COSINES,
    SMOOTHABLE,
    adaface,
    batch,
    ignoring,
    ldam_margin,
    quality,
    reduced,
)
from mpmath import mp, mpf
from pairs import named, pairs
from pytorch_metric_learning import losses as metric_learning
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.nn import functional as F

from largest_margins.engine.cosines import cosine_matrix
from largest_margins.heads import CosineLinear
from largest_margins.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    ElasticFaceLoss,
    FocalLoss,
    GMSoftmaxLoss,
    LDAMLoss,
    LMSoftmaxLoss,
    MarginSoftmaxLoss,
    NormFaceLoss,
    SampleMarginLoss,
    SphereFaceLoss,
    class_balanced_weights,
    suggest_scale,
)
from largest_margins.margins import sample_margins

REDUCTIONS = ['mean', 'sum', 'none', 'class-mean']
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WEIGHT = torch.tensor([.5, 2., 1., 3.], dtype=torch.float64)

each_loss = pytest.mark.parametrize('row', FAMILY, ids=repr)
each_cosine_loss = pytest.mark.parametrize('row', ON_COSINES, ids=repr)
each_angular_loss = pytest.mark.parametrize('row', ANGULAR, ids=repr)
each_dtype = pytest.mark.parametrize('dtype', DTYPES, ids=str)


def close(got, expected, tolerance):
    "Absolute where numbers are small, relative where they are large."
    got = torch.as_tensor(got).detach().double()
    if not isinstance(expected, torch.Tensor): expected = torch.tensor(np.array(expected, dtype=float))
    expected = expected.detach().double()
    assert got.shape == expected.shape
    assert ((got - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all(), (got, expected)


# --- values ---

@each_loss
@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_value_is_the_formula(row, reduction):
    "With and without class weights, and with samples that do not count."
    cosines, targets = batch()
    for scale, weight, some in ((1., None, targets), (20., WEIGHT, targets), (1., WEIGHT, ignoring(targets)),
                                (20., None, ignoring(targets))):
        expected = reduced(row, row.samples(cosines, some, scale), some, scale, weight, reduction)
        loss = row.make(scale, range(4), weight=weight, reduction=reduction)
        close(loss(cosines, some), expected, 1e-12)


@each_loss
def test_a_sample_that_does_not_count_is_as_good_as_away(row):
    "Of any index, in value and gradient; a batch of such samples gives 0, as sum, mean and class-mean."
    cosines, targets = batch()
    for index, reduction in ((-100, 'mean'), (255, 'sum'), (2, 'class-mean')):
        some = torch.where(torch.arange(7) % 3 == 1, index, targets)
        loss = row.make(5., range(4), reduction=reduction, ignore_index=index)
        value, slopes = value_and_slope(loss, cosines, some)
        true, slope = value_and_slope(loss, cosines[some != index], targets[some != index])
        close(value, true, 1e-14)
        close(slopes[some != index], slope, 1e-14)
        assert not slopes[some == index].any()
        value, slopes = value_and_slope(loss, cosines, torch.full((7,), index))
        assert value == 0 and not slopes.any()
    loss = row.make(5., range(4))
    loss.ignore_index = 1
    close(loss(cosines, targets), row.make(5., range(4), ignore_index=1)(cosines, targets), 0)


def value_and_slope(loss, cosines, targets):
    cosines = cosines.clone().requires_grad_()
    value = loss(cosines, targets)
    return value.detach(), torch.autograd.grad(value, cosines)[0]


@each_loss
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 2e-6), (torch.bfloat16, 2e-6), (torch.float16, 2e-6)],
                         ids=str)
def test_value_of_low_precision_cosines_is_formed_in_float32(row, dtype, tolerance):
    cosines, targets = batch(dtype=dtype)
    value = row.make(20., range(4), reduction='none')(cosines, targets)
    assert value.dtype == torch.float32
    close(value / 20, [x / 20 for x in row.samples(cosines, targets, 20.)], tolerance)


@each_loss
def test_reduction_can_be_set(row):
    cosines, targets = batch()
    loss = row.make(20., range(4))
    assert loss.reduction == 'mean'
    for reduction in REDUCTIONS:
        loss.reduction = reduction
        expected = row.make(20., range(4), reduction=reduction)(cosines, targets)
        assert torch.equal(loss(cosines, targets), expected)
    with pytest.raises(ValueError, match=r"reduction must be .*class-mean.*got 'average'"):
        loss.reduction = 'average'
    assert loss.reduction == 'class-mean'


@each_loss
def test_class_mean_is_the_mean_on_balanced_data_and_ignores_duplicates(row):
    cosines, _ = batch(8)
    targets = torch.arange(8) % 4
    value = {r: row.make(20., range(4), reduction=r)(cosines, targets) for r in ('mean', 'class-mean')}
    close(value['class-mean'], value['mean'], 1e-13)
    twice = torch.cat([torch.arange(8), torch.arange(0, 8, 4)])  # class 0 again: its mean stays, the plain mean moves
    loss = row.make(20., range(4), reduction='class-mean')
    grown = math.log(10 / 8) / 20 if row.name == 'LM logsumexp' else 0  # its weights sum to N
    close(loss(cosines[twice], targets[twice]) - grown, value['class-mean'], 1e-13)
    loss.reduction = 'mean'
    assert (loss(cosines[twice], targets[twice]) - grown - value['mean']).abs() > 1e-4


@each_loss
def test_weights_that_are_all_zero_give_zero(row):
    cosines, targets = batch()
    cosines.requires_grad_()
    for reduction in ('mean', 'sum', 'class-mean'):
        loss = row.make(20., range(4), weight=torch.zeros(4), reduction=reduction)
        value = loss(cosines, targets)
        gradient, = torch.autograd.grad(value, cosines)
        assert value == 0 and not gradient.any()


@pytest.mark.parametrize('row,reduction,weight', pairs(SMOOTHABLE, REDUCTIONS, [None, WEIGHT]), ids=named)
def test_label_smoothing_is_that_of_torch(row, reduction, weight):
    cosines, targets = batch()
    plain = row.make(20., range(4), reduction='none')(cosines, targets)
    own = torch.arange(len(targets)), targets
    rest = (20 * cosines).clone()
    rest[own] = -torch.inf
    logits = 20 * cosines
    logits[own] = rest.logsumexp(1) - plain.expm1().log()  # the own logit that gives this loss
    loss = row.make(20., range(4), label_smoothing=.2, weight=weight, reduction=reduction)
    if weight is not None and reduction == 'class-mean':
        with pytest.raises(ValueError, match='^label_smoothing'): loss(cosines, targets)
        return
    def torch_loss(reduction):
        return F.cross_entropy(logits, targets, weight, label_smoothing=.2, reduction=reduction)
    if reduction == 'class-mean':  # as eq-class-mean: every sample divided by the count of its class
        share = 1 / targets.bincount(minlength=4)[targets]
        expected = (share * torch_loss('none')).sum() / share.sum()
    else: expected = torch_loss(reduction)
    close(loss(cosines, targets), expected, 1e-10)


def test_label_smoothing_is_refused_where_there_is_no_matrix():
    "Given or set later; and with a prior. It changes the value where it is taken."
    cosines, targets = batch()
    loss = CosFaceLoss(20., .1, label_smoothing=.2)
    later = CosFaceLoss(20., .1)
    later.label_smoothing = .2
    assert later(cosines, targets) == loss(cosines, targets) != CosFaceLoss(20., .1)(cosines, targets)
    close(loss(cosines, ignoring(targets)), loss(cosines[ignoring(targets) >= 0], targets[ignoring(targets) >= 0]),
          1e-13)
    for x in (loss, later):
        with pytest.raises(ValueError, match='^label_smoothing'): x.linear(torch.eye(4), torch.eye(4), torch.arange(4))
    with pytest.raises(ValueError, match='^label_smoothing'): CosFaceLoss(label_smoothing=.2, prior=COUNTS)
    later.prior = COUNTS
    with pytest.raises(ValueError, match='^label_smoothing'): later(cosines, targets)


@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_weight_is_that_of_torch(reduction):
    cosines, targets = batch()
    ours = NormFaceLoss(20., weight=WEIGHT, reduction=reduction)(cosines, targets)
    close(ours, F.cross_entropy(20 * cosines, targets, WEIGHT, reduction=reduction), 1e-12)


@pytest.mark.parametrize('make', [GMSoftmaxLoss, LMSoftmaxLoss, SampleMarginLoss, FocalLoss, ElasticFaceLoss,
                                  AdaFaceLoss])
def test_label_smoothing_is_refused_where_there_is_nothing_to_smooth(make):
    with pytest.raises(TypeError, match='label_smoothing'): make(label_smoothing=.1)


# --- gradients ---

@each_loss
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_gradcheck_of_cosines(row, reduction):
    cosines, targets = batch()
    loss = row.make(5., range(4), weight=WEIGHT, reduction=reduction)
    assert gradcheck(lambda c: loss(c, ignoring(targets)), cosines.requires_grad_())


@each_cosine_loss
def test_gradcheck_of_features_and_prototypes(row):
    torch.manual_seed(1)
    features, prototypes = 3 * torch.randn(5, 3).double(), torch.randn(4, 3).double()
    targets = torch.tensor([0, 1, 1, 2, 3])
    loss, head = row.make(5., range(4), reduction='class-mean'), CosineLinear(3, 4).double()
    inputs = features.requires_grad_(), prototypes.requires_grad_()
    assert gradcheck(lambda z, w: loss.linear(z, w, targets), inputs)
    def through_the_head(z, w):
        return loss(torch.func.functional_call(head, {'weight': w}, z), targets)
    assert gradcheck(through_the_head, inputs)
    close(through_the_head(*inputs), loss.linear(*inputs, targets), 1e-14)


def true_gradient(row, features, prototypes, target, scale):
    "Of the loss of one sample, in the features and the prototypes, with forty digits."
    def unit(x):
        norm = mp.sqrt(sum(a * a for a in x))
        return [a / norm for a in x]
    def loss(numbers):
        z, *w = (unit(numbers[i:i + d]) for i in range(0, len(numbers), d))
        return row.sample([sum(a * b for a, b in zip(z, p)) for p in w], target, mpf(scale))
    d = len(features)
    numbers = [mpf(x) for x in torch.cat([features[None], prototypes]).double().flatten().tolist()]
    slopes = [mp.diff(lambda x, i=i: loss([*numbers[:i], x, *numbers[i + 1:]]), numbers[i])
              for i in range(len(numbers))]
    return torch.tensor([float(x) for x in slopes], dtype=torch.float64).view(-1, d)


@pytest.mark.parametrize('row,end,theta,of', pairs(
    ANGULAR, [0., math.pi], [1e-6, 1e-4, 1e-2], [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]), ids=named)
def test_gradient_through_the_normalisation_at_tiny_angles(row, end, theta, of):
    "With the axes as prototypes half precision holds these angles; float32 cosines do not."
    dtype, tolerance = of
    features = torch.tensor([[3 * math.cos(end), 2.4 * theta, 1.8 * theta]], dtype=torch.float64).to(dtype)
    prototypes = torch.tensor([[2., 0, 0], [0, 1, 0], [0, .5, .5]], dtype=dtype)
    expected = true_gradient(row, features[0], prototypes, 0, 8)
    features.requires_grad_()
    prototypes.requires_grad_()
    row.make(8., range(3)).linear(features, prototypes, torch.tensor([0])).backward()
    got = torch.cat([features.grad, prototypes.grad]).double()
    assert (got[0] - expected[0]).norm() <= tolerance * expected[0].norm()
    assert (got[1:] - expected[1:]).norm() <= tolerance * expected[1:].norm()


@each_angular_loss
def test_gradient_through_the_normalisation_in_general_position(row):
    "float32 features whose rounded cosine is 1, in a direction that is not an axis."
    torch.manual_seed(0)
    prototypes = torch.randn(3, 4)
    w, t = F.normalize(prototypes[0], dim=0), F.normalize(prototypes[1] - prototypes[2], dim=0)
    features = (5 * (w + 1e-4 * t))[None]
    assert CosineLinear(4, 3).fix(prototypes)(features)[0, 0] > 1 - 1e-7
    expected = true_gradient(row, features[0], prototypes, 0, 8)
    features.requires_grad_()
    row.make(8., range(3)).linear(features, prototypes, torch.tensor([0])).backward()
    rounding = 2**-23 / 1e-4  # of unit rows, against the angle between them
    assert (features.grad[0].double() - expected[0]).norm() <= rounding * expected[0].norm()


@each_angular_loss
@pytest.mark.parametrize('sign', [1, -1], ids=['θ=0', 'θ=π'])
@each_dtype
def test_gradient_of_features_exactly_at_a_prototype(row, sign, dtype):
    "No direction leads to the own prototype there; what is left is the pull of the others, tangential."
    features = torch.tensor([[sign * 2., 0, 0]], dtype=dtype, requires_grad=True)
    prototypes = torch.tensor([[1., 0, 0], [0, 1, 0], [-.5, .5, 0]], dtype=dtype)
    row.make(8., range(3)).linear(features, prototypes, torch.tensor([0])).backward()
    gradient = features.grad[0].double()
    assert gradient.isfinite().all() and abs(gradient[0]) < 1e-5 and gradient[2] == 0
    assert gradient[1] > 0  # gradient descent moves it away from the other two


@each_angular_loss
@pytest.mark.parametrize('dtype, nearest, tolerance',
                         [(torch.float64, 1e-12, 1e-9), (torch.float32, 1e-6, 1e-5)], ids=str)
def test_gradient_of_bare_cosines_is_true_up_to_the_ends(row, dtype, nearest, tolerance):
    for own in (1 - 1e-3, 1 - nearest, -1 + 1e-3, -1 + nearest):
        cosines = torch.tensor([[own, .5, -.3]], dtype=dtype, requires_grad=True)
        row.make(4., range(3))(cosines, torch.tensor([0])).backward()
        c, *others = (mpf(x) for x in cosines[0].tolist())
        expected = mp.diff(lambda x, others=others: row.sample([x, *others], 0, mpf(4)), c, h=mpf(10) ** -20)
        assert cosines.grad[0, 0].item() == pytest.approx(float(expected), rel=tolerance)


@each_angular_loss
@pytest.mark.parametrize('sign', [1, -1])
@each_dtype
def test_gradient_of_a_bare_cosine_of_one_is_no_steeper_than_that_of_the_neighbouring_number(row, sign, dtype):
    step = torch.finfo(dtype).eps / 2
    one = torch.ones((), dtype=dtype)
    assert torch.tensor(1 - step, dtype=dtype) == torch.nextafter(one, torch.zeros_like(one))
    cosines = torch.tensor([[sign, .5, -.25]], dtype=dtype, requires_grad=True)
    value = row.make(4., range(3))(cosines, torch.tensor([0]))
    value.backward()
    def sample(own): return row.sample([own, mpf(.5), mpf(-.25)], 0, mpf(4))
    close(value.detach(), sample(mpf(sign)), 1e-6)  # the value is exact
    near = sign * (1 - mpf(step))
    slope = mp.diff(sample, near, h=mpf(10) ** -22) / (1 - mp.exp(-sample(near)))  # of s·num alone
    expected = slope * (1 - mp.exp(-sample(mpf(sign))))
    assert expected <= 0
    assert 1.3 * float(expected) - 1e-5 <= cosines.grad[0, 0].item() <= 0


# --- the edges ---

def edges(row):
    "The target's cosine at 0, π, both sides of each kink and on it."
    angles = [0, 1e-4, 1e-3, math.pi - 1e-3, math.pi]
    angles += [kink + side for kink in row.kinks for side in (-1e-3, -1e-7, 0, 1e-7, 1e-3)]
    return [math.cos(a) for a in angles]


@each_loss
@each_dtype
def test_finite_at_the_edges(row, dtype):
    rows = [[own, *others] for own in edges(row) for others in ([1, 1, 1], [-1, -1, -1], [0, 1, -1])]
    cosines = torch.tensor(rows, dtype=torch.float64).to(dtype).requires_grad_()
    for scale in (1., 16., 64., 256.):
        scores = scale * cosines if row.name == 'focal' else cosines
        loss = row.make(scale, range(4), reduction='sum')
        value = loss(scores, torch.zeros(len(rows), dtype=torch.long))
        gradient, = torch.autograd.grad(value, cosines)
        assert value.isfinite() and gradient.isfinite().all()


@each_cosine_loss
@each_dtype
def test_finite_at_the_edges_through_the_head(row, dtype):
    "By the matrix and without it."
    angles = [math.acos(c) for c in edges(row)]
    rows = [[math.cos(a), math.sin(a), 0] for a in angles] + [[0, 0, 0]]
    features = torch.tensor(rows, dtype=torch.float64).to(dtype).requires_grad_()
    head = CosineLinear(3, 4, dtype=dtype)
    with torch.no_grad(): head.weight.copy_(torch.tensor([[1., 0, 0], [0, 1, 0], [-1, 0, 0], [1, 0, 0]]))
    targets = torch.zeros(len(rows), dtype=torch.long)
    for scale in (1., 64., 256.):
        loss = row.make(scale, range(4), reduction='sum')
        for value in (loss(head(features), targets), loss.linear(features, head.weight, targets)):
            slopes = torch.autograd.grad(value, (features, head.weight))
            assert value.isfinite() and all(x.isfinite().all() for x in slopes)


@each_loss
@pytest.mark.parametrize('target', [0, 1])
def test_loss_rises_with_the_angle_without_a_jump(row, target):
    steps = 4001
    theta = torch.linspace(0, math.pi, steps, dtype=torch.float64)
    cosines = torch.tensor([.3, -.2, .1, .2], dtype=torch.float64).repeat(steps, 1)
    cosines[:, target] = theta.cos()
    loss = row.make(20., range(4), reduction='none')
    differences = loss(cosines, torch.full((steps,), target)).diff()
    assert (differences >= -1e-13).all()
    steepest = 20 * 4 * math.pi / (steps - 1)  # no slope of num exceeds 4 in this table
    assert differences.max() <= 1.01 * steepest


@each_angular_loss
def test_no_jump_at_a_kink(row):
    loss = row.make(20., range(4), reduction='none')
    for kink in row.kinks:
        for theta in (kink, math.pi, 0.):
            around = torch.tensor([max(theta - 1e-9, 0.), theta, min(theta + 1e-9, math.pi)], dtype=torch.float64)
            cosines = torch.stack([around.cos(), torch.zeros(3), torch.zeros(3), torch.zeros(3)], 1)
            values = loss(cosines, torch.zeros(3, dtype=torch.long))
            assert values.diff().abs().max() < 100 * 20 * 1e-9


# --- special members ---

def test_detached_margin_counts_in_the_value_and_not_in_the_slope():
    torch.manual_seed(0)
    features, prototypes = torch.randn(6, 3).double(), torch.randn(4, 3).double()
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    attached, detached = ArcFaceLoss(16., .5), ArcFaceLoss(16., .5, detach_margin=True)
    def value_and_slopes(loss):
        z, w = features.clone().requires_grad_(), prototypes.clone().requires_grad_()
        value = loss(z, w)
        return value.detach(), torch.autograd.grad(value, (z, w))
    def straight_through(z, w):
        cosines = F.normalize(z) @ F.normalize(w).T
        own = torch.arange(6), targets
        theta = cosines[own].detach().acos()
        jump = torch.zeros_like(cosines)
        jump[own] = torch.where(theta + .5 > math.pi, -2 - (theta + .5).cos(), (theta + .5).cos()) - theta.cos()
        return F.cross_entropy(16 * (cosines + jump), targets)
    expected, slopes = value_and_slopes(straight_through)
    got, got_slopes = value_and_slopes(lambda z, w: detached.linear(z, w, targets))
    true, true_slopes = value_and_slopes(lambda z, w: attached.linear(z, w, targets))
    close(got, expected, 1e-12)
    close(true, expected, 1e-12)
    for a, b, c in zip(got_slopes, slopes, true_slopes):
        close(a, b, 1e-11)
        assert (a - c).abs().max() > 1e-3


def test_ldam_margins_come_from_the_counts():
    expected = [float(ldam_margin(j)) for j in range(4)]
    for counts in (COUNTS, list(COUNTS), torch.tensor(COUNTS), torch.tensor(COUNTS).float(), np.array(COUNTS)):
        close(LDAMLoss(counts).class_margins(torch.float64), expected, 1e-12)
    assert LDAMLoss([5, 500], max_margin=.2).class_margins().amax().item() == pytest.approx(.2)


def combined(**numbers): return CombinedMarginLoss(9., reduction='none', **numbers)


def cosface(margin): return CosFaceLoss(9., margin, reduction='none')


PER_SAMPLE = {  # (the loss, what is given for each of four samples, a loss made with one sample's numbers)
    'CosFace margin': (CosFaceLoss, dict(margin=[-.1, .35, .5, 0.]), cosface),
    'CosFace m3': (CosFaceLoss, dict(m3=[.2, .35, .5, 0.]), lambda m3: cosface(m3)),
    'ArcFace margin': (ArcFaceLoss, dict(margin=[0., .5, 1.2, .3]), lambda margin: combined(m2=margin)),
    'ArcFace m1, m2, m3': (ArcFaceLoss, dict(m1=[1., 1.2, 2., 3.], m2=[0., .5, 1.2, .3], m3=[0., .1, -.2, .4]),
                           combined),
    'SphereFace margin': (SphereFaceLoss, dict(margin=[1., 1.5, 4., 2.]), lambda margin: combined(m1=margin)),
    'combined m1': (CombinedMarginLoss, dict(m1=[1., 1.5, 4., 2.]), combined),
    'combined m2, m3': (CombinedMarginLoss, dict(m2=[0., .5, 1.2, .3], m3=[0., .1, -.2, .4]), combined),
    'GM': (GMSoftmaxLoss, dict(alpha1=[1., 1.1, 1.2, 1.3], beta2=[.1, .2, .3, -.4]),
           lambda **numbers: GMSoftmaxLoss(9., reduction='none', **numbers))}


@pytest.mark.parametrize('case', PER_SAMPLE)
def test_numbers_for_each_sample(case):
    "Each sample's loss is that of a loss made with its number, on both ways; and the numbers have gradients."
    make, numbers, made_with = PER_SAMPLE[case]
    cosines, targets = batch(4)
    torch.manual_seed(0)
    features, prototypes = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    given = {name: torch.tensor(v, dtype=torch.float64) for name, v in numbers.items()}
    loss = make(9., **({'margin': 0.} if make is ArcFaceLoss else {'margin': 1.} if make is SphereFaceLoss else {}),
                reduction='none')
    dense, fused = loss(cosines, targets, **given), loss.linear(features, prototypes, targets, **given, chunk_size=3)
    for i in range(4):
        number = {name: v[i] for name, v in numbers.items()}
        one = made_with(**number)
        close(dense[i], one(cosines, targets)[i], 1e-13)
        close(fused[i], one.linear(features, prototypes, targets)[i], 1e-13)
        close(loss(cosines, targets, **number), one(cosines, targets), 1e-13)
    leaves = [v.clone().add_(.01).requires_grad_() for v in given.values()]
    assert gradcheck(lambda *v: loss(cosines, targets, **dict(zip(given, v))), leaves)
    assert gradcheck(lambda *v: loss.linear(features, prototypes, targets, **dict(zip(given, v)), chunk_size=3), leaves)


@pytest.mark.parametrize('loss, name, values', [
    (CosFaceLoss(), 'margin', [2., -2., math.nan]), (ArcFaceLoss(), 'm2', [-.1, math.pi]),
    (ArcFaceLoss(), 'margin', [28.6]), (SphereFaceLoss(), 'margin', [.9, 11.]), (CombinedMarginLoss(), 'm1', [.9]),
    (CombinedMarginLoss(), 'm3', [2., math.inf])], ids=lambda x: x if isinstance(x, str) else '')
def test_numbers_for_each_sample_have_the_range_of_the_argument(loss, name, values):
    for value in values:
        for numbers in (value, changed(torch.full((7,), 1.), value)):
            with pytest.raises(ValueError, match=f'^{name} must'): loss(COSINES, TARGETS, **{name: numbers})
            with pytest.raises(ValueError, match=f'^{name} must'):
                loss.linear(torch.ones(7, 2), torch.ones(4, 2), TARGETS, **{name: numbers})
    for wrong in (torch.ones(7).long(), 'a', [1.] * 7, True):
        with pytest.raises(TypeError, match=f'^{name} must'): loss(COSINES, TARGETS, **{name: wrong})
    with pytest.raises(ValueError, match=f'^{name} must'): loss(COSINES, TARGETS, **{name: torch.ones(6)})


def test_a_number_given_under_two_names_is_refused():
    with pytest.raises(TypeError, match='twice'): ArcFaceLoss()(COSINES, TARGETS, m2=.1, margin=.2)
    with pytest.raises(TypeError, match='twice'): CosFaceLoss()(COSINES, TARGETS, m3=.1, margin=.2)


@pytest.mark.parametrize('kind', ['arc', 'cos'])
def test_elastic_margins_are_drawn_for_each_sample(kind):
    "From the loss's own generator: their mean and spread, the loss they give, and nothing of it in eval."
    cosines = torch.tensor([[.2, -.3, .1]], dtype=torch.float64).repeat(4000, 1)
    targets = torch.zeros(4000, dtype=torch.long)
    loss = ElasticFaceLoss(8., .4, .05, kind, torch.Generator().manual_seed(1), reduction='none')
    state = torch.get_rng_state()
    first, second = loss(cosines, targets), loss(cosines, targets)
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(first, second)
    loss.generator.manual_seed(1)
    assert torch.equal(loss(cosines, targets), first)
    rest = torch.logsumexp(8 * cosines[0, 1:], 0)
    num = (rest - first.expm1().log()) / 8  # what was put in the place of the cosine
    margins = num.acos() - math.acos(.2) if kind == 'arc' else .2 - num
    assert margins.mean().item() == pytest.approx(.4, abs=4 * .05 / 4000 ** .5)
    assert margins.std().item() == pytest.approx(.05, rel=4 / 8000 ** .5)
    close(loss.eval()(cosines, targets), loss(cosines, targets), 0)
    fixed = ArcFaceLoss(8., .4) if kind == 'arc' else CosFaceLoss(8., .4)
    close(loss(cosines, targets).mean(), fixed(cosines, targets), 1e-6)


def test_elastic_margins_are_the_same_on_each_way_and_continue_from_a_checkpoint():
    features, prototypes, targets = torch.randn(6, 3).double(), torch.randn(4, 3).double(), torch.arange(6) % 4
    loss = ElasticFaceLoss(8., generator=torch.Generator().manual_seed(1))
    state = copy.deepcopy(loss.state_dict())
    values = []
    for way in (lambda: loss(cosine_matrix(features, prototypes), targets),
                lambda: loss.linear(features, prototypes, targets, chunk_size=4)):
        loss.load_state_dict(state)
        values.append(way())
    close(values[0], values[1], 1e-13)
    following = loss.linear(features, prototypes, targets)
    other = ElasticFaceLoss(8., kind='cos')
    other.margin = None
    assert other.margin == .35  # that of the kind
    other = ElasticFaceLoss(8.)
    other.load_state_dict(state)
    other.linear(features, prototypes, targets)
    assert torch.equal(other.linear(features, prototypes, targets), following)
    one, two = ElasticFaceLoss(8.), ElasticFaceLoss(8.)
    assert one.linear(features, prototypes, targets) != two.linear(features, prototypes, targets)


def adaface_step(mean, deviation, norms, momentum=.01):
    "The running statistics after a batch (Kim et al. 2022, section 4.2, and the authors' code)."
    batch_mean = sum(norms) / len(norms)
    batch_deviation = mp.sqrt(sum((x - batch_mean) ** 2 for x in norms) / (len(norms) - 1))
    return (mean + mpf(momentum) * (batch_mean - mean), deviation + mpf(momentum) * (batch_deviation - deviation))


def test_adaface_is_its_formula():
    "Two training steps, of which one has a sample that does not count, then evaluation, which learns nothing."
    torch.manual_seed(0)
    loss, (mean, deviation) = AdaFaceLoss(8., momentum=.5, reduction='none').double(), (mpf(20), mpf(100))
    prototypes = torch.randn(4, 3).double()
    for step, targets in enumerate((torch.tensor([0, 1, 2, 3, 1, 0]), torch.tensor([0, 1, -100, 3, 1, 0]),
                                    torch.arange(6) % 4)):
        features = torch.randn(6, 3).double() * torch.tensor([1, 5, 30., 1e-6, 90, 500])[:, None]
        if step == 2: loss.eval()
        value = loss.linear(features, prototypes, targets, chunk_size=4)
        norms = [min(mpf(100), max(mpf('1e-3'), mp.sqrt(sum(mpf(a) ** 2 for a in row)))) for row in features.tolist()]
        if step < 2:
            counted = [x for x, y in zip(norms, targets.tolist()) if y != -100]
            mean, deviation = adaface_step(mean, deviation, counted, .5)
        cosines = cosine_matrix(features, prototypes)
        expected = [mpf(0) if y == -100 else adaface([mpf(c) for c in row], y, mpf(8), z) for row, y, z in zip(
            cosines.tolist(), targets.tolist(), quality(norms, mean, deviation))]
        close(value, expected, 2e-6)  # the running statistics are float32
        close(loss.norm_mean, mean, 1e-6)
        close(loss.norm_std, deviation, 1e-6)
    assert quality(norms, mean, deviation) != [0] * 6


def test_adaface_reads_norms_and_sends_no_gradient_to_them():
    torch.manual_seed(0)
    loss = AdaFaceLoss(8.).eval()
    features, prototypes, targets = torch.randn(6, 3).double(), torch.randn(4, 3).double(), torch.arange(6) % 4
    features = (features * 40).requires_grad_()
    prototypes.requires_grad_()
    with pytest.raises(TypeError, match='linear'): loss(cosine_matrix(features, prototypes), targets)
    value = loss.linear(features, prototypes, targets)
    assert value != loss.linear(features / 20, prototypes, targets)
    slope, = torch.autograd.grad(value, features)
    assert (slope * features).sum(1).abs().max() < 1e-12  # along a feature only its norm changes
    unit = (features / features.norm(dim=1, keepdim=True)).detach().requires_grad_()
    qualities = ((features.norm(dim=1, keepdim=True) - 20) / 100.001 * .333).detach()
    assert gradcheck(lambda z, w: loss.linear(z / z.norm(dim=1, keepdim=True) * 40, w, targets), (unit, prototypes))
    assert qualities.abs().max() < 1


def test_adaface_of_one_sample_and_of_none_keeps_its_statistics_finite():
    loss = AdaFaceLoss()
    for targets in ([0], [-100]):
        assert loss.linear(torch.ones(1, 3), torch.eye(3), torch.tensor(targets)).isfinite()
        assert loss.norm_mean == 20 and loss.norm_std == 100  # one norm has no deviation
    loss.linear(torch.ones(2, 3), torch.eye(3), torch.tensor([0, 1]))
    assert loss.norm_mean < 20 and loss.norm_std < 100
    assert list(loss.state_dict()) == ['norm_mean', 'norm_std']


def test_gm_takes_numbers_for_each_class_and_for_each_sample():
    cosines, targets = batch()
    per_class = [torch.tensor(v, dtype=torch.float64) for v in
                 ([1., 1.1, 1.2, 1.3], [.9, .8, .7, .6], [0., -.1, -.2, -.3], [.1, .2, .3, .4])]
    names = 'alpha1', 'alpha2', 'beta1', 'beta2'
    stored = GMSoftmaxLoss(20., *per_class, reduction='none')(cosines, targets)
    given = {name: v[targets] for name, v in zip(names, per_class)}
    called = GMSoftmaxLoss(20., reduction='none')(cosines, targets, **given)
    assert torch.equal(stored, called)
    for i, y in enumerate(targets.tolist()):
        numbers = GMSoftmaxLoss(20., *(v[y].item() for v in per_class), reduction='none')
        close(numbers(cosines[i:i + 1], targets[i:i + 1])[0], stored[i], 1e-13)
    mixed = GMSoftmaxLoss(20., *per_class, reduction='none')(cosines, targets, beta1=.5, alpha2=given['alpha2'])
    close(mixed - stored, -20 * (.5 - given['beta1']), 1e-12)  # a number in the call takes the place of the buffer
    features, prototypes = torch.randn(7, 3).double(), torch.randn(4, 3).double()
    by_sample = GMSoftmaxLoss(20.).linear(features, prototypes, targets, **given)
    close(by_sample, GMSoftmaxLoss(20., *per_class).linear(features, prototypes, targets), 1e-13)


def test_gm_gradient_reaches_per_sample_numbers():
    cosines, targets = batch()
    alpha = torch.ones(7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda c, a: GMSoftmaxLoss(5.)(c, targets, alpha1=a, beta2=a), (cosines.requires_grad_(), alpha))


@pytest.mark.parametrize('weight', [None, WEIGHT], ids=['plain', 'weighted'])
@pytest.mark.parametrize('reduction', ['mean', 'class-mean'])
@pytest.mark.parametrize('scale', [.5, 20., 256.])
def test_lm_softmax_is_sandwiched(weight, reduction, scale):
    for seed in range(5):
        cosines, targets = batch(seed=seed)
        negative = -sample_margins(cosines, targets)
        share = torch.ones(7, dtype=torch.float64) if weight is None else weight[targets]
        if reduction == 'class-mean': share = share / targets.bincount(minlength=4)[targets]
        below = (share * negative).sum() / share.sum()
        mean = LMSoftmaxLoss(scale, weight=weight, reduction=reduction)(cosines, targets)
        assert below - 1e-12 <= mean <= below + math.log(3) / scale + 1e-12
        soft = LMSoftmaxLoss(scale, 'logsumexp', weight=weight, reduction=reduction)(cosines, targets)
        below = (negative + (share * 7 / share.sum()).log() / scale).max()
        assert below - 1e-12 <= soft <= below + math.log(7 * 3) / scale + 1e-12
        assert soft <= negative.max() + math.log(7 * 3) / scale + 1e-12  # γ_min itself: Σ a_i = N whatever the weights
        if weight is None and reduction == 'mean': assert soft >= negative.max() - 1e-12


@pytest.mark.parametrize('aggregation', ['mean', 'logsumexp'])
@pytest.mark.parametrize('scale', [64., 256., 1e4])
def test_lm_softmax_is_never_minus_infinity(aggregation, scale):
    for own in (.9, .99, 1.):
        cosines = torch.tensor([[own, -.1, -.2], [own, -1., -1.]], requires_grad=True)
        loss = LMSoftmaxLoss(scale, aggregation)(cosines, torch.tensor([0, 0]))
        losses = [-.1 - own + math.log1p(math.exp(-.1 * scale)) / scale, -1 - own + math.log(2) / scale]
        top = max(losses)
        soft = top + math.log(sum(math.exp(scale * (x - top)) for x in losses)) / scale
        assert loss.item() == pytest.approx(sum(losses) / 2 if aggregation == 'mean' else soft, abs=1e-6)
        loss.backward()
        assert cosines.grad.isfinite().all()


def test_losses_far_below_rounding_are_exact():
    "float32: log-sum-exp minus logit would give 0."
    cosines = torch.tensor([[1., -1.]], requires_grad=True)
    loss = NormFaceLoss(20.)(cosines, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.exp(-40), rel=1e-5)
    loss.backward()
    assert cosines.grad[0, 0].item() == pytest.approx(-20 * math.exp(-40), rel=1e-5)


@pytest.mark.parametrize('gamma', [0., .5, 2.])
def test_focal_loss_of_a_certain_sample_is_exact(gamma):
    "p rounds to 1: where (1 − p)^γ is formed from p, the value is 0 and for γ < 1 the slope is NaN."
    logits = torch.tensor([[60., 0.]], requires_grad=True)
    loss = FocalLoss(gamma)(logits, torch.tensor([0]))
    expected = math.exp(-60 * (1 + gamma))  # (1 − p)^γ · (1 − p)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-44)
    loss.backward()
    slope = (1 + gamma) * expected
    assert logits.grad[0].tolist() == pytest.approx([-slope, slope], rel=1e-4, abs=1e-44)


# --- limits ---

LIMITS = {
    'CosFace m=0 is NormFace': (CosFaceLoss(9., 0.), NormFaceLoss(9.)),
    'ArcFace m=0 is NormFace': (ArcFaceLoss(9., 0.), NormFaceLoss(9.)),
    'SphereFace m=1 is NormFace': (SphereFaceLoss(9., 1.), NormFaceLoss(9.)),
    'combined (1,0,0) is NormFace': (CombinedMarginLoss(9.), NormFaceLoss(9.)),
    'GM (1,1,0,0) is NormFace': (GMSoftmaxLoss(9.), NormFaceLoss(9.)),
    'GM (1,1,−m,−m) is CosFace': (GMSoftmaxLoss(9., beta1=-.3, beta2=-.3), CosFaceLoss(9., .3)),
    'LDAM of equal counts is CosFace': (LDAMLoss([7] * 4, 9., .3), CosFaceLoss(9., .3)),
    'LDAM is GM per class': (
        LDAMLoss(COUNTS, 9.), GMSoftmaxLoss(9., 1., 1., *[-LDAMLoss(COUNTS).class_margins()] * 2)),
    'combined (1,m,0) is ArcFace': (CombinedMarginLoss(9., 1., .5, 0.), ArcFaceLoss(9., .5)),
    'combined (m,0,0) is SphereFace': (CombinedMarginLoss(9., 1.7), SphereFaceLoss(9., 1.7)),
    'combined (1,0,m) is CosFace': (CombinedMarginLoss(9., m3=.3), CosFaceLoss(9., .3)),
    'LM s → ∞ is R_sm': (LMSoftmaxLoss(1e6), SampleMarginLoss()),
    'focal γ=0 is cross-entropy': (FocalLoss(0.), lambda x, y: F.cross_entropy(x, y)),
    'NormFace is cross-entropy': (NormFaceLoss(9.), lambda x, y: F.cross_entropy(9 * x, y)),
    'LM of one sample has one aggregation': (LMSoftmaxLoss(9.), LMSoftmaxLoss(9., 'logsumexp')),
}


@pytest.mark.parametrize('limit', LIMITS)
def test_limit(limit):
    cosines, targets = batch()
    tolerance = 2e-6 if 'LM s' in limit or 'LDAM is' in limit else 1e-12
    first, second = LIMITS[limit]
    for i in range(7):  # sample by sample, so that no gradient hides behind another
        values, slopes = [], []
        for loss in (first, second):
            x = cosines[i:i + 1].clone().requires_grad_()
            values.append(loss(x, targets[i:i + 1]))
            slopes.append(torch.autograd.grad(values[-1], x)[0])
        close(values[0].detach(), values[1].detach(), tolerance)
        close(slopes[0], slopes[1], tolerance)


@pytest.mark.parametrize('limit', [name for name in LIMITS if 'focal' not in name and 'cross' not in name])
def test_limit_through_features(limit):
    torch.manual_seed(3)
    features, prototypes = torch.randn(7, 3).double().requires_grad_(), torch.randn(4, 3).double().requires_grad_()
    targets = batch()[1]
    tolerance = 2e-6 if 'LM s' in limit or 'LDAM is' in limit else 1e-12
    first, second = (loss.linear(features[:1], prototypes, targets[:1]) for loss in LIMITS[limit])
    close(first.detach(), second.detach(), tolerance)
    for a, b in zip(torch.autograd.grad(first, (features, prototypes)),
                    torch.autograd.grad(second, (features, prototypes))):
        close(a, b, tolerance)


def test_class_mean_is_the_mean_with_inverse_frequencies():
    cosines, targets = batch()
    inverse = 1 / targets.bincount(minlength=4).double().clamp(min=1)
    a = ArcFaceLoss(reduction='class-mean')(cosines, targets)
    close(a, ArcFaceLoss(weight=inverse)(cosines, targets), 1e-13)


# --- other people's numbers ---

@pytest.mark.parametrize('name', ['ArcFace', 'CosFace', 'NormalizedSoftmax'])
def test_values_of_pytorch_metric_learning(name):
    "Where the definitions agree: margins in degrees there, prototypes in columns, and for ArcFace θ + m ≤ π."
    torch.manual_seed(0)
    features, prototypes = torch.randn(8, 6), torch.randn(5, 6)
    targets = torch.arange(8) % 5
    theirs, ours = {
        'ArcFace': (metric_learning.ArcFaceLoss(5, 6, margin=math.degrees(.4), scale=32), ArcFaceLoss(32., .4)),
        'CosFace': (metric_learning.CosFaceLoss(5, 6, margin=.2, scale=32), CosFaceLoss(32., .2)),
        'NormalizedSoftmax': (metric_learning.NormalizedSoftmaxLoss(5, 6, temperature=1 / 32), NormFaceLoss(32.)),
    }[name]
    with torch.no_grad(): theirs.W.copy_(prototypes.T)
    angles = CosineLinear(6, 5).fix(prototypes)(features).gather(1, targets[:, None]).acos()
    assert angles.max() < math.pi - .4
    value = ours.linear(features, prototypes, targets)
    assert value.item() == pytest.approx(theirs(features, targets).item(), rel=1e-5)


# --- symmetry and every shape ---

@each_loss
@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_renaming_the_classes_changes_nothing(row, reduction):
    cosines, targets = batch()
    order = [2, 0, 3, 1]  # new class i is old class order[i]
    renamed = torch.tensor([order.index(y) for y in targets.tolist()])
    before = row.make(20., range(4), weight=WEIGHT, reduction=reduction)
    after = row.make(20., order, weight=WEIGHT[order], reduction=reduction)
    close(after(cosines[:, order], renamed), before(cosines, targets), 1e-13)


@each_loss
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_finite_in_finite_out(row, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    n, k = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 6))
    step = torch.finfo(dtype).eps / 2
    extreme = st.sampled_from([-1, 1, 0, 1 - step, step - 1, 1 - 2 * step, 1 + 2 * step, -1 - 2 * step, step, 1e-30])
    numbers = data.draw(st.lists(extreme | st.floats(-1, 1), min_size=n * k, max_size=n * k))
    targets = torch.tensor(data.draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n)))
    scale = data.draw(st.sampled_from([1e-3, 1., 64., 256.]))
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    cosines = torch.tensor(numbers, dtype=torch.float64).to(dtype).view(n, k).requires_grad_()
    loss = row.make(scale, range(k), reduction=reduction)
    value = loss(cosines, targets)
    gradient, = torch.autograd.grad(value.sum(), cosines)
    assert value.shape == ((n,) if reduction == 'none' else ())
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert value.isfinite().all() and gradient.isfinite().all()


@each_loss
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_targets_of_any_integer_dtype(row, dtype):
    cosines, targets = batch()
    for reduction in ('mean', 'class-mean'):
        loss = row.make(20., range(4), reduction=reduction)
        assert torch.equal(loss(cosines, targets.to(dtype)), loss(cosines, targets))


# --- what surrounds a loss ---

@each_loss
def test_predictions_ignore_the_margin(row):
    cosines, _ = batch()
    loss = row.make(20., range(4))
    assert loss.y_int is True
    assert torch.equal(loss.decodes(cosines), cosines.argmax(1))
    factor = 20 if isinstance(loss, MarginSoftmaxLoss) else 1
    close(loss.activation(cosines), (factor * cosines).softmax(1), 1e-13)
    assert loss.activation(cosines.half()).dtype == torch.float32


@each_loss
def test_copies_and_pickles(row):
    cosines, targets = batch()
    loss = row.make(20., range(4), weight=WEIGHT, reduction='class-mean')
    expected = loss(cosines, targets)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(cosines, targets), expected) and repr(other) == repr(loss)
        other.weight = torch.ones(4)
        assert other(cosines, targets) != expected and torch.equal(loss(cosines, targets), expected)
    assert set(loss.state_dict()) <= {'_extra_state'}  # of a generator; options are no state


def test_adaface_is_copied_with_its_statistics():
    loss = AdaFaceLoss()
    features, prototypes, targets = torch.randn(6, 3), torch.randn(4, 3), torch.arange(6) % 4
    loss.linear(features, prototypes, targets)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), AdaFaceLoss()):
        if other.norm_mean == 20: other.load_state_dict(loss.state_dict())
        assert other.norm_mean == loss.norm_mean != 20 and other.norm_std == loss.norm_std != 100
        other.linear(features, prototypes, targets)
        assert other.norm_mean != loss.norm_mean


@each_loss
def test_numbers_of_each_class_move_with_the_loss(row):
    loss = row.make(20., range(4), weight=WEIGHT)
    assert 'weight' in dict(loss.named_buffers())
    assert {b.device.type for b in copy.deepcopy(loss).to('meta').buffers()} == {'meta'}
    assert not list(loss.parameters())
    cosines, targets = batch()
    close(loss.float()(cosines, targets), row.make(20., range(4), weight=WEIGHT)(cosines, targets), 1e-6)


def test_repr_shows_radians_and_degrees():
    assert repr(ArcFaceLoss()) == 'ArcFaceLoss(scale=64, margin=0.5 rad (28.65°))'
    assert 'm2=0.3 rad (17.19°)' in repr(CombinedMarginLoss(m1=1.2, m2=.3, m3=.1))
    loss = ArcFaceLoss()
    loss.margin = .3
    assert 'margin=0.3 rad' in repr(loss)


OTHER_THAN_DEFAULT = dict(
    scale=7., margin=1.2, m1=1.3, m2=.4, m3=.2, max_margin=.7, detach_margin=True, label_smoothing=.1, alpha1=1.5,
    alpha2=[1., 2., 3., 4.], beta1=.25, beta2=.75, aggregation='logsumexp', tilt=5., std=.2, kind='cos', h=.5,
    momentum=.3,
    gamma=3., sample_margin=.5, reduction='sum', ignore_index=7, weight=[1., 2., 3., 4.], prior=[1., 2., 3., 4.])
LOSSES = [NormFaceLoss, CosFaceLoss, ArcFaceLoss, SphereFaceLoss, CombinedMarginLoss, GMSoftmaxLoss, LMSoftmaxLoss,
          SampleMarginLoss, ElasticFaceLoss, AdaFaceLoss, FocalLoss, lambda **o: LDAMLoss(COUNTS, **o)]


@pytest.mark.parametrize('make', LOSSES, ids=lambda make: make.__name__)
def test_repr_prints_every_option_that_differs_from_its_default(make):
    "Given, and set later; one that is as it was is printed only where its value is what the loss is."
    names = [name for name in inspect.signature(LDAMLoss if '<' in make.__name__ else make).parameters
             if name in OTHER_THAN_DEFAULT]
    assert {'reduction', 'ignore_index', 'weight'} <= set(names)
    for name in names:
        value = OTHER_THAN_DEFAULT[name]
        given = {'tilt': dict(aggregation='logsumexp'), 'kind': dict(margin=.4)}.get(name, {})
        loss, later = make(**given, **{name: value}), make(**given)
        setattr(later, name, value)
        shown = '[4]' if isinstance(value, list) else repr(value) if isinstance(value,
                                                                                str) else f'{value}'.removesuffix('.0')
        assert f'{name}={shown}' in repr(loss) and repr(later) == repr(loss), name
        assert repr(loss) != repr(make(**given))
    for name in ('reduction', 'ignore_index', 'weight', 'prior', 'sample_margin', 'label_smoothing', 'detach_margin'):
        assert name not in repr(make())


def test_suggested_scale_gives_the_probability():
    for k in (2, 3, 10, 1000):
        for p in (.6, .99, .999999):
            s = suggest_scale(k, p)
            assert 1 / (1 + (k - 1) * math.exp(-s * k / (k - 1))) == pytest.approx(p, rel=1e-9)
    assert suggest_scale(10) == suggest_scale(10, .99)


def test_class_balanced_weights_are_effective_numbers():
    for beta in (0., .9, .9999):
        raw = [(1 - beta) / (1 - beta ** n) for n in COUNTS]
        expected = [x * 4 / sum(raw) for x in raw]
        assert class_balanced_weights(COUNTS, beta).tolist() == pytest.approx(expected, rel=1e-6)
    assert class_balanced_weights([10 ** 7, 1]).isfinite().all()


# --- bad input ---

COSINES, TARGETS = batch(dtype=torch.float32)


def changed(x, value):
    x = x.clone()
    x.view(-1)[2] = value
    return x


BAD_BATCHES = {  # name: (scores, targets, error, how the message begins, what was given)
    'list for scores': ([[.1, .2]], TARGETS, TypeError, '{scores}', 'list'),
    'integer scores': (COSINES.long(), TARGETS, TypeError, '{scores}', 'int64'),
    'complex scores': (COSINES.to(torch.complex64), TARGETS, TypeError, '{scores}', 'complex64'),
    'one-dimensional scores': (COSINES[0], TARGETS[:1], ValueError, '{scores}', r'\(4,\)'),
    'three-dimensional scores': (COSINES[None], TARGETS[:1], ValueError, '{scores}', r'\(1, 7, 4\)'),
    'no sample': (COSINES[:0], TARGETS[:0], ValueError, '{scores}', r'\(0, 4\)'),
    'one class': (COSINES[:, :1], TARGETS * 0, ValueError, '{scores}', r'\(7, 1\)'),
    'NaN among scores': (changed(COSINES, math.nan), TARGETS, ValueError, '{scores}', 'nan'),
    'infinity among scores': (changed(COSINES, math.inf), TARGETS, ValueError, '{scores}', 'inf'),
    'list for targets': (COSINES, [0] * 7, TypeError, 'targets', 'list'),
    'float targets': (COSINES, TARGETS.float(), TypeError, 'targets', 'float32'),
    'boolean targets': (COSINES, TARGETS > 0, TypeError, 'targets', 'bool'),
    'one-hot targets': (COSINES, F.one_hot(TARGETS), ValueError, 'targets', r'\(7, 4\)'),
    'too few targets': (COSINES, TARGETS[:6], ValueError, 'targets', r'\(6,\)'),
    'a target of k': (COSINES, changed(TARGETS, 4), ValueError, 'targets', '4'),
    'a negative target': (COSINES, changed(TARGETS, -1), ValueError, 'targets', '-1'),
    'another index than the ignored': (COSINES, changed(TARGETS, -99), ValueError, 'targets', '-99'),
    'a bad target beside an ignored one': (COSINES, changed(torch.full((7,), -100), 4), ValueError, 'targets', '4'),
}


@pytest.mark.parametrize('bad', BAD_BATCHES)
def test_bad_batch_is_refused(bad):
    scores, targets, error, begin, given = BAD_BATCHES[bad]
    for row in FAMILY:
        name = begin.format(scores='logits' if row.name == 'focal' else 'cosines')
        with pytest.raises(error, match=f'^{name} must .*got .*{given}'): row.make(20., range(4))(scores, targets)


@each_cosine_loss
def test_logits_are_recognised(row):
    loss = row.make(20., range(4))
    for dtype, fine, wrong in ((torch.float64, 1.0009, 1.002), (torch.float32, 1.0009, 1.002),
                               (torch.float16, 1.0035, 1.006), (torch.bfloat16, 1.03, 1.05)):
        for sign in (1, -1):
            assert loss(changed(COSINES.to(dtype), sign * fine), TARGETS).isfinite()
            with pytest.raises(ValueError, match=r'^cosines must lie in \[-1, 1\], got .*logits'):
                loss(changed(COSINES.to(dtype), sign * wrong), TARGETS)


@each_cosine_loss
def test_bad_features_are_refused(row):
    loss, z, w = row.make(20., range(4)), torch.randn(7, 3), torch.randn(4, 3)
    for features, prototypes, error, message in (
            (z[:, :2], w, ValueError, r'^features must .*got shapes \(7, 2\) and \(4, 3\)'),
            (z[0], w, ValueError, r'^features must .*got shapes \(3,\)'),
            (z.long(), w, TypeError, '^features must .*got torch.int64'),
            (z, w.long(), TypeError, '^prototypes must .*got torch.int64'),
            ([1.], w, TypeError, '^features must .*got list'),
            (z[:0], w, ValueError, r'^features must .*got shapes \(0, 3\) and \(4, 3\)'),
            (z, w[:1], ValueError, r'^features must .*got shapes \(7, 3\) and \(1, 3\)'),
            (changed(z, math.nan), w, ValueError, r'^features must be finite, row \d is not'),
            (z, changed(w, math.inf), ValueError, r'^prototypes must be finite, row \d is not')):
        targets = TARGETS[:0] if message.endswith(r'\(0, 3\) and \(4, 3\)') else TARGETS
        with pytest.raises(error, match=message): loss.linear(features, prototypes, targets)


@each_loss
def test_a_number_of_classes_that_does_not_fit_is_refused(row):
    loss = row.make(20., range(4), weight=WEIGHT)
    with pytest.raises(ValueError, match=r'must be \[k\] with k = 3, got shape \(4,\)'):
        loss(COSINES[:, :3], TARGETS.clamp(max=2))


@pytest.mark.parametrize('weight, error, given', [
    ({0: 1.}, TypeError, 'dict'), ('1234', TypeError, 'str'), ([True] * 4, TypeError, ''), (5, TypeError, 'int'),
    (torch.ones(4, dtype=torch.bool), TypeError, 'bool'), (torch.ones(4, dtype=torch.complex64), TypeError, 'complex'),
    (torch.ones(4, 1), ValueError, r'\(4, 1\)'), (torch.ones(0), ValueError, r'\(0,\)'),
    (torch.tensor([1., -2., 1., 1.]), ValueError, '-2 for class 1'), ([1., -2., 1., 1.], ValueError, '-2 for class 1'),
    (torch.tensor([1., 1., math.nan, 1.]), ValueError, 'nan for class 2'),
    (torch.tensor([1., 1., 1., math.inf]), ValueError, 'inf for class 3')], ids=str)
def test_bad_weight_is_refused(weight, error, given):
    "Given, and set later; what was there stays."
    for row in FAMILY:
        with pytest.raises(error, match=f'^weight must .*{given}'): row.make(20., range(4), weight=weight)
        loss = row.make(20., range(4), weight=WEIGHT)
        with pytest.raises(error, match=f'^weight must .*{given}'): loss.weight = weight
        assert torch.equal(loss.weight, WEIGHT)


BAD_NUMBERS = [  # (maker, argument, the values out of its range, some in it)
    (NormFaceLoss, 'scale', [0., -1., -5., math.inf, math.nan, 1e9, 1e-9], [1, .1, 1000]),
    (NormFaceLoss, 'label_smoothing', [-.1, 1., 7., math.nan], [0, .5]),
    (NormFaceLoss, 'sample_margin', [-.1, -1., math.nan], [0, 2.]),
    (CosFaceLoss, 'margin', [35., -3., 2., -2., math.inf, -math.inf, math.nan], [-1.9, 0, 1.9]),
    (ArcFaceLoss, 'margin', [-.1, math.pi, 28.6, math.nan], [0, 3.]),
    (SphereFaceLoss, 'margin', [.99, -1., 100., math.inf, math.nan], [1, 4]),
    (CombinedMarginLoss, 'm1', [.99, 50., math.inf, math.nan], [1, 10]),
    (CombinedMarginLoss, 'm2', [-.1, math.pi, math.nan], [0, 3.]),
    (CombinedMarginLoss, 'm3', [5., -5., math.inf, math.nan], [-1, 1]),
    (lambda **o: LDAMLoss(COUNTS, **o), 'max_margin', [-1., 5., 50., math.inf, math.nan], [0, .5]),
    (GMSoftmaxLoss, 'alpha1', [math.inf, math.nan], [-5, 0]),
    (GMSoftmaxLoss, 'alpha2', [math.inf, math.nan], [1]),
    (GMSoftmaxLoss, 'beta1', [math.inf, math.nan], [1]),
    (GMSoftmaxLoss, 'beta2', [math.inf, math.nan], [1]),
    (lambda **o: LMSoftmaxLoss(aggregation='logsumexp', **o), 'tilt', [0., -1., math.inf, math.nan], [2, .5]),
    (ElasticFaceLoss, 'margin', [-.1, 28.6, math.nan], [0, .5]),
    (ElasticFaceLoss, 'std', [-.1, 5., math.nan], [0, .1]),
    (AdaFaceLoss, 'margin', [-.1, 28.6, math.nan], [0, .5]),
    (AdaFaceLoss, 'h', [0., -1., 100., math.nan], [1]),
    (AdaFaceLoss, 'momentum', [0., -1., 1.1, math.nan], [1, .5]),
    (FocalLoss, 'gamma', [-.1, 1e3, math.inf, math.nan], [0, 5]),
    (lambda **o: class_balanced_weights(COUNTS, **o), 'beta', [-.1, 1., math.nan], [0, .9]),
    (lambda **o: suggest_scale(10, **o), 'probability', [.1, 0., 1., 99., math.nan], [.5]),
]


@pytest.mark.parametrize('make, name, values, fine', BAD_NUMBERS, ids=lambda x: x if isinstance(x, str) else '')
def test_numbers_in_their_range_and_no_others(make, name, values, fine):
    "Given or set later, also as NumPy's or a tensor; tests/test_arguments.py has what is no number."
    later = make()
    settable = isinstance(later, torch.nn.Module)
    for value in values:
        for number in (value, np.float64(value), torch.tensor(value, dtype=torch.float64)):
            with pytest.raises(ValueError, match=rf'^{name} must be .*got {re.escape(f"{value:g}")}'):
                make(**{name: number})
            if not settable: continue
            with pytest.raises(ValueError, match=f'^{name} must be'): setattr(later, name, number)
    if settable: assert repr(later) == repr(make())
    for value in fine:
        made = make(**{name: value})
        if not settable: continue
        assert getattr(made, name) == value
        setattr(later, name, value)
        assert getattr(later, name) == value


@pytest.mark.parametrize('loss, name, wrong, right', [
    (NormFaceLoss(), 'reduction', ['avg', 'MEAN', 'batchmean'], 'sum'),
    (LMSoftmaxLoss(), 'aggregation', ['max'], 'logsumexp'),
    (ElasticFaceLoss(), 'kind', ['sphere'], 'cos')], ids=lambda x: x if isinstance(x, str) else '')
def test_choices(loss, name, wrong, right):
    make = type(loss)
    for value in wrong:
        with pytest.raises(ValueError, match=f'^{name} must be .*got {value!r}'): make(**{name: value})
        with pytest.raises(ValueError, match=f'^{name} must be .*got {value!r}'): setattr(loss, name, value)
    for value in (None, 3, True):
        with pytest.raises(TypeError, match=f'^{name} must be'): make(**{name: value})
        with pytest.raises(TypeError, match=f'^{name} must be'): setattr(loss, name, value)
    setattr(loss, name, right)
    assert getattr(loss, name) == right


def test_numbers_of_each_class_may_come_as_any_list():
    cosines, targets = batch()
    for name in ('weight', 'prior'):
        expected = NormFaceLoss(**{name: torch.tensor(COUNTS)})(cosines, targets)
        for counts in (COUNTS, list(COUNTS), np.array(COUNTS), [torch.tensor(float(c)) for c in COUNTS],
                       map(int, COUNTS), torch.tensor(COUNTS, dtype=torch.int32), torch.tensor(COUNTS).double(),
                       torch.tensor(COUNTS).half()):
            loss = NormFaceLoss()
            setattr(loss, name, counts)
            close(loss(cosines, targets), expected, 1e-6)
        setattr(loss, name, None)
        assert loss(cosines, targets) == NormFaceLoss()(cosines, targets)


@pytest.mark.parametrize('kind', ['half', 'bfloat16'])
def test_half_precision_keeps_counts_and_priors_exact(kind):
    "A count of 70 001 is infinite in float16, and 50 000.4 no bfloat16."
    counts = [70001., 50000.4, 3., 1e6]
    cosines, targets = batch(dtype=torch.float32)
    for make in (lambda: NormFaceLoss(prior=counts), lambda: LDAMLoss(counts), lambda: CosFaceLoss(weight=counts),
                 lambda: GMSoftmaxLoss(beta1=[1e-4, 2.0001, 3.3, 4.]), lambda: AdaFaceLoss()):
        loss, half = make(), getattr(torch.nn.Sequential(make()), kind)()[0]
        assert all(torch.equal(a, b) for a, b in zip(half.buffers(), loss.buffers(), strict=True))
        if not isinstance(loss, AdaFaceLoss): assert torch.equal(half(cosines, targets), loss(cosines, targets))


@pytest.mark.parametrize('name', ['alpha1', 'alpha2', 'beta1', 'beta2'])
def test_bad_coefficients_of_gm_are_refused(name):
    for value, shown in ((torch.tensor([1., math.nan, 1., 1.]), 'nan'), (torch.tensor([1., math.inf, 1., 1.]), 'inf'),
                         (torch.ones(2, 2), r'\(2, 2\)'), (1e308, r'1e\+308'), ([1e30] * 4, r'1e\+30')):
        with pytest.raises(ValueError, match=f'^{name} must .*got .*{shown}'): GMSoftmaxLoss(**{name: value})
    loss = GMSoftmaxLoss()
    for value, error, shown in (
            (torch.ones(4), ValueError, r'\(4,\)'), (torch.ones(7, 1), ValueError, r'\(7, 1\)'),
            (changed(torch.ones(7), math.nan), ValueError, 'nan'), (math.nan, ValueError, 'nan'),
            (1e308, ValueError, r'1e\+308'), ('a', TypeError, 'str'), ([1.] * 7, TypeError, 'list')):
        with pytest.raises(error, match=f'^{name} must .*got .*{shown}'): loss(COSINES, TARGETS, **{name: value})


def test_bad_options_are_refused():
    with pytest.raises(TypeError, match='alpha3'): GMSoftmaxLoss()(COSINES, TARGETS, alpha3=1.)
    with pytest.raises(TypeError, match='alpha1'): NormFaceLoss()(COSINES, TARGETS, alpha1=1.)
    loss = ArcFaceLoss()
    for value in ('no', 0, None, np.bool_(True)):
        with pytest.raises(TypeError, match='^detach_margin must be'): ArcFaceLoss(detach_margin=value)
        with pytest.raises(TypeError, match='^detach_margin must be'): loss.detach_margin = value
    for value in ('x', 2.5, None, True):
        with pytest.raises(TypeError, match='^ignore_index must be'): NormFaceLoss(ignore_index=value)
        with pytest.raises(TypeError, match='^ignore_index must be'): loss.ignore_index = value
    with pytest.raises(TypeError, match='^generator must be'): ElasticFaceLoss(generator=5)
    for value in ('g', 0):
        with pytest.raises(TypeError, match='^group must be'):
            loss.linear(torch.eye(3), torch.eye(3), torch.arange(3), group=value)
    with pytest.raises(ValueError, match='^tilt must be'): LMSoftmaxLoss(tilt=3.)
    for k in (1, 0, -3):
        with pytest.raises(ValueError, match=f'^num_classes must be .*got {k}'): suggest_scale(k)
    for k in (2.5, True, '10'):
        with pytest.raises(TypeError, match='^num_classes must be .*got'): suggest_scale(k)


@pytest.mark.parametrize('make', [LDAMLoss, class_balanced_weights])
def test_bad_counts_are_refused(make):
    for counts, shown in (([5, 0], '0 for class 1'), ([5, -1], '-1 for class 1'), ([], r'\(0,\)'), ([5], r'\(1,\)'),
                          ([[1, 2]], r'\(1, 2\)'), ([1., math.nan], 'nan')):
        with pytest.raises(ValueError, match=f'^class_counts must .*{shown}'): make(counts)
    for counts in ('ab', None, [[1], [1, 2]], [True, True], {0: 1, 1: 2}, {1, 2}, 7):
        with pytest.raises(TypeError, match='^class_counts must be'): make(counts)
        if make is not LDAMLoss: continue
        loss = LDAMLoss([1, 2])
        with pytest.raises(TypeError, match='^class_counts must be'): loss.class_counts = counts


# --- on another device no value is read ---

@each_loss
def test_no_value_is_read_on_a_gpu(row):
    loss = row.make(20., range(4), weight=WEIGHT, reduction='class-mean')
    with FakeTensorMode(allow_non_fake_inputs=True):  # raises where a number would have to be known
        loss = loss.to('cuda')
        targets = torch.zeros(7, dtype=torch.long, device='cuda')
        value = loss(torch.rand(7, 4, device='cuda'), targets)
        assert value.device.type == 'cuda' and value.shape == ()
        if row.name == 'focal': return
        value = loss.linear(torch.rand(7, 3, device='cuda'), torch.rand(4, 3, device='cuda'), targets)
        assert value.device.type == 'cuda' and value.shape == ()


def test_shapes_and_dtypes_are_checked_on_a_gpu():
    with FakeTensorMode():
        cosines, targets = torch.rand(7, 4, device='cuda'), torch.zeros(7, dtype=torch.long, device='cuda')
        with pytest.raises(ValueError, match='^targets must'): NormFaceLoss()(cosines, targets[:6])
        with pytest.raises(TypeError, match='^targets must'): NormFaceLoss()(cosines, targets.float())
        with pytest.raises(ValueError, match='^cosines must'): NormFaceLoss()(cosines[0], targets)
        assert NormFaceLoss()(20 * cosines, targets).shape == ()  # what the values are is not asked


def test_a_slope_as_small_as_the_loss_keeps_its_digits_where_num_and_den_differ():
    "Both have slope 1, so the target's slope is that of the miss, here e⁻⁷⁰: 1 − (1 − miss) would be 0."
    cosines, targets = torch.tensor([[.9, -.5, -.2], [.8, -.3, -.4]]), torch.tensor([0, 0])
    def slope(dtype):
        leaf = cosines.to(dtype, copy=True).requires_grad_()
        GMSoftmaxLoss(64., beta1=-.05)(leaf, targets).backward()
        return leaf.grad.double()
    assert (slope(torch.float64)[:, 0] < 0).all()
    torch.testing.assert_close(slope(torch.float32), slope(torch.float64), rtol=2e-5, atol=0)
