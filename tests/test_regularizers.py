"The zero-centroid term, and the sample margin as a term."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from largest_margins.heads import CosineLinear
from largest_margins.losses import NormFaceLoss, SampleMarginLoss
from largest_margins.regularizers import zero_centroid

mp.dps = 40
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORMS = [(torch.float32, 1e-30), (torch.float32, 1e-20), (torch.float32, 1e20), (torch.float32, 1e30),
         (torch.float64, 1e-200), (torch.float64, 1e200), (torch.bfloat16, 1e-30), (torch.bfloat16, 1e30),
         (torch.float16, 1e-3), (torch.float16, 1e3)]


def brute_zero_centroid(prototypes):
    "With forty digits, by loops."
    rows = [[mpf(x) for x in row] for row in prototypes.double().tolist()]
    units = [[x / mp.sqrt(sum(a * a for a in row)) for x in row] for row in rows]
    return float(sum((sum(column) / len(rows)) ** 2 for column in zip(*units)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_zero_centroid_is_brute_force(data):
    k, d = data.draw(st.integers(2, 7)), data.draw(st.integers(1, 4))
    row = st.lists(st.integers(-4, 4), min_size=d, max_size=d).filter(any)
    rows, dtype = data.draw(st.lists(row, min_size=k, max_size=k)), data.draw(st.sampled_from(DTYPES))
    prototypes = torch.tensor(rows, dtype=dtype)
    value = zero_centroid(prototypes)
    exact = prototypes.dtype == torch.float64
    assert value.shape == () and value.dtype == (torch.float64 if exact else torch.float32)
    assert value.item() == pytest.approx(brute_zero_centroid(prototypes), abs=1e-14 if exact else 1e-6)


@pytest.mark.parametrize('k, d', [(4, 3), (10, 16), (5, 5)])
def test_zero_centroid_vanishes_at_the_simplex_and_is_one_at_collapse(k, d):
    simplex = torch.zeros(k, max(k, d)).double()
    simplex[:, :k] = torch.eye(k).double() - 1 / k
    assert zero_centroid(simplex) < 1e-30
    assert zero_centroid(simplex[:1].repeat(k, 1)).item() == pytest.approx(1, rel=1e-14)
    points = torch.randn(k, d).double()
    assert zero_centroid(torch.cat([points, -points])) < 1e-30  # opposite pairs, too: it is no packing


@pytest.mark.parametrize('dtype, norm', NORMS, ids=str)
def test_zero_centroid_of_any_norm(dtype, norm):
    torch.manual_seed(0)
    prototypes = torch.randn(5, 3).to(dtype) * norm
    assert zero_centroid(prototypes).item() == pytest.approx(brute_zero_centroid(prototypes), abs=1e-6)
    mixed = torch.eye(3, dtype=dtype) * torch.tensor([norm, 1., 1 / norm], dtype=dtype)[:, None]
    assert zero_centroid(mixed).item() == pytest.approx(1 / 3, rel=1e-6)


def test_published_weight_is_ours_times_the_square_of_k():
    "The published code minimises ‖Σ_j w_j/‖w_j‖‖², without 1/k."
    torch.manual_seed(0)
    prototypes = torch.randn(6, 4).double()
    published = (prototypes / prototypes.norm(dim=1, keepdim=True)).sum(0).square().sum()
    assert (36 * zero_centroid(prototypes)).item() == pytest.approx(published.item(), rel=1e-13)


def test_gradient_of_zero_centroid():
    torch.manual_seed(0)
    prototypes = (torch.randn(5, 3).double() * torch.tensor([.1, 1, 10, 100, 1])[:, None]).requires_grad_()
    assert gradcheck(zero_centroid, prototypes)
    gradient, = torch.autograd.grad(zero_centroid(prototypes), prototypes)
    assert (gradient * prototypes).sum(1).abs().max() < 1e-14  # norms do not move


@pytest.mark.parametrize('norm', [1e-30, 1e-18, 1e18, 1e30])
def test_gradient_of_zero_centroid_of_any_norm(norm):
    torch.manual_seed(0)
    start = torch.randn(5, 3)
    gradients = []
    for x in (start, start * norm):
        x = x.clone().requires_grad_()
        zero_centroid(x).backward()
        gradients.append(x.grad)
    assert torch.allclose(gradients[1] * norm, gradients[0], rtol=1e-4, atol=1e-6)


def of_autograd(prototypes):
    "Value and gradient as autograd finds them in float64."
    rows = prototypes.detach().double().requires_grad_()
    value = (rows / rows.norm(dim=1, keepdim=True)).mean(0).square().sum()
    value.backward()
    return value.item(), rows.grad


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('moved', [0, 1])
def test_zero_centroid_of_many_in_blocks(dtype, moved):
    "More than one block; with `moved` 0, what remains of the sum is small."
    torch.manual_seed(0)
    prototypes = ((torch.randn(9000, 100) + moved) * (1 + torch.rand(9000, 1))).to(dtype).requires_grad_()
    true, slope = of_autograd(prototypes)
    value = zero_centroid(prototypes)
    (9000 * value).backward()  # of a size that float16 has
    assert value.item() == pytest.approx(true, rel=1e-13 if dtype == torch.float64 else 1e-6)
    bound = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
    assert (prototypes.grad - 9000 * slope).norm() <= bound * 9000 * slope.norm()
    assert prototypes.grad.dtype == dtype


def test_the_gradient_of_zero_centroid_has_a_gradient():
    torch.manual_seed(0)
    assert gradgradcheck(zero_centroid, torch.randn(5, 3).double().requires_grad_())


@pytest.mark.parametrize('transform', [torch.func.grad, torch.func.jacfwd, torch.func.hessian])
def test_zero_centroid_under_function_transforms(transform):
    prototypes = torch.randn(5, 3, dtype=torch.float64)
    def true(w): return (w / w.norm(dim=1, keepdim=True)).mean(0).square().sum()
    torch.testing.assert_close(transform(zero_centroid)(prototypes), transform(true)(prototypes))
    many = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(zero_centroid)(many), torch.stack([true(w) for w in many]))


def test_autocast_changes_no_zero_centroid():
    torch.manual_seed(0)
    prototypes = torch.randn(50, 20).requires_grad_()
    expected, = torch.autograd.grad(zero_centroid(prototypes), prototypes)
    with torch.autocast('cpu', torch.bfloat16):
        slope, = torch.autograd.grad(zero_centroid(prototypes), prototypes)
    assert torch.equal(slope, expected)


def test_zero_centroid_compiles_with_its_gradient():
    torch._dynamo.reset()
    torch.manual_seed(0)
    prototypes = torch.randn(9, 5).requires_grad_()
    compiled = torch.compile(zero_centroid, fullgraph=True, backend='aot_eager')
    expected, = torch.autograd.grad(zero_centroid(prototypes), prototypes)
    slope, = torch.autograd.grad(compiled(prototypes), prototypes)
    torch.testing.assert_close(slope, expected)


def test_zero_centroid_centres_prototypes():
    torch.manual_seed(0)
    head = CosineLinear(8, 6)
    optimiser = torch.optim.SGD(head.parameters(), 2.)
    start = zero_centroid(head.weight).item()
    for _ in range(200):
        optimiser.zero_grad()
        zero_centroid(head.weight).backward()
        optimiser.step()
    assert zero_centroid(head.weight).item() < 1e-6 < start


def test_zero_centroid_refuses_what_are_no_prototypes():
    good = torch.randn(3, 2)
    for prototypes, error, shown in (
            ([[1., 0]], TypeError, 'list'), (good.long(), TypeError, 'int64'), (good[0], ValueError, r'\(2,\)'),
            (good[:1], ValueError, r'\(1, 2\)'), (good[:0], ValueError, r'\(0, 2\)')):
        with pytest.raises(error, match=f'^prototypes must .*got .*{shown}'): zero_centroid(prototypes)
    for row in ([math.nan, 0.], [0., math.inf], [0., 0.]):
        with pytest.raises(ValueError, match='^prototypes must .*row 3'):
            zero_centroid(torch.cat([good, torch.tensor([row])]))


def test_no_value_is_read_on_a_gpu():
    with FakeTensorMode():
        prototypes = torch.rand(5, 3, device='cuda', requires_grad=True)
        value = zero_centroid(prototypes)
        assert value.device.type == 'cuda'
        node = next(f for f, _ in value.grad_fn.next_functions[0][0].next_functions)  # its sum, square, centroid
        assert node.name() == '_CentroidBackward'
        slope, _ = node.apply(torch.rand(3, device='cuda'))  # autograd's own engine wants a real GPU
        assert slope.shape == (5, 3) and slope.device.type == 'cuda'


# --- R_sm as a term ---

def test_sample_margin_term_is_the_mean_of_the_negative_margins():
    torch.manual_seed(0)
    features, prototypes, targets = torch.randn(6, 3).double(), torch.randn(4, 3).double(), torch.arange(6) % 4
    unit = [x / x.norm(dim=1, keepdim=True) for x in (features, prototypes)]
    cosines = (unit[0] @ unit[1].T).tolist()
    margins = [row[y] - max(c for j, c in enumerate(row) if j != y) for row, y in zip(cosines, targets.tolist())]
    value = SampleMarginLoss().linear(features, prototypes, targets)
    assert value.item() == pytest.approx(-sum(margins) / 6, abs=1e-14)


def test_many_gradients_at_once():
    "As `is_grads_batched` and the vectorized Hessian ask for them."
    torch.manual_seed(0)
    prototypes = torch.randn(4, 3).double().requires_grad_()
    one, = torch.autograd.grad(zero_centroid(prototypes), prototypes)
    many, = torch.autograd.grad(zero_centroid(prototypes), prototypes, torch.tensor([1., -2.]).double(),
                                is_grads_batched=True)
    torch.testing.assert_close(many, torch.stack([one, -2 * one]))
    each, vectorized = (torch.autograd.functional.hessian(zero_centroid, prototypes, vectorize=v)
                        for v in (False, True))
    torch.testing.assert_close(vectorized, each)


@pytest.mark.parametrize('weight', [.5, 2.])
def test_half_the_sample_margin_adds_its_gradient(weight):
    "The sum of the loss and the term is what a plain loop minimises; both see one matrix of cosines."
    torch.manual_seed(0)
    head, features, targets = CosineLinear(3, 4).double(), torch.randn(6, 3).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    def gradient(loss):
        head.zero_grad()
        loss(head(features), targets).backward()
        return head.weight.grad.clone()
    term, loss = SampleMarginLoss(), NormFaceLoss(10.)
    total = gradient(lambda c, y: loss(c, y) + weight * term(c, y))
    assert torch.allclose(total, gradient(loss) + weight * gradient(term), atol=1e-14)


def test_sample_margin_alone_separates():
    torch.manual_seed(0)
    head, features, targets = CosineLinear(6, 4), torch.randn(24, 6), torch.arange(24) % 4
    term = SampleMarginLoss(reduction='class-mean')
    optimiser = torch.optim.SGD(head.parameters(), .2)
    start = term(head(features), targets).item()
    for _ in range(50):
        optimiser.zero_grad()
        term(head(features), targets).backward()
        optimiser.step()
    assert term(head(features), targets).item() < start - .1
