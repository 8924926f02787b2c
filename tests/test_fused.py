"The losses from features and prototypes: the same numbers as from the matrix of cosines, without the matrix."
import sys
from pathlib import Path

import pytest
import torch
from fastai.torch_core import TensorBase, TensorCategory
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_family import ANGULAR, FAMILY, ON_COSINES, SMOOTHABLE, ignoring
from pairs import named, pairs
from processes import interpret, run_alone
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from largest_margins import losses
from largest_margins.checks import NotFinite
from largest_margins.engine.cosines import cosine_matrix
from largest_margins.engine.fused import BUFFER_BYTES, rows_at_once, straight_loss
from largest_margins.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CosFaceLoss,
    ElasticFaceLoss,
    GMSoftmaxLoss,
    LDAMLoss,
    LMSoftmaxLoss,
    NormFaceLoss,
    SphereFaceLoss,
)
from largest_margins.margins import angle

N, D, K = 23, 6, 11
BENCHMARK = Path(__file__).parent.parent/'benchmarks'/'losses.py'
each_loss = pytest.mark.parametrize('row', ON_COSINES, ids=repr)


def inputs(n=N, d=D, k=K, dtype=torch.float64, seed=0):
    "Features and prototypes of several norms, and targets in which some classes are missing."
    generator = torch.Generator().manual_seed(seed)
    features, prototypes = (torch.randn(rows, d, generator=generator, dtype=torch.float64)
                            * (10 ** torch.randn(rows, 1, generator=generator, dtype=torch.float64)) for rows in (n, k))
    return features.to(dtype), prototypes.to(dtype), torch.randint(k, (n,), generator=generator)


def dense(loss): return lambda z, w, y, **given: loss(cosine_matrix(z, w), y, **given)


def value_and_gradients(function, features, prototypes, targets, **given):
    "Loss and both gradients, in float64, of a sum that weighs samples unequally if there is one value for each."
    leaves = [x.clone().requires_grad_() for x in (features, prototypes)]
    value = function(*leaves, targets, **given)
    (value * torch.linspace(.5, 2, value.numel()).to(value).view(value.shape)).sum().backward()
    return [value.detach().double(), *(x.grad.double() for x in leaves)]


def distance(got, true): return max(((g - t).norm() / t.norm()).item() for g, t in zip(got, true, strict=True))


# --- the same numbers ---

WEIGHT, PRIOR = torch.linspace(.2, 2, K, dtype=torch.float64), torch.linspace(1, 900, K)
OPTIONS = pairs(ON_COSINES, ['mean', 'sum', 'none', 'class-mean'], [1, 7, N], [None, WEIGHT], [False, True], [0, .7],
                [None, PRIOR])


@pytest.mark.parametrize('row,reduction,chunk_size,weight,ignored,sample_margin,prior', OPTIONS, ids=named)
def test_value_and_gradient_in_float64(row, reduction, chunk_size, weight, ignored, sample_margin, prior):
    options = dict(reduction=reduction, weight=weight)
    if row.name != 'R_sm': options |= dict(sample_margin=sample_margin)
    if row.name != 'R_sm' and 'prior' not in row.name: options |= dict(prior=prior)
    loss, (features, prototypes, targets) = row.make(16., range(K), **options), inputs()
    if ignored: targets = ignoring(targets)
    got = value_and_gradients(lambda *a: loss.linear(*a, chunk_size=chunk_size), features, prototypes, targets)
    true = value_and_gradients(dense(loss), features, prototypes, targets)
    assert distance(got, true) < 1e-13
    if not ignored: return
    if reduction != 'none': assert got[1][targets < 0].count_nonzero() == 0
    nobody = value_and_gradients(lambda *a: loss.linear(*a, chunk_size=chunk_size), features, prototypes,
                                 torch.full_like(targets, -100))
    assert not any(x.any() for x in nobody)


