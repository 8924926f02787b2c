"A loss that a user writes in a few lines runs where ours do: dense, fused, sharded, in a head, differentiated twice."
import pytest
import torch
from processes import returned, run_on_ranks
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from largest_margins.engine.cosines import cosine_matrix
from largest_margins.heads import MarginHead
from largest_margins.losses import CosFaceLoss, CosineLoss, MarginSoftmaxLoss, SampleMarginLoss

N, D, K = 6, 3, 4


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(N, D).to(dtype), torch.randn(K, D).to(dtype), torch.tensor([0, 1, 2, 3, 1, -100])


def ways(loss):
    "From features, prototypes and targets to a loss."
    head = MarginHead(D, K, loss, dtype=torch.float64)
    found = {'fused': loss.linear, 'head': lambda z, w, y: torch.func.functional_call(head, {'weight': w}, (z, y))}
    return found | {'dense': lambda z, w, y: loss(cosine_matrix(z, w), y)}


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
        for way in (lambda z, w, y, loss=loss: loss(cosine_matrix(z, w), y), loss.linear):
            if make is Forgotten and way == loss.linear:  # which forms its gradients itself
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


WRONG = dict(one=lambda own: own.cosine, numbers=lambda own: (.5, .5), mean=lambda own: (own.cosine.mean(),) * 2,
             column=lambda own: (own.cosine[:, None],) * 2, nothing=lambda own: None)


def each_way(loss):
    "The ways from features, prototypes and targets, also in chunks."
    return [*ways(loss).values(), lambda z, w, y: loss.linear(z, w, y, chunk_size=2)]


@pytest.mark.parametrize('said', WRONG)
def test_curves_are_two_with_a_number_for_each_sample(said):
    class Said(MarginSoftmaxLoss):
        def curves(self, own): return WRONG[said](own)
    for way in each_way(Said()):
        with pytest.raises(TypeError, match='curves of Said must return num and den'): way(*inputs())


def test_losses_are_one_for_each_sample():
    class Mean(Hinge):
        def per_sample(self, own, rest): return super().per_sample(own, rest).mean()
    for way in each_way(Mean()):
        with pytest.raises(ValueError, match=r'Mean must give a loss for each sample.* got shape \(\)'): way(*inputs())


@pytest.mark.parametrize('made', [.1, torch.tensor(.1), torch.full((N,), .1), torch.full((N, 1), .1),
                                  torch.full((N - 2,), .1)], ids=lambda made: str(getattr(made, 'shape', made)))
def test_numbers_that_a_loss_makes_itself_are_checked(made):
    class Made(Curves):
        numbers = {'slack': 'slack'}  # noqa: RUF012
        def per_batch(self, numbers, features, targets, group=None): return dict(slack=made)
        def curves(self, own, slack): return (x := own.cosine - slack), x
    features, prototypes, targets = inputs()
    for way in each_way(Made()):
        if getattr(made, 'shape', ()) in ((), (N,)):
            torch.testing.assert_close(way(features, prototypes, targets),
                                       CosFaceLoss(8., .1).linear(features, prototypes, targets), rtol=1e-7, atol=0)
            continue
        with pytest.raises(ValueError, match='slack must be a number or'): way(features, prototypes, targets)


class Halved(MarginSoftmaxLoss):
    "A margin softmax of which a user changes the losses, and not the curves."

    def per_sample(self, own, rest): return super().per_sample(own, rest) / 2


def test_the_losses_of_a_subclass_are_those_that_are_minimised():
    features, prototypes, targets = torch.randn(6, 5), torch.randn(4, 5), torch.arange(6) % 4
    gradients = []
    for loss in (Halved(scale=8.), MarginSoftmaxLoss(scale=8.)):
        leaves = [x.clone().requires_grad_() for x in (features, prototypes)]
        gradients.append(torch.autograd.grad(loss.linear(*leaves, targets), leaves))
    for half, whole in zip(*gradients, strict=True): torch.testing.assert_close(2 * half, whole)


def test_what_a_loss_of_ones_own_reads_learns_from_a_matrix():
    "Also what is no parameter of the loss: a matrix of cosines gives every gradient, as autograd does."
    margin = torch.tensor(.2, requires_grad=True)

    class Shifted(MarginSoftmaxLoss):
        def curves(self, own):
            logit = own.cosine - margin
            return logit, logit, 1., 1.
    Shifted(8.)(torch.tensor([[.5, .1], [-.2, .3]]), torch.tensor([0, 1])).backward()
    assert margin.grad > 0
