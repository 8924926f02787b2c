"Largest sample margins for given prototypes: against an independent solver, with certificates that can be refused."
import copy
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from largest_margins.certificates import checksum, verify
from largest_margins.codes import best_packing, largest_sample_margins, sample_margin_certificate, simplex
from largest_margins.margins import min_sample_margin, unit_rows


def prototypes(k, d, seed, dtype=torch.float64):
    return torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize('k,d,seed', [(2, 2, 0), (3, 2, 1), (5, 3, 2), (8, 3, 3), (30, 5, 4), (10, 64, 5)])
def test_against_a_general_solver(k, d, seed):
    W = unit_rows(prototypes(k, d, seed))
    features, margins = largest_sample_margins(W)
    assert features.shape == (k, d) and margins.shape == (k,) and margins.dtype == torch.float64
    assert (features.norm(dim=1) - 1).abs().max() < 1e-12
    cosines = features @ W.T
    own = cosines.diagonal()
    lead = own - cosines.clone().fill_diagonal_(-2).amax(1)
    assert torch.allclose(lead, margins, atol=1e-9)  # attained, so not too large
    for y in range(min(k, 4)):  # and no hull point is nearer, so not too small
        others = np.delete(W.numpy(), y, 0)
        def square(x, y=y, others=others): return np.sum((W[y].numpy() - x @ others)**2)
        found = minimize(square, np.full(k - 1, 1 / (k - 1)), method='SLSQP',
                         bounds=[(0, 1)] * (k - 1), constraints=dict(type='eq', fun=lambda x: x.sum() - 1),
                         options=dict(ftol=1e-14, maxiter=500))
        assert math.sqrt(found.fun) >= margins[y] - 1e-7


def test_of_any_norm_and_dtype():
    W = prototypes(7, 4, 0)
    features, margins = largest_sample_margins(W)
    for other in (W * torch.logspace(-6, 6, 7, dtype=torch.float64)[:, None], W.float(), W.clone().requires_grad_()):
        same = largest_sample_margins(other)
        assert torch.allclose(same[0], features, atol=1e-5) and torch.allclose(same[1], margins, atol=1e-6)
        assert not same[1].requires_grad


