"The ledger: everything passes, and every check can fail."
import math
from fractions import Fraction

import pytest

from largest_margins import claims as ledger
from largest_margins import softmax_claims as softmax
from largest_margins.claims import Check, Claim, claims, prove, register


def test_all_claims_hold():
    evidence = prove()
    assert [e for e in evidence if not e.passed] == []
    assert len(evidence) == sum(len(c.checks) for c in claims())
    assert all(e.seconds >= 0 and e.difference == e.value - e.reference for e in evidence)
    assert {e.kind for e in evidence} == {'exact', 'certified', 'optimised', 'boundary'}


def test_ids_and_quick():
    assert {e.claim for e in prove(['P3', 'ME'])} == {'P3', 'ME'}
    assert len({c.id for c in claims()}) == len(claims()) >= 8
    with pytest.raises(ValueError, match='T9.*L1'): prove(['T9'])
    assert all(c.printed and c.corrected and c.valid_for and c.checks for c in claims())


def test_no_id_for_two_claims():
    with pytest.raises(ValueError, match='L1'): register(Claim('L1', 'else', '', '', ()))


def test_an_error_is_a_failure_with_its_message():
    def broken(): raise ArithmeticError('does not add up')
    found = ledger._run(Claim('X', '', '', '', ()), Check('exact', broken, '='))
    assert not found.passed and 'does not add up' in found.error and math.isnan(found.value)


def check_of(claim, run):
    "The check of the ledger that runs this function."
    return next(c for c in next(c for c in claims() if c.id == claim).checks if c.run is run)


# each check with a wrong constant, a flipped sign, or the wrong side of its boundary
WRONG = [
    ('L1', ledger.l1_exact, dict(cosine=lambda k: Fraction(-1, k))),
    ('L1', ledger.l1_certified, dict(cosine=lambda k: -1 / k)),
    ('L1', ledger.l1_optimised, dict(cosine=lambda k: 1 / (k - 1), exponents=(1,))),
    ('P3', ledger.p3_exact, dict(total=lambda k, square: k**3 + k * square)),
    ('P3', ledger.p3_exact, dict(total=lambda k, square: k**3 - square)),
    ('P3', ledger.p3_optimised, dict(largest=lambda k: (k + 1) / k)),
    ('T2', ledger.t2_boundary, dict(square=Fraction(1))),
    ('T2', ledger.t2_features_equal_prototypes, dict(margin=Fraction(9, 10))),
    ('U', softmax.u_optimised, dict(curve=lambda loss, theta: theta.cos() + .1)),
    ('U', softmax.u_optimised, dict(curve=lambda loss, theta: (loss.m1 * theta).cos())),
    ('T5', softmax.t5_reached, dict(constant=lambda k: -1 / (k - 1))),
    ('T5', softmax.t5_reached, dict(constant=lambda k: 1 / k)),
    ('T5', softmax.t5_optimised, dict(alpha=.38)),
    ('T5', softmax.t5_boundary, dict(alpha=.42)),
    ('LM', softmax.lm_sandwich, dict(gap=lambda k, s: math.log(k - 1) / (2 * s))),
    ('LM', softmax.lm_boundary, dict(aggregation='logsumexp', scale=400.)),
    ('LM', softmax.lm_boundary, dict(scale=5.)),
    ('LM', softmax.lm_repair, dict(aggregation='mean')),
    ('JE', softmax.je_optimised, dict(count=lambda n: 2 * math.log(n)))]


@pytest.mark.parametrize('claim,run,wrong', WRONG, ids=lambda x: getattr(x, '__name__', None))
def test_a_wrong_claim_fails(claim, run, wrong):
    check = check_of(claim, run)
    assert check.holds(*map(float, run()))
    assert not check.holds(*map(float, run(**wrong)))


def test_me_and_the_printed_je_fail_the_other_way_round():
    assert not Check('exact', ledger.me_exact, '≤').holds(*ledger.me_exact())
    assert not Check('boundary', softmax.je_boundary, '≥').holds(*softmax.je_boundary())
    assert not Check('boundary', softmax.u_boundary, '≤').holds(*softmax.u_boundary())


def test_every_check_is_broken_above():
    broken = {run for _, run, _ in WRONG} | {ledger.me_exact, softmax.je_boundary, softmax.u_boundary}
    assert {check.run for claim in claims() for check in claim.checks} == broken
