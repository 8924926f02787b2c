"The ledger: everything is proved, and every check can fail."
import json
import math
import re
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest

from largest_margins.claims import Check, Claim, claims, descend, dot, endpoints, prove, rational_points, register
from largest_margins.ledger import energy, softmax
from largest_margins.ledger import generalization as general
from largest_margins.ledger import gm_softmax as gm

ROWS = {'T4', 'L1', 'BP', 'T2', 'T2b', 'RL', 'P3', 'GB', 'U', 'T5', 'P6', 'T7', 'JE', 'LM', 'T8', 'T5b', 'ME', 'GM',
        'SY', 'GO', 'MC', 'FS', 'AM', 'RC'}
BY_ID = {c.id: c for c in claims()}


def test_every_claim_is_proved_on_a_page():
    "In full: the tests run all notebooks, and a page whose claim fails ends with an error."
    pages = (Path(__file__).parent.parent/'nbs/theory').glob('*.ipynb')
    cells = [''.join(cell['source']) for page in pages
             for cell in json.loads(page.read_text(encoding='utf-8'))['cells']]
    proved = [re.findall(r"'(\w+)'", ids) for cell in cells for ids in re.findall(r'= prove\((\[.+?\])\)', cell)]
    assert {claim for ids in proved for claim in ids} == ROWS
    assert sum('e.passed' in cell for cell in cells) >= len(proved)


def test_evidence():
    evidence = prove(['L1', 'P3'])
    assert [e for e in evidence if not e.passed] == []
    assert len(evidence) == sum(len(BY_ID[claim].checks) for claim in ('L1', 'P3'))
    assert all(e.seconds >= 0 and e.difference == e.value - e.reference for e in evidence)
    assert {e.kind for e in evidence} == {'exact', 'certified', 'optimised', 'boundary'}


def test_the_ledger_is_whole_and_each_claim_has_its_kinds_of_check():
    assert {c.id for c in claims()} == ROWS
    assert [c.id for c in claims()] == sorted(ROWS)
    assert all(c.title and c.printed and c.corrected and c.valid_for for c in claims())
    assert all((c.printed == '(ours)') == (c.verdict == 'ours') for c in claims())
    assert all(c.corrected.startswith('as printed') for c in claims() if c.verdict == 'holds')
    kinds = {c.id: {check.kind for check in c.checks} for c in claims()}
    assert all('exact' in found or c == 'LM' for c, found in kinds.items())
    assert {c for c, found in kinds.items() if 'boundary' not in found} == {'ME', 'T2b', 'T5b'}
    order = ['exact', 'certified', 'optimised', 'boundary']
    for c in claims():
        places = [order.index(check.kind) for check in c.checks]
        assert places == sorted(places)


def test_ids_and_quick():
    assert {e.claim for e in prove(['P3', 'ME'])} == {'P3', 'ME'}
    with pytest.raises(ValueError, match='T9.*L1'): prove(['T9'])
    assert all(any(check.quick for check in c.checks) for c in claims())
    check = BY_ID['ME'].checks[0]
    assert len(evidence_of(replace(check, quick=False), check, quick=True)) == 1


def test_the_theorems_of_the_slides_are_found_by_their_number():
    title = {c.id: c.title for c in claims()}
    for claim, number in dict(L1='Lemma 1', T2='Theorem 2', P3='Proposition 3', T4='Theorem 4', T5='Theorem 5',
                              P6='Proposition 6', T7='Theorem 7', T8='Theorem 8').items():
        assert f"the slides' {number}" in title[claim] and number in str(next(c for c in claims() if c.id == claim))


def evidence_of(*checks, **options):
    "The evidence that some checks give, in the place of those of a claim that is there."
    there = BY_ID['ME']
    register(replace(there, checks=checks))
    try: return prove(['ME'], **options)
    finally: register(there)


def claim(*checks, verdict='holds'):
    return Claim('X', 'two is two', verdict, 'so', 'as printed', 'always', checks)


def test_no_id_for_two_claims_and_no_unknown_verdict():
    with pytest.raises(ValueError, match='L1'): register(replace(claim(), id='L1'))
    with pytest.raises(ValueError, match='verdict'): claim(verdict='perhaps')