@each_loss
def test_the_sample_margin_term_is_what_it_is_as_a_loss_of_its_own(row):
    if row.name == 'R_sm': return
    (features, prototypes, targets), term = inputs(), next(r for r in ON_COSINES if r.name == 'R_sm')
    for reduction in ('mean', 'class-mean'):
        parts = [row.make(16., range(K), reduction=reduction), term.make(1., range(K), reduction=reduction)]
        def apart(*a, parts=parts): return dense(parts[0])(*a) + .7 * dense(parts[1])(*a)
        loss = row.make(16., range(K), reduction=reduction, sample_margin=.7)
        true = value_and_gradients(apart, features, prototypes, targets)
        for way in (dense(loss), lambda *a, loss=loss: loss.linear(*a, chunk_size=7)):
            assert distance(value_and_gradients(way, features, prototypes, targets), true) < 1e-12


@each_loss
def test_value_and_gradient_in_float32(row):
    loss, batch = row.make(16., range(K)), inputs(dtype=torch.float32)
    true = value_and_gradients(dense(loss), *(x.double() for x in batch[:2]), batch[2])
    for chunk_size in (7, N):
        got = value_and_gradients(lambda *a, size=chunk_size: loss.linear(*a, chunk_size=size), *batch)
        assert distance(got, true) < 2e-6


def test_log_sum_exp_at_scale_64_in_float32():
    "The weights exp(s·L) multiply the rounding of L by s."
    loss, batch = LMSoftmaxLoss(64., 'logsumexp'), inputs(64, 16, 50, dtype=torch.float32)
    true = value_and_gradients(dense(loss), *(x.double() for x in batch[:2]), batch[2])
    for way in (loss.linear, lambda *a: loss.linear(*a, chunk_size=7), dense(loss)):
        assert distance(value_and_gradients(way, *batch), true) < 5e-6


@pytest.mark.parametrize('row,dtype,of', pairs(ON_COSINES, [torch.bfloat16, torch.float16], ['features', 'both']),
                         ids=named)
def test_half_precision_is_only_storage(row, dtype, of):
    features, prototypes, targets = inputs(dtype=dtype)
    prototypes = prototypes if of == 'both' else prototypes.float()
    loss = row.make(16., range(K))
    got = value_and_gradients(loss.linear, features, prototypes, targets)
    true = value_and_gradients(dense(loss), features.double(), prototypes.double(), targets)
    assert loss.linear(features, prototypes, targets).dtype == torch.float32
    assert distance(got[:1], true[:1]) < 2e-6
    assert distance(got[1:], true[1:]) < 2 * torch.finfo(dtype).eps  # the gradient takes the dtype of its input


