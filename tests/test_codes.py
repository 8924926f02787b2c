"The simplex and Riesz energy against loops and closed forms."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from largest_margins import codes
from largest_margins.codes import log_riesz_energy, riesz_energy, simplex
from largest_margins.margins import class_margin


@pytest.mark.parametrize('k,d', [(2, 1), (2, 5), (3, 2), (4, 3), (10, 9), (10, 64), (500, 499), (1000, 1024)])
def test_simplex_to_rounding(k, d):
    W = simplex(k, d)
    assert W.shape == (k, d) and W.dtype == torch.float64
    wanted = torch.full((k, k), -1 / (k - 1), dtype=torch.float64).fill_diagonal_(1)
    assert (W @ W.T - wanted).abs().max() < 3e-15
    assert W.sum(0).abs().max() < 1e-13
    assert class_margin(W).item() == pytest.approx(math.acos(-1 / (k - 1)), abs=1e-13)


@pytest.mark.parametrize('k,d,message', [(5, 3, 'd \\+ 1 = 4'), (1, 3, 'k must be'), (2, 0, 'd must be'),
                                         (2.5, 3, 'k must be'), (3, '3', 'd must be'), (True, 3, 'k must be')])
def test_simplex_refuses(k, d, message):
    with pytest.raises((TypeError, ValueError), match=message): simplex(k, d)


def test_sizes_may_be_those_of_other_libraries():
    assert torch.equal(simplex(torch.tensor(4), np.int64(3)), simplex(4, 3))


def by_loops(points, t):
    rows = points.tolist()
    return sum(math.dist(a, b)**-t for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j)


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(2, 5), st.floats(.3, 12), st.integers(0, 10**6))
def test_energy_against_loops(k, d, t, seed):
    points = F.normalize(torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    expected = by_loops(points, t)
    assert riesz_energy(points, t).item() == pytest.approx(expected, rel=1e-9)
    assert log_riesz_energy(points, t).item() == pytest.approx(math.log(expected), rel=1e-9, abs=1e-9)


def test_energy_does_not_overflow_and_has_its_root_limit():
    W = simplex(5, 6)
    log = log_riesz_energy(W, 1e6).item()
    assert math.isfinite(log)
    assert math.exp(-log / 1e6) == pytest.approx(math.dist(*W[:2].tolist()), rel=1e-4)
    assert riesz_energy(torch.cat([W, W[:1]]), 2.) == math.inf


def test_energy_in_blocks_is_the_same_with_its_gradient(monkeypatch):
    points = F.normalize(torch.randn(3000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    whole = points.clone().requires_grad_()
    distances = torch.cdist(whole, whole, compute_mode='donot_use_mm_for_euclid_dist')
    distances = distances + torch.diag(torch.full((3000,), math.inf, dtype=torch.float64))
    (-3 * distances.log()).flatten().logsumexp(0).backward()
    blocks = points.clone().requires_grad_()
    value = codes.log_riesz_energy(blocks, 3.)
    value.backward()
    assert torch.allclose(blocks.grad, whole.grad.nan_to_num(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize('points,t,message', [(simplex(3, 2), 0, 't must be'), (simplex(3, 2), -1, 't must be'),
                                              (torch.ones(3), 1, 'points'), (torch.ones(1, 3), 1, 'points'),
                                              (simplex(3, 2), math.inf, 't must'), (simplex(3, 2), '2', 't must'),
                                              (simplex(3, 2) * math.nan, 1, 'points'), ([[1.], [2.]], 1, 'points'),
                                              (torch.eye(3).long(), 1, 'points')])
def test_energy_refuses(points, t, message):
    with pytest.raises((TypeError, ValueError), match=message): riesz_energy(points, t)