def test_an_error_is_a_failure_with_its_message():
    def broken(): raise ArithmeticError('does not add up')
    found, = evidence_of(Check('search', broken, '='))
    assert not found.passed and 'does not add up' in found.error and math.isnan(found.value)


# what a float cannot tell apart, or hold
@pytest.mark.parametrize('value,relation,reference,passed', [
    (Fraction(1, 10**400), '=', 0, False), (Fraction(1, 10**400), '>', 0, True), (Fraction(1, 10**400), '≤', 0, False),
    (-Fraction(1, 10**400), '≥', 0, False), (1 + Fraction(1, 10**30), '=', 1, False), (2**60 + 1, '<', 2**60, False),
    (2**60 + 1, '>', 2**60, True), (10**400, '>', 10**399, True), (-10**400, '>', 10**399, False),
    (Fraction(1, 3), '=', Fraction(2, 6), True)])
@pytest.mark.parametrize('method', ['symbolic identity', 'exact arithmetic', 'interval'])
def test_exact_numbers_are_compared_before_they_are_rounded(method, value, relation, reference, passed):
    found, = evidence_of(Check(method, lambda: (value, reference), relation))
    assert found.passed is passed and not found.error and isinstance(found.value, float)


@pytest.mark.parametrize('method', ['symbolic identity', 'exact arithmetic', 'interval'])
def test_an_exact_check_gives_no_float_and_takes_no_tolerance(method):
    for pair in ((.1, 0), (0, .1), (math.nan, 0), (0, math.inf)):
        found, = evidence_of(Check(method, lambda pair=pair: pair, '≥'))
        assert not found.passed and 'must give fractions' in found.error
    with pytest.raises(ValueError, match='tolerance'): Check(method, dict, '=', 1e-300)


def test_a_check_is_refused_by_a_wrong_method_relation_or_tolerance():
    for method in ('exact', 'optimised', ''):
        with pytest.raises(ValueError, match='method must be .symbolic identity'): Check(method, dict, '=')
    with pytest.raises(ValueError, match='relation must be .='): Check('search', dict, '==')
    for relation in '<>':
        with pytest.raises(ValueError, match='tolerance'): Check('search', dict, relation, 1e-9)
    for method, kind in {'symbolic identity': 'exact', 'exact arithmetic': 'exact', 'interval': 'certified',
                         'certificate': 'certified', 'search': 'optimised', 'counter-example': 'boundary'}.items():
        assert Check(method, dict, '=').kind == kind


def test_the_ends_of_an_interval_are_exact():
    from mpmath import iv
    assert endpoints(iv.mpf([.1, 2])) == (Fraction(.1), 2)
    low, high = endpoints(iv.exp(iv.mpf(-3000)))  # below the least float
    assert 0 < low < high < Fraction(1, 10**400)


def test_a_claim_is_printed_with_its_title_verdict_and_statements():
    text = str(next(c for c in claims() if c.id == 'T2'))
    assert text.startswith("T2: Sample margins and class margins, the slides' Theorem 2 (mended)\n")
    assert 'printed   γ_min is maximal iff' in text and 'true      γ_min is maximal for' in text
    assert 'valid for every d and k' in text
    assert max(map(len, text.splitlines())) < 80
    assert 'printed' not in str(next(c for c in claims() if c.verdict == 'ours'))