@given(n=st.integers(1, 9), d=st.integers(1, 5), k=st.integers(2, 9), chunk_size=st.integers(1, 12),
       row=st.sampled_from(ON_COSINES), seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_shape(n, d, k, chunk_size, row, seed):
    if d == 1 and row in ANGULAR: d = 2  # on the line every angle is 0 or π, where the angle has no slope
    loss, batch = row.make(8., range(k)), inputs(n, d, k, seed=seed)
    got = value_and_gradients(lambda *a: loss.linear(*a, chunk_size=chunk_size), *batch)
    sizes = torch.ones(()), *(x.norm(dim=1, keepdim=True) for x in batch[:2])  # a gradient goes with 1/‖row‖
    units = [x.detach() / x.norm(dim=1, keepdim=True) for x in batch[:2]]
    sine = angle(units[0], units[1][batch[2]]).sin().min().item()  # a cosine's rounding grows by 1/sin² in a slope
    slack = max(1, 1e-3 / sine**2) if row in ANGULAR else 1
    for g, t, size in zip(got, value_and_gradients(dense(loss), *batch), sizes, strict=True):
        assert (size * (g - t)).norm() <= slack * 1e-12 * (1 + (size * t).norm())


@pytest.mark.parametrize('loss', [LDAMLoss([5, 3, 2]), LDAMLoss(range(1, 9)), GMSoftmaxLoss(8., alpha1=[1.] * 3)],
                         ids=repr)
@pytest.mark.parametrize('targets', [[0, 1, 2, 0], [0, 1, 3, 0]])
def test_numbers_for_other_classes_are_refused_on_every_way(loss, targets):
    "Also where the batch has none of the classes that are missing."
    (features, prototypes, _), targets = inputs(4, 3, 4), torch.tensor(targets)
    for way in (loss.linear, dense(loss), lambda *a: loss.linear(*a, chunk_size=2)):
        with pytest.raises(ValueError, match=r'must be \[k\] with k = 4'): way(features, prototypes, targets)


STRAIGHT = [{}, dict(reduction='sum'), dict(reduction='class-mean'), dict(weight=torch.arange(1., K + 1)),
            dict(weight=torch.zeros(K)), dict(weight=torch.arange(1., K + 1), reduction='class-mean', sample_margin=.5),
            dict(prior=PRIOR), dict(prior=PRIOR.flip(0), sample_margin=.5, reduction='sum'), dict(scale=200.)]


@pytest.mark.parametrize('row, options, dtype', pairs(ON_COSINES, STRAIGHT, [torch.float64, torch.float32]), ids=named)
def test_the_straight_line_and_the_careful_engine_agree(row, options, dtype):
    loss, batch = row.make(16., range(K)), inputs(dtype=dtype)
    for name, value in options.items():
        if loss.scale or name in ('reduction', 'weight'): setattr(loss, name, value)
    usual = type(loss).__module__ == losses.__name__ and type(loss).per_batch is CosFaceLoss.per_batch
    assert (straight_loss(loss, batch[2], {}, *batch[:2]) is not None) == usual
    straight, careful = (value_and_gradients(lambda *a, size=size: loss.linear(*a, chunk_size=size), *batch)
                         for size in ('auto', N))
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert all((a - b).norm() <= tolerance * b.norm() for a, b in zip(straight, careful, strict=True))


@pytest.mark.parametrize('loss, names', [
    (GMSoftmaxLoss(8.), ('alpha1', 'beta2')), (CosFaceLoss(8.), ('margin',)), (SphereFaceLoss(8.), ('m1', 'm3')),
    (GMSoftmaxLoss(8., sample_margin=.5, weight=torch.arange(1., K + 1)), ('alpha2',))], ids=repr)
def test_numbers_for_each_sample_go_straight(loss, names):
    "Also the way back a second time, and gradients of gradients."
    batch, numbers = inputs(), dict(zip(names, 1 + torch.rand(2, N, dtype=torch.float64)))
    straight, careful = (lambda *a, size=size: loss.linear(*a, chunk_size=size, **numbers) for size in ('auto', N))
    assert straight_loss(loss, batch[2], numbers, *batch[:2]) is not None
    assert distance(value_and_gradients(straight, *batch), value_and_gradients(careful, *batch)) < 1e-13
    def of_matrix(z, w, y): return loss(cosine_matrix(z, w), y, **numbers)
    assert distance(value_and_gradients(of_matrix, *batch), value_and_gradients(careful, *batch)) < 1e-12
    leaves = [x.detach().requires_grad_() for x in batch[:2]]
    value = straight(*leaves, batch[2])
    once, again = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))
    assert gradgradcheck(lambda z: straight(z, batch[1].detach(), batch[2]), leaves[:1])
    learned = {name: x.clone().requires_grad_() for name, x in numbers.items()}
    loss.linear(*batch, **learned).backward()
    assert all(x.grad.any() for x in learned.values())


class Count(TorchDispatchMode):
    operations = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


def test_few_operations_also_for_tensors_of_fastai():
    features, prototypes, targets = inputs(dtype=torch.float32)
    def count(*a):
        with Count() as found: CosFaceLoss(16.).linear(*a).backward()
        return found.operations
    batch = features.requires_grad_(), prototypes.requires_grad_(), targets
    count(*batch)
    fastais = TensorBase(features), prototypes, TensorCategory(targets)
    assert count(*fastais) <= count(*batch) + 8 <= 46  # the ways into a subclass and out of it