def test_simplex_and_twins():
    features, margins = largest_sample_margins(simplex(6, 5))
    assert torch.allclose(features, simplex(6, 5), atol=1e-12) and (margins - 6 / 5).abs().max() < 1e-12
    twins = torch.tensor([[1., 0, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    features, margins = largest_sample_margins(twins)
    assert margins[:2].tolist() == [0, 0] and torch.equal(features[:2], twins[:2])
    assert min_sample_margin(features @ twins.T, torch.arange(3)) == 0


@pytest.mark.parametrize('k,d', [(7, 3), (8, 3), (13, 3), (9, 4)])
def test_a_best_packing_has_equal_margins(k, d):
    packing = best_packing(k, d, starts=8)
    features, margins = largest_sample_margins(packing.points)
    assert (margins - (1 - math.cos(packing.class_margin))).abs().max() < 1e-9
    assert torch.allclose(features, packing.points, atol=1e-6)


@pytest.mark.parametrize('wrong,error', [(torch.ones(1, 3), ValueError), (torch.zeros(3, 3), ValueError),
                                         (torch.full((3, 3), math.nan), ValueError),
                                         (torch.ones(3, 3).int(), TypeError)])
def test_refuses(wrong, error):
    with pytest.raises(error, match='prototypes'): largest_sample_margins(wrong)
    with pytest.raises(error, match='prototypes'): sample_margin_certificate(wrong, 0)


@pytest.mark.parametrize('target', [-1, 5, 1.0, None, True])
def test_refuses_targets(target):
    with pytest.raises((TypeError, ValueError), match='target must be'):
        sample_margin_certificate(prototypes(5, 3, 0), target)


@pytest.mark.parametrize('k,d,dtype', [(2, 2, torch.float64), (8, 3, torch.float32), (40, 10, torch.float64),
                                       (100, 64, torch.float32)])
def test_certificates_enclose_the_margin(k, d, dtype):
    W = prototypes(k, d, k, dtype)
    margins = largest_sample_margins(W)[1]
    for y in (0, k - 1):
        certificate = sample_margin_certificate(W, y)
        assert verify(certificate) and verify(json.dumps(certificate))
        low, high = Fraction(certificate['lower']), Fraction(certificate['upper'])
        assert low <= high and high - low < Fraction(1, 10**9)
        assert low - Fraction(1, 10**12) <= margins[y].item() <= high + Fraction(1, 10**12)


def test_twins_have_margin_zero_and_a_certificate():
    W = torch.tensor([[1., 0], [1, 0], [0, 1]])
    certificate = sample_margin_certificate(W, 0)
    assert verify(certificate) and Fraction(certificate['lower']) == 0 and Fraction(certificate['upper']) < 1e-15


def signed(certificate, **changes):
    lie = {**copy.deepcopy(certificate), **changes}
    return {**lie, 'sha256': checksum(lie)}


def test_tampered_certificates_are_refused():
    true = sample_margin_certificate(prototypes(6, 3, 1), 2)
    low, high, weights = Fraction(true['lower']), Fraction(true['upper']), true['weights']
    rest = str(Fraction(weights[0]) + Fraction(weights[1]) + Fraction(1, 10))
    negative = ['-1/10', rest, *weights[2:]]
    ninth = str(Fraction(true['points'][0][0]) + Fraction(1, 10**9))
    moved = [[ninth, *true['points'][0][1:]], *true['points'][1:]]
    lies = dict(
        lower=signed(true, lower=str(low + Fraction(1, 10**6)), upper=str(high + 1)),
        upper=signed(true, upper=str(low - Fraction(1, 10**6)), lower='0'),
        swapped=signed(true, lower=str(high + 1)), target=signed(true, target=3), beyond=signed(true, target=6),
        negative=signed(true, weights=negative), short=signed(true, weights=weights[:-1]),
        floats=signed(true, lower=.5), no_points=signed(true, points=[]), text=signed(true, points='12'),
        ragged=signed(true, points=[row[:1] for row in true['points']]), other_kind=signed(true, kind='delsarte'),
        extra=signed(true, note=''), missing={k: v for k, v in true.items() if k != 'direction'},
        ninth_digit={**true, 'points': moved}, boolean=signed(true, target=True),
        direction=signed(true, direction=[str(-Fraction(x)) for x in true['direction']]))
    assert verify(true)
    assert {name: verify(lie) for name, lie in lies.items()} == dict.fromkeys(lies, False)


# --- the theorem: what holds at every optimum, and for every prototypes ---

@pytest.mark.parametrize('k,d', [(4, 3), (5, 3), (6, 3), (7, 4), (5, 2), (8, 2)])
def test_few_classes_and_classes_on_the_circle_have_no_optimum_but_best_packings(k, d):
    from largest_margins.ledger.codes import largest_margin
    from largest_margins.margins import class_margin
    best = best_packing(k, d).class_margin
    for seed in range(3):
        found, W, Z = largest_margin(k, d, seed)
        if found < 1 - math.cos(best) - 1e-4: continue  # this descent stuck
        assert (W - Z).norm(dim=1).max() < .02  # √ of the slack
        assert class_margin(W).item() == pytest.approx(best, abs=.02)
        break
    else: pytest.fail('no descent reached the optimum')


@pytest.mark.parametrize('k,d,seed', [(4, 2, 0), (5, 3, 1), (7, 3, 2), (9, 4, 3), (12, 3, 4)])
def test_the_prototype_is_the_best_feature_exactly_where_the_pulls_balance(k, d, seed):
    from scipy.optimize import nnls
    packing, moved = best_packing(k, d).points, unit_rows(prototypes(k, d, seed))
    for W in (packing, moved):
        features, _ = largest_sample_margins(W)
        for y, w in enumerate(W):
            cosines = W @ w
            cosines[y] = -2
            pulls = W[cosines > cosines.max() - 1e-9] - cosines.max() * w
            system = np.vstack([pulls.T.numpy(), np.ones(len(pulls))])
            unbalanced = nnls(system, np.append(np.zeros(d), 1.))[1]
            assert ((features[y] - w).norm() < 1e-6) == (unbalanced < 1e-6)


def test_reflecting_a_feature_raises_every_lead_and_symmetrising_loses_nothing():
    generator = torch.Generator().manual_seed(0)
    for d in (2, 3, 5, 9):
        W, Z = unit_rows(torch.randn(400, 6, d, generator=generator, dtype=torch.float64).flatten(0, 1)).view(
            2, 200, 6, d)
        def leads(W, Z): return (W * Z).sum(-1, keepdim=True) - Z @ W.transpose(-1, -2)
        below = (W * Z).sum(-1, keepdim=True).clamp(max=0)
        Z = Z - 2 * below * W
        assert (leads(W, Z) >= leads(W, Z + 2 * below * W) - 1e-12).all()
        U = (W + Z) / (W + Z).norm(dim=-1, keepdim=True)
        both = (leads(W, Z) + leads(W, Z).transpose(-1, -2)) / 2
        assert (1 - U @ U.transpose(-1, -2) - both >= -1e-12).all()