# each check with a wrong constant, a flipped sign, or the wrong side of its boundary; never with another relation
WRONG = [  # claim, number of its check, argument
    ('L1', 0, dict(cosine=lambda k: Fraction(-1, k))),
    ('L1', 1, dict(cosine=lambda k: -1 / k)),
    ('L1', 2, dict(cosine=lambda k: 1 / (k - 1), exponents=(1,))),
    ('L1', 3, dict(k=3)),
    ('BP', 0, dict(fewest=3)),
    ('BP', 1, dict(root=lambda t: 1)),
    ('BP', 1, dict(root=lambda t: 2 / t)),
    ('BP', 2, dict(half=1)),
    ('BP', 2, dict(height=Fraction(1, 2))),
    ('P3', 0, dict(total=lambda k, square: k**3 + k * square)),
    ('P3', 0, dict(total=lambda k, square: k**3 - square)),
    ('P3', 1, dict(largest=lambda k: (k + 1) / k)),
    ('P3', 2, dict(k=4)),
    ('T2', 1, dict(square=Fraction(1))),
    ('T2', 0, dict(margin=Fraction(9, 10))),
    ('RL', 0, dict(most=lambda k: Fraction(999 * k**3, 1000 * (k - 1)))),
    ('RL', 1, dict(largest=lambda k: k / (k - 1))),
    ('RL', 2, dict(obtuse=False)),
    ('T2b', 0, dict(factor=lambda S, g: (4 - S) * (2 * g + S))),
    ('T2b', 1, dict(share=Fraction(51, 100))),
    ('T2b', 1, dict(reflect=False)),
    ('T2b', 2, dict(margin=lambda delta: 1 - math.cos(delta) / 2)),
    ('T2b', 3, dict(margin=lambda delta: 1 - math.cos(1.01 * delta))),
    ('T4', 0, dict(sign=1)),
    ('T4', 1, dict(degrees=45.)),
    ('T4', 2, dict(time=20.)),
    ('T4', 3, dict(degrees=70.)),
    ('U', 0, dict(sign=1)),
    ('U', 1, dict(line=lambda m2, theta: m2.cos() * theta.cos() - 1e-3)),
    ('U', 1, dict(line=lambda m2, theta: (theta + m2 + .1).cos())),
    ('T5', 0, dict(slope=lambda a, b, k: 2 * a / k + b)),
    ('T5', 1, dict(constant=-1)),
    ('T5', 2, dict(constant=lambda k: -1 / (k - 1))),
    ('T5', 2, dict(constant=lambda k: 1 / k)),
    ('T5', 3, dict(alpha=.38)),
    ('T5', 4, dict(alpha=.42)),
    ('U', 2, dict(m1=1)),
    ('GM', 0, dict(reached=lambda alpha: 1 + alpha)),
    ('GM', 1, dict(slope=lambda a, b, k: 2 * a / k + b)),
    ('GM', 2, dict(below=-.05)),
    ('GM', 3, dict(curvature=lambda s: s**2)),
    ('GM', 4, dict(alpha=.38)),
    ('SY', 0, dict(trace=lambda k, d: k**2 / (d + 1))),
    ('SY', 1, dict(share=Fraction(11, 10))),
    ('SY', 2, dict(shift=1e-6)),
    ('SY', 3, dict(k=6)),
    ('P6', 0, dict(slope=Fraction(49, 100))),
    ('P6', 1, dict(cosine=lambda k: -1 / k)),
    ('P6', 2, dict(m2=1.)),
    ('ME', 0, dict(smallest=max)),
    ('ME', 0, dict(smallest=lambda margins: sorted(margins)[-2])),
    ('T7', 0, dict(square=lambda k, S: Fraction(k * k - S) / k**2)),
    ('T7', 1, dict(largest=lambda k: (k + 1) / k)),
    ('T7', 2, dict(stacked=7)),
    ('T7', 3, dict(counts=(7, 2, 2))),
    ('LM', 0, dict(scale=5)),
    ('LM', 1, dict(gap=lambda k, s: math.log(k - 1) / (2 * s))),
    ('LM', 2, dict(aggregation='mean', k=7)),
    ('LM', 4, dict(aggregation='logsumexp', scale=400.)),
    ('LM', 4, dict(scale=5.)),
    ('LM', 3, dict(aggregation='mean')),
    ('JE', 0, dict(inside=2)),
    ('JE', 2, dict(scale=.9)),
    ('JE', 1, dict(count=lambda n: 2 * math.log(n))),
    ('T8', 0, dict(sign=1)),
    ('T8', 1, dict(centroid=1.)),
    ('T8', 2, dict(k=3)),
    ('T8', 3, dict(shift=-1.5)),
    ('T8', 4, dict(centroid=100.)),
    ('T8', 5, dict(alpha=0.)),
    ('T5b', 0, dict(weight=lambda n, k, N: Fraction(1, N))),
    ('T5b', 1, dict(reduction='mean')),
    ('T5b', 2, dict(reduction='class-mean')),
    ('GB', 0, dict(power=2)),
    ('GB', 1, dict(exponent=.5)),
    ('GB', 2, dict(spare=.05)),
    ('GB', 3, dict(larger=.5)),
    ('GB', 4, dict(exponent=.25)),
    ('GO', 0, dict(factor=8)),
    ('GO', 1, dict(tilt=.1)),
    ('GO', 2, dict(d=2)),
    ('GO', 3, dict(d=5)),
    ('MC', 0, dict(sign=1)),
    ('MC', 1, dict(factor=.98)),
    ('MC', 2, dict(factor=1.02)),
    ('MC', 3, dict(reduction='mean')),
    ('FS', 0, dict(others=lambda k: k)),
    ('FS', 0, dict(twice=1)),
    ('FS', 1, dict(times=.1)),
    ('FS', 2, dict(aggregation='logsumexp')),
    ('AM', 0, dict(margin=Fraction(2, 5))),
    ('AM', 1, dict(stretch=1.1)),
    ('AM', 2, dict(margin=.6)),
    ('AM', 3, dict(margin=.4)),
    ('RC', 0, dict(square=lambda k, s: s / (k - 1))),
    ('RC', 1, dict(times=2.)),
    ('RC', 2, dict(ratio=1)),
    ('RC', 2, dict(strength=1e5))]