@pytest.mark.parametrize('loss, most', [(NormFaceLoss(16.), 70), (ArcFaceLoss(16.), 100)])
def test_not_many_more_operations_where_values_are_not_seen(loss, most):
    "As on a GPU, which waits for each of them: rows of odd norms are taken care of without a look."
    batch = [x.detach().to('meta').requires_grad_(x.is_floating_point()) for x in inputs(dtype=torch.float32)]
    with Count() as found: loss.linear(*batch).backward()
    assert found.operations <= most


@pytest.mark.parametrize('chunk_size', [1, 7, N])
def test_numbers_for_each_sample_have_gradients(chunk_size):
    features, prototypes, targets = inputs()
    loss = GMSoftmaxLoss(8.)
    names = 'alpha1', 'alpha2', 'beta1', 'beta2'
    numbers = torch.rand(4, N, dtype=torch.float64).add_(.5).requires_grad_()

    def run(function): return torch.autograd.grad(
        function(features, prototypes, targets, **dict(zip(names, numbers, strict=True))), numbers)[0]
    got = run(lambda *a, **given: loss.linear(*a, **given, chunk_size=chunk_size))
    assert (got - run(dense(loss))).norm() < 1e-13 * got.norm()
    slope = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)  # one number, learned
    got, = torch.autograd.grad(loss.linear(features, prototypes, targets, alpha1=slope), slope)
    true, = torch.autograd.grad(dense(loss)(features, prototypes, targets, alpha1=slope), slope)
    assert abs(got - true) < 1e-13


@each_loss
def test_against_finite_differences(row):
    loss, (features, prototypes, targets) = row.make(4., range(4)), inputs(5, 3, 4)
    features, prototypes = (x / x.norm(dim=1, keepdim=True) for x in (features, prototypes))
    assert gradcheck(lambda z, w: loss.linear(z, w, targets, chunk_size=2),
                     [features.requires_grad_(), prototypes.requires_grad_()])


# --- edges ---