@pytest.mark.parametrize('name,n,wrong', WRONG, ids=lambda x: ' '.join(x) if isinstance(x, dict) else str(x))
def test_a_wrong_claim_fails(name, n, wrong):
    check = BY_ID[name].checks[n]
    spoiled, = evidence_of(replace(check, run=partial(check.run, **wrong)))
    assert not spoiled.passed and (not spoiled.error or spoiled.error.startswith('ArithmeticError'))


def test_every_check_is_broken_above():
    assert {(c.id, n) for c in claims() for n in range(len(c.checks))} == {(name, n) for name, n, _ in WRONG}


# --- the rules ---

def test_a_loss_bounds_the_distance_from_the_simplex():
    import torch

    from largest_margins.codes import simplex
    from largest_margins.losses import ArcFaceLoss, CosFaceLoss, LMSoftmaxLoss, NormFaceLoss
    from largest_margins.margins import class_margin, unit_rows
    kinds = ((NormFaceLoss, {}), (lambda s: CosFaceLoss(s, .35), dict(offset=-.35)),
             (lambda s: ArcFaceLoss(s, .5), dict(slope=math.cos(.5))), (LMSoftmaxLoss, dict(target_in_sum=False)))
    generator = torch.Generator().manual_seed(0)
    for n in range(200):
        k, s = 2 + n % 5, (1., 8., 32.)[n % 3]
        loss, options = kinds[n % 4]
        noise = .3**(n % 7) * torch.randn(4, k, k, generator=generator, dtype=torch.float64)
        W = unit_rows(simplex(k, k) + noise[0])
        Z = torch.cat([unit_rows(W + noise[m]) for m in (1, 2, 3)])[:2 * k + 1]  # uneven: one class has a third
        targets = torch.arange(k).repeat(3)[:2 * k + 1]
        value = loss(s)
        value.reduction = 'class-mean'
        bound = gm.distance_from_simplex(value(Z @ W.T, targets).item(), k, s, **options)
        class_mean = [(W[c] - Z[targets == c]).square().sum(1).mean() for c in range(k)]
        assert W.mean(0).norm() <= bound.centroid + 1e-6
        assert torch.stack(class_mean).mean().sqrt() <= bound.feature + 1e-6
        assert class_margin(W) >= bound.class_margin - 1e-6
    exact = gm.distance_from_simplex(math.log(1 + 9 * math.exp(-16 * 10 / 9)), 10, 16.)
    assert exact[:3] == pytest.approx((0, 0, 0), abs=1e-6) and exact.class_margin == pytest.approx(math.acos(-1 / 9))
    assert gm.distance_from_simplex(800., 10, 16.) == (1, 2, 1, 0)
    for wrong in (dict(k=1), dict(scale=0.), dict(slope=.4), dict(loss=0.), dict(loss=-1., target_in_sum=False),
                  dict(loss=math.nan), dict(loss=math.inf), dict(scale=math.inf), dict(scale=1e-20), dict(k=True),
                  dict(offset=math.nan), dict(slope='1'), dict(k=2.5)):
        with pytest.raises((TypeError, ValueError)):
            gm.distance_from_simplex(**{'loss': 1., 'k': 6, 'scale': 8.} | wrong)


def test_the_largest_angular_margin():
    import torch
    assert math.cos(gm.largest_angular_margin(6)) == pytest.approx(.4)
    assert gm.largest_angular_margin(2) == math.pi / 2 > gm.largest_angular_margin(3) > math.pi / 3
    assert gm.largest_angular_margin(torch.tensor(6)) == gm.largest_angular_margin(6)
    for wrong in (1, 2.5, True, '5'):
        with pytest.raises((TypeError, ValueError)): gm.largest_angular_margin(wrong)


def test_the_least_class_margin_at_a_scale():
    import torch

    from largest_margins.codes import best_packing, simplex
    W = simplex(2, 5)
    assert energy.log_gaussian_energy(3 * W, 7.).item() == pytest.approx(math.log(2) - 14)
    assert energy.least_class_margin(W, 7.) == pytest.approx(math.pi)
    points = best_packing(8, 3).points
    bounds = [energy.least_class_margin(points, s) for s in (1., 10., 100., 1e4, 1e6)]
    assert bounds == sorted(bounds) and bounds[0] == 0
    assert best_packing(8, 3).class_margin - 1e-4 < bounds[-1] <= best_packing(8, 3).class_margin
    for wrong in ((torch.eye(3), 0.), (torch.eye(3), math.inf), (torch.eye(3), '5'), (points[:1], 5.), (0 * points, 5.),
                  (math.nan * points, 5.)):
        with pytest.raises((TypeError, ValueError)): energy.least_class_margin(*wrong)


def test_universally_optimal_codes_have_the_best_class_margin_that_is_proved():
    import torch

    from largest_margins.bounds import class_margin_bound
    from largest_margins.codes import best_packing
    for k, d in ((6, 3), (12, 3), (5, 2), (8, 4), (16, 5), (27, 6)):
        assert energy.universally_optimal(k, d)
        best = best_packing(k, d, seconds=20).class_margin
        assert best == pytest.approx(class_margin_bound(k, d).radians, abs=1e-5)
    assert not any(energy.universally_optimal(k, 3) for k in (5, 7, 8, 9, 24))
    assert energy.universally_optimal(torch.tensor(12), torch.tensor(3))
    for wrong in ((1, 3), (12., 3), (2, True)):
        with pytest.raises((TypeError, ValueError)): energy.universally_optimal(*wrong)


# --- the tools ---

def test_rational_points_are_on_the_sphere_and_depend_on_the_seed():
    for d in (2, 3, 9):
        points = rational_points(20, d, seed=d)
        assert all(len(x) == d and dot(x, x) == 1 for x in points)
        assert points == rational_points(20, d, seed=d) != rational_points(20, d, seed=d + 1)


def test_descend_goes_to_the_minimum_with_any_number_of_parts():
    import torch
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = A + A.T
    value, x = descend(lambda x: (x[0] @ A @ x[0]), torch.ones(1, 6))
    assert value == pytest.approx(torch.linalg.eigvalsh(A)[0].item(), abs=1e-9)
    value, x, y = descend(lambda x, y: (x * y).sum(), torch.ones(2, 3), torch.eye(2, 3))
    assert value == pytest.approx(-2, abs=1e-9) and torch.allclose(x, -y, atol=1e-5)


def test_the_balanced_bound():
    n = [10**8] * 10
    assert 0 < general.balanced_error_bound([1.] * 10, n) < .01
    assert general.balanced_error_bound([1.] * 10, n, below=.5) == pytest.approx(
        .5 + general.balanced_error_bound([1.] * 10, n))
    for wrong in (dict(margins=[1.], class_counts=[1, 2]), dict(margins=[0, 1], class_counts=[1, 1]),
                  dict(margins=[3, 1], class_counts=[1, 1]), dict(margins=[1, 1], class_counts=[0, 1]),
                  dict(margins=[1, 1], class_counts=[1, 1], delta=1.)):
        with pytest.raises(ValueError): general.balanced_error_bound(**wrong)


def test_prototypes_with_a_class_margin():
    from largest_margins.margins import class_margin
    for degrees in (1., 30., 90., 109.):
        W = softmax.prototypes_with_class_margin(4, 3, math.radians(degrees))
        assert class_margin(W).item() == pytest.approx(math.radians(degrees), abs=1e-9)
    with pytest.raises(ValueError, match='109.47'): softmax.prototypes_with_class_margin(4, 3, 2.)