@each_loss
@pytest.mark.parametrize('chunk_size', [1, N])
def test_zero_and_extreme_norms(row, chunk_size):
    loss = row.make(16., range(K))
    for dtype, tiny, huge in ((torch.float64, 1e-200, 1e200), (torch.float32, 1e-30, 1e25)):
        features, prototypes, targets = inputs(dtype=dtype)
        features[0], prototypes[3] = 0, 0
        features[1] *= tiny
        prototypes[4] *= huge
        got = value_and_gradients(lambda *a: loss.linear(*a, chunk_size=chunk_size), features, prototypes, targets)
        assert all(x.isfinite().all() for x in got)
        true = value_and_gradients(dense(loss), features.double(), prototypes.double(), targets)
        for g, t in zip(got[1:], true[1:], strict=True):  # row by row: their sizes differ by hundreds of orders
            rows = ((g - t).norm(dim=1) / t.norm(dim=1).clamp_min(1e-300)).nan_to_num()
            if row.name == 'SphereFace 4': rows[3] = 0  # its zero prototype sits at a kink, θ = π/2, of slope 0
            if row.name == 'R_sm': rows = rows[1:]  # at zero all cosines are the largest, and any of them is right
            assert rows.max() < (1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize('size', [1e-40, 1e38, 0.])
@pytest.mark.parametrize('row', [*ON_COSINES, None], ids=lambda row: 'AdaFace' if row is None else row.name)
def test_rows_at_the_ends_of_float32(row, size):
    "Subnormal, near the largest number, and zero: values are finite and equal on each way, and no slope is nan."
    loss = AdaFaceLoss().eval() if row is None else row.make(16., range(K))
    features, prototypes, targets = inputs(dtype=torch.float32)
    features[0] = torch.nn.functional.normalize(features[0], dim=0) * size
    prototypes[targets[1]] = torch.nn.functional.normalize(prototypes[targets[1]], dim=0) * size
    values = []
    ways = [loss.linear, lambda *a: loss.linear(*a, chunk_size=7), *([] if row is None else [dense(loss)])]
    for way in ways:
        for leaves in ((features, prototypes), (features.clone().requires_grad_(),
                                                prototypes.clone().requires_grad_())):
            values.append(way(*leaves, targets))
        slopes = torch.autograd.grad(values[-1], leaves)
        assert not any(x.isnan().any() for x in slopes)
        assert slopes[0][2:].isfinite().all()
    assert all(v.isfinite() for v in values)
    assert max(values) - min(values) <= 1e-5 * max(values).abs()


@each_loss
def test_what_is_not_finite_is_refused_as_a_divergence(row):
    loss, (features, prototypes, targets) = row.make(16., range(K)), inputs()
    for wrong in (torch.nan, torch.inf, -torch.inf):
        for rows, name in ((features, 'features'), (prototypes, 'prototypes')):
            pair = [x.clone() for x in (features, prototypes)]
            pair[rows is prototypes][3, 1] = wrong
            with pytest.raises(NotFinite, match=f'^{name} must be finite, row 3'): loss.linear(*pair, targets)


def test_batches_of_weightless_classes():
    features, prototypes, targets = inputs()
    weight = torch.ones(K)
    weight[targets.unique()] = 0
    for loss in (CosFaceLoss(weight=weight), LMSoftmaxLoss(20., 'logsumexp', weight=weight)):
        got = value_and_gradients(lambda *a, f=loss.linear: f(*a, chunk_size=5), features, prototypes, targets)
        assert all((x.abs() < 1e-24).all() for x in got)  # a slope below the least number of the buffer counts as it


def test_a_first_chunk_without_weight():
    "The log-sum-exp starts from the first chunk that counts."
    features, prototypes, targets = inputs()
    targets = targets.sort().values
    weight = torch.ones(K, dtype=torch.float64)
    weight[targets[:8].unique()] = 0
    loss = LMSoftmaxLoss(20., 'logsumexp', weight=weight)
    got = value_and_gradients(lambda *a: loss.linear(*a, chunk_size=3), features, prototypes, targets)
    assert distance(got, value_and_gradients(dense(loss), features, prototypes, targets)) < 1e-13


@pytest.mark.parametrize('order', ['rising', 'falling', 'given'])
@pytest.mark.parametrize('sample_margin,products', [(0., 3), (.5, 4)])  # R_sm's weights are others
def test_a_log_sum_exp_over_chunks_is_one_pass(order, sample_margin, products):
    "Whichever chunk has the largest loss."
    loss = LMSoftmaxLoss(20., 'logsumexp', sample_margin=sample_margin, weight=torch.arange(1., K + 1).double())
    features, prototypes, targets = inputs()
    losses = LMSoftmaxLoss(20., reduction='none').linear(features, prototypes, targets)
    at = dict(rising=losses.argsort(), falling=losses.argsort(descending=True), given=torch.arange(N))[order]
    batch = features[at], prototypes, targets[at]
    with Products() as seen: got = value_and_gradients(lambda *a: loss.linear(*a, chunk_size=-(-N // 3)), *batch)
    assert distance(got, value_and_gradients(dense(loss), *batch)) < 1e-13
    assert seen.count == 3 * products


@pytest.mark.parametrize('chunk_size', [2.5, '12', None, True])
def test_bad_chunk_sizes(chunk_size):
    with pytest.raises(TypeError, match='^chunk_size must be'): NormFaceLoss().linear(*inputs(), chunk_size=chunk_size)


def test_chunks_have_rows():
    for size in (0, -1):
        with pytest.raises(ValueError, match=f'^chunk_size must be ≥ 1, got {size}'):
            NormFaceLoss().linear(*inputs(), chunk_size=size)


def test_numbers_for_each_sample_are_checked_before_they_are_cut():
    for wrong in (torch.ones(N + 1), torch.ones(7)):
        with pytest.raises(ValueError, match=f'^alpha1 must be .*N = {N}'):
            GMSoftmaxLoss().linear(*inputs(), alpha1=wrong, chunk_size=7)
    with pytest.raises(TypeError, match='alpha3'): GMSoftmaxLoss().linear(*inputs(), alpha3=torch.ones(N))


# --- how autograd uses it ---

@each_loss
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_one_side_only(row, reduction):
    features, prototypes, targets = inputs()
    loss = row.make(16., range(K), reduction=reduction)
    both = [x.clone().requires_grad_() for x in (features, prototypes)]
    expected = torch.autograd.grad(loss.linear(*both, targets).sum(), both)
    for side, fixed in ((0, 1), (1, 0)):
        leaves = [features.clone(), prototypes.clone()]
        leaves[side].requires_grad_()
        loss.linear(*leaves, targets).sum().backward()
        assert leaves[fixed].grad is None
        assert torch.equal(leaves[side].grad, expected[side])
    assert not loss.linear(features, prototypes, targets).requires_grad


@each_loss
@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_a_second_backward_is_right_or_an_error(row, reduction):
    features, prototypes, targets = inputs()
    leaves = [x.clone().requires_grad_() for x in (features, prototypes)]
    value = row.make(16., range(K), reduction=reduction).linear(*leaves, targets, chunk_size=7).sum()
    first = torch.autograd.grad(3 * value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves, retain_graph=True)
    assert all((a - 3 * b).norm() <= 1e-14 * a.norm() for a, b in zip(first, second, strict=True))
    with torch.no_grad(): leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): value.backward()


@each_loss
def test_the_loss_may_change_before_backward(row):
    "fastai's MixUp asks for 'none' and sets the reduction back before it goes backward."
    features, prototypes, targets = inputs()
    features.requires_grad_()
    loss = row.make(16., range(K), reduction='none')
    value = loss.linear(features, prototypes, targets).mean()
    loss.reduction, loss.scale = 'sum', 1.
    true = dense(row.make(16., range(K), reduction='none'))(features, prototypes, targets).mean()
    got, expected = (torch.autograd.grad(v, features)[0] for v in (value, true))
    assert (got - expected).norm() < 1e-13 * expected.norm()


def penalty_slope(function, leaves):
    "The gradient of a loss, and that of the loss and ten times the square of its gradient."
    value = function(*leaves)
    slopes = torch.autograd.grad(value, leaves, create_graph=True)
    penalty = value + 10 * sum(x.square().sum() for x in slopes)
    return [*(x.detach() for x in slopes), *torch.autograd.grad(penalty, leaves)]


def penalty_slope_of_func(function, leaves):
    "The same by `torch.func`, which sees torch's own operations only."
    leaves, slope = [x.detach() for x in leaves], torch.func.grad(function, (0, 1))
    def penalty(*x): return function(*x) + 10 * sum(s.square().sum() for s in slope(*x))
    return [*slope(*leaves), *torch.func.grad(penalty, (0, 1))(*leaves)]


SHARED = {  # where features come from, if not from elsewhere
    'apart': lambda z, w: (z, w), 'features are the prototypes': lambda z, w: (w, w),
    'features of prototypes': lambda z, w: (z + w[:1].sin(), w), 'prototypes of features': lambda z,
          w: (z, w * z.mean())}


@each_loss
@pytest.mark.parametrize('shared', SHARED)
def test_the_gradient_has_the_gradient_of_the_matrix(row, shared):
    "With class weights, R_sm and an ignored sample; also where features and prototypes depend on each other."
    make, options = SHARED[shared], {} if row.name == 'R_sm' else dict(weight=[1., 2., .5, 1.], sample_margin=.3)
    loss, (features, prototypes, targets) = row.make(4., range(4), **options), inputs(5, 3, 4)
    features, prototypes = (x / x.norm(dim=1, keepdim=True) for x in (features, prototypes))
    if shared == 'features are the prototypes':  # not on its own prototype, where an angle has no slope
        features, targets = features[:4], torch.tensor([1, 2, 3, 0])
    targets, leaves = ignoring(targets), [features.requires_grad_(), prototypes.requires_grad_()]
    def whole(way): return lambda z, w: way(*make(z, w), targets)
    true = penalty_slope_of_func(lambda z, w: dense(loss)(*make(z + 0 * w.sum(), w + 0 * z.sum()), targets), leaves)
    for way in (loss.linear, dense(loss), lambda *a: loss.linear(*a, chunk_size=2)):
        got = penalty_slope(lambda z, w, way=way: whole(way)(z + 0 * w.sum(), w + 0 * z.sum()), leaves)
        assert max((g - t).norm() / (1 + t.norm()) for g, t in zip(got, true, strict=True)) < 1e-10


@pytest.mark.parametrize('make', [NormFaceLoss, ArcFaceLoss, lambda s: LMSoftmaxLoss(s, 'logsumexp')])
def test_the_second_derivative_against_finite_differences(make):
    features, prototypes, targets = inputs(4, 3, 4)
    leaves = [(x / x.norm(dim=1, keepdim=True)).requires_grad_() for x in (features, prototypes)]
    assert torch.autograd.gradgradcheck(lambda z, w: make(4.).linear(z, w, targets), leaves)
    assert torch.autograd.gradgradcheck(lambda z, w: dense(make(4.))(z, w, targets), leaves)


@pytest.mark.parametrize('reduction', ['mean', 'none'])
def test_many_slopes_at_once(reduction):
    "`torch.autograd.functional` asks for whole Jacobians, one row after the other or all together."
    features, prototypes, targets = inputs()
    loss = CosFaceLoss(4., .1, reduction=reduction)
    for way in (loss.linear, dense(loss)):
        one, many = (torch.autograd.functional.jacobian(lambda z, way=way: way(z, prototypes, targets), features,
                                                        vectorize=v) for v in (False, True))
        assert (one - many).norm() < 1e-13 * one.norm()


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    "Counts products of matrices."
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ('mm', 'addmm', 'addmm_', 'linear')
        return func(*args, **kwargs or {})


def test_no_gradient_is_made_in_vain():
    "One product where none is wanted, two where one side is, three for both."
    features, prototypes, targets = inputs()
    one, both = features.clone().requires_grad_(), (features.clone().requires_grad_(),
                                                    prototypes.clone().requires_grad_())
    def count(*leaves):
        with Products() as products: NormFaceLoss().linear(*leaves, targets)
        return products.count
    assert [count(features, prototypes), count(one, prototypes), count(*both)] == [1, 2, 3]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert count(*both) == 1
            assert not NormFaceLoss().linear(*both, targets).requires_grad


def test_used_twice():
    features, prototypes, targets = inputs()
    loss = CosFaceLoss(16.)

    def twice(linear):
        def run(z, w, y):
            value = linear(z, w, y)
            return value * value + linear(2 * z, w, y)
        return value_and_gradients(run, features, prototypes, targets)
    assert distance(twice(loss.linear), twice(dense(loss))) < 1e-13


@each_loss
def test_autocast_changes_nothing(row):
    batch, loss = inputs(dtype=torch.float32), row.make(16., range(K))
    expected = value_and_gradients(loss.linear, *batch)

    def under_autocast(*a):
        with torch.autocast('cpu', torch.bfloat16): return loss.linear(*a)
    assert distance(value_and_gradients(under_autocast, *batch), expected) == 0


@pytest.mark.parametrize('row', SMOOTHABLE, ids=repr)
def test_label_smoothing_of_a_matrix_under_autocast(row):
    cosines, targets = cosine_matrix(*inputs(dtype=torch.float32)[:2]), inputs()[2]
    loss = row.make(16., range(K), label_smoothing=.2)
    expected = loss(cosines, targets)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(loss(cosines, targets), expected)


# --- memory ---

@given(samples=st.integers(1, 5000), num_classes=st.integers(2, 10**8))
def test_the_buffer_keeps_its_budget(samples, num_classes):
    rows = rows_at_once(samples, num_classes)
    assert 1 <= rows <= samples
    assert rows == 1 or 4 * rows * num_classes <= BUFFER_BYTES


@each_loss
def test_more_classes_than_a_block_of_rows_has_room_for(row):
    "Prototypes too many to be normalized at once, and a row for each block."
    k = 2 ** 17 + 1
    loss, batch = row.make(8., [0] * k), inputs(3, 2, k)
    got, true = (value_and_gradients(way, *batch) for way in (loss.linear, dense(loss)))
    assert distance(got, true) < 1e-11


@pytest.mark.skipif(sys.platform != 'linux', reason='peak memory is read from /proc')
@pytest.mark.parametrize('name', ['ArcFace', 'LM-Softmax, log-sum-exp', 'R_sm'])
def test_peak_memory(name):
    "A step of a fresh process: the gradients, and at most 96 MiB, of which the matrix of cosines would take 781."
    samples, d, k = 2048, 64, 100_000
    _, added = run_alone(interpret, BENCHMARK, '--peak', f'ours, {name}', '--shapes', f'{samples}x{d}x{k}')
    assert int(added) - 4 * d * (samples + k) < 96 * 2**20


def test_focal_loss_is_of_logits():
    assert not hasattr(next(row for row in FAMILY if row.name == 'focal').make(1., range(3)), 'linear')


@pytest.mark.parametrize('view', [lambda x: x[:, :D], lambda x: x[:, :D].T.contiguous().T,
                                  lambda x: x[:1, :D].expand(N, D)], ids=['slice', 'transposed', 'expanded'])
def test_features_and_prototypes_need_not_be_contiguous(view):
    features, prototypes, targets = inputs(d=D + 3)
    def way(copy):
        def value(z, w, y): return NormFaceLoss(8.).linear(copy(view(z)), copy(w[:, :D].T.contiguous().T), y)
        return value_and_gradients(value, features, prototypes, targets)
    assert not view(features).is_contiguous()
    for got, true in zip(way(lambda x: x), way(torch.Tensor.contiguous), strict=True):
        assert torch.allclose(got, true, rtol=1e-12, atol=0)


@pytest.mark.parametrize('make', [lambda: GMSoftmaxLoss(8., alpha1=torch.linspace(1, 2, 5), reduction='none'),
                                  lambda: LDAMLoss([1., 2, 3, 4, 5], 8., reduction='none'),
                                  lambda: LDAMLoss([1., 2, 3, 4, 5], 8.)])
def test_numbers_of_each_class_may_change_in_place_before_backward(make):
    "The gradient is that of the loss as it was."
    features, prototypes, targets = torch.randn(7, 3), torch.randn(5, 3), torch.arange(7) % 5
    for options in ({}, dict(chunk_size=2)):
        loss, leaf = make(), features.clone().requires_grad_()
        true, = torch.autograd.grad(loss.linear(leaf, prototypes, targets, **options).sum(), leaf)
        value = loss.linear(leaf, prototypes, targets, **options).sum()
        for buffer in loss.buffers(): buffer[0] = 50
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(value, leaf, retain_graph=True)[0], true)
        torch.testing.assert_close(torch.autograd.grad(value, leaf, create_graph=True)[0], true)


@pytest.mark.parametrize('device', ['meta', 'cpu'])
def test_a_default_device_leaves_nothing_behind(device):
    "What is made once on the way is made for CPUs, whatever the default is at that time."
    batch = torch.randn(13, 7), torch.randn(5, 7), torch.arange(13) % 5
    with torch.device(device): value = CosFaceLoss(23., .21, sample_margin=.3).linear(*batch)
    assert value.item() == CosFaceLoss(23., .21, sample_margin=.3).linear(*batch).item()
    with torch.device(device): drawing = ElasticFaceLoss(23.)
    assert drawing.linear(*batch).isfinite()
