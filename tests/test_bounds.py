"Bounds are above every code, tight where they should be, and verified; lies are not."
import copy
import json
import math
from dataclasses import astuple, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp

from largest_margins.bounds import Bound, class_margin_bound, min_sample_margin_bound, stored_certificates
from largest_margins.certificates import checksum, cosine_bounds, verify
from largest_margins.codes import simplex
from largest_margins.margins import class_margin

GOLDEN = (1 + math.sqrt(5)) / 4
SHARP = {(12, 3): 1 / math.sqrt(5), (16, 5): 1 / 5, (27, 6): 1 / 4, (56, 7): 1 / 3, (240, 8): 1 / 2,
         (275, 22): 1 / 6, (120, 4): GOLDEN, (196560, 24): 1 / 2}


@pytest.mark.parametrize('size', SHARP)
def test_tight_at_the_sharp_codes(size):
    bound = class_margin_bound(*size)
    excess = math.degrees(bound.radians) - math.degrees(math.acos(SHARP[size]))
    assert -1e-12 < excess < 3e-5 and bound.verify()


@pytest.mark.parametrize('k', [349, 350, 1000, 30_000, 10**6])
def test_many_points_on_the_sphere(k):
    "The formula loses digits to cancellation; the bound is still found, and as good as the formula is."
    bound = class_margin_bound(k, 3)
    with mp.workdps(60):
        cotangent = mp.cot(k * mp.pi / (6 * (k - 2)))
        exact = mp.acos((cotangent**2 - 1) / 2)
        assert 0 <= bound.radians / exact - 1 < 1e-9
    assert bound.method == 'fejes-toth' and bound.verify()


@pytest.mark.parametrize('k,d,degrees,method,attained', [
    (2, 1, 180, 'simplex', True), (2, 7, 180, 'simplex', True), (3, 2, 120, 'circle', True),
    (8, 2, 45, 'circle', True), (4, 3, 109.47122063449069, 'simplex', True),
    (10, 16, 96.37937020844282, 'simplex', True),
    (5, 3, 90, 'rankin', True), (6, 3, 90, 'rankin', True), (20, 10, 90, 'rankin', True)])
def test_closed_forms(k, d, degrees, method, attained):
    bound = class_margin_bound(k, d)
    assert math.degrees(bound.radians) == pytest.approx(degrees, abs=1e-12)
    assert bound.verify() and bound.certificate is None
    named = class_margin_bound(k, d, method)
    assert named.attained is attained and named.radians == pytest.approx(bound.radians, abs=1e-14)


@pytest.mark.parametrize('k', range(3, 15))
def test_which_bounds_of_fejes_toth_are_reached(k):
    "By the triangle, the tetrahedron, the octahedron and the icosahedron, and by nothing else."
    assert class_margin_bound(k, 3, 'fejes-toth').attained is (True if k in (3, 4, 6, 12) else None)


def test_rounded_outwards():
    "The bound as a number is not below the true value, compared in forty digits."
    mp.dps = 40
    for k in range(3, 200):
        assert mp.mpf(class_margin_bound(k, k).radians) >= mp.acos(mp.mpf(-1) / (k - 1))
        assert mp.mpf(class_margin_bound(k, 2).radians) >= 2 * mp.pi / k
        omega = k * mp.pi / (6 * (k - 2))
        assert mp.mpf(class_margin_bound(k, 3, 'fejes-toth').radians) >= mp.acos((mp.cot(omega)**2 - 1) / 2)
        assert mp.mpf(min_sample_margin_bound(k, k)) >= mp.mpf(k) / (k - 1)
    for k, d in ((12, 3), (30, 5), (240, 8)):
        assert mp.mpf(min_sample_margin_bound(k, d)) >= 1 - mp.cos(mp.mpf(class_margin_bound(k, d).radians))
    assert min_sample_margin_bound(10, 16) == pytest.approx(10 / 9, abs=1e-15)


def test_rounded_up_only_where_the_float_is_below():
    "k/(k − 1) for the simplex, 1 up to 2d and from d + 2: the float above or equal that is nearest."
    for k in range(2, 200):
        value, exact = min_sample_margin_bound(k, k), Fraction(k, k - 1)
        assert Fraction(value) >= exact > Fraction(math.nextafter(value, 0))
    for d in (3, 4, 10, 100): assert [min_sample_margin_bound(k, d) for k in (2, d + 2, 2 * d)] == [2, 1, 1]


@pytest.mark.parametrize('k', [3, 4, 100])
def test_on_a_line_two_of_three_coincide(k):
    bound = class_margin_bound(k, 1)
    assert bound == class_margin_bound(k, 1, 'line') and bound.verify() and bound.attained
    assert bound.radians == 0 == min_sample_margin_bound(k, 1)
    assert class_margin_bound(2, 1).radians >= math.pi
    with pytest.raises(ValueError, match='says nothing'): class_margin_bound(2, 1, 'line')


@pytest.mark.parametrize('k,d', [(7, 3), (10**3, 4), (10**5, 4), (10**9, 4), (10**5, 5), (10**7, 8), (10**12, 50)])
def test_caps_against_forty_digits(k, d):
    "The share of the sphere in a cap of half the angle is at least 1/k, and hardly more."
    bound = class_margin_bound(k, d, 'caps')
    assert bound.verify() and not Bound(k, d, bound.radians * (1 - 1e-9), 'caps').verify()
    with mp.workdps(40):
        half = mp.mpf(bound.radians) / 2
        share = mp.betainc(mp.mpf(d - 1) / 2, mp.mpf('.5'), 0, mp.sin(half)**2, regularized=True) / 2
        assert 0 <= share * k - 1 < 1e-8


def test_many_points_are_no_further_apart_than_fewer():
    assert math.degrees(class_margin_bound(10**4, 4).radians) < 8.93
    assert math.degrees(class_margin_bound(10**5, 4).radians) < 4.15


@pytest.mark.parametrize('d,ks', [(1, range(2, 60)), (2, range(2, 60)), (3, [*range(2, 15), 23, 24, 25, 200, 10**6]),
                                  (4, [*range(2, 11), 24, 25, 26, 1632, 3311, 3312, 10**9]),
                                  (5, [9, 10, 11, 12, 32, 33, 34]), (8, [16, 17, 18, 32, 33, 240, 241]),
                                  (24, [47, 48, 49, 50, 1000, 10**18]), (64, [10**6, 10**18]),
                                  (512, [10**5, 10**9, 10**12]), (4096, [10**8, 10**18])])
def test_never_rises_with_the_number_of_points(d, ks):
    angles = [class_margin_bound(k, d).radians for k in ks]
    assert all(a >= b for a, b in zip(angles, angles[1:]))
    if d > 1 and ks[-1] > d + 1: assert min_sample_margin_bound(ks[-1], d) <= 1


@pytest.mark.parametrize('d', [64, 512, 1000])
def test_a_billion_points_have_a_bound_below_90_degrees(d):
    "Which takes a certificate for slightly fewer points, since exact arithmetic needs some room."
    bound = class_margin_bound(10**9, d)
    assert math.degrees(bound.radians) < {64: 65.66, 512: 84.42, 1000: 86.68}[d] and bound.verify()


def test_no_dimension_keeps_the_check_of_a_formula_busy():
    assert not Bound(10, 10**9, 1.5, 'caps').verify()



def test_never_falls_with_the_dimension():
    for k in (5, 8, 13, 25):
        angles = [class_margin_bound(k, d).radians for d in range(1, 9)]
        assert all(a <= b + 1e-9 for a, b in zip(angles, angles[1:])), k


@pytest.mark.parametrize('k,d', [(26, 4), (9, 4), (33, 3), (33, 5), (40, 6), (17, 8)])
def test_auto_is_no_larger_than_any_method(k, d):
    methods = ['simplex', 'rankin', 'caps', 'levenshtein', 'delsarte', *['fejes-toth'] * (d == 3)]
    bound = class_margin_bound(k, d)
    assert bound.verify() and bound.radians <= min(class_margin_bound(k, d, m).radians for m in methods)


def test_a_stored_certificate_serves_more_points_and_fewer_dimensions():
    stored = class_margin_bound(8, 3, 'three-point')
    assert stored == class_margin_bound(8, 3) and math.degrees(stored.radians) < 74.9
    for size in ((8, 3), (9, 3), (8, 2)): assert Bound(*size, stored.radians, *astuple(stored)[3:]).verify()
    for size in ((7, 3), (8, 4)): assert not Bound(*size, stored.radians, *astuple(stored)[3:]).verify()


def test_numbers_of_other_libraries_are_welcome():
    assert class_margin_bound(np.int64(8), np.int32(3)) == class_margin_bound(8, 3)
    assert type(class_margin_bound(np.int64(11), 4).k) is int
    assert class_margin_bound(torch.tensor(8), np.array(3)) == class_margin_bound(8, 3)
    assert min_sample_margin_bound(torch.tensor(8), torch.tensor(3)) == min_sample_margin_bound(8, 3)
    for wrong in (True, np.True_, np.float64(8), 3.5, '8', None, torch.tensor(8.), torch.tensor([8])):
        with pytest.raises(TypeError, match='k must be'): class_margin_bound(wrong, 3)
    for far in (10**19, 10**400, -10**400):
        with pytest.raises(ValueError, match='k must be'): class_margin_bound(far, 3)
    with pytest.raises(TypeError, match='method must be'): class_margin_bound(8, 3, [])


# Sloane's and proven values, degrees
REACHED = {(7, 3): 77.8695421, (8, 3): 74.8584922, (9, 3): 70.5287794, (10, 3): 66.1468220, (13, 3): 57.1367031,
           (14, 3): 55.6705700, (24, 3): 43.6907671, (32, 3): 37.4752140, (10, 4): 80.4059318, (24, 4): 60.,
           (1000, 128): 85.86}


@pytest.mark.parametrize('size', REACHED)
@pytest.mark.parametrize('method', ['auto', 'levenshtein', 'delsarte', 'fejes-toth'])
def test_never_below_what_is_reached(size, method):
    k, d = size
    if method == 'fejes-toth' and d != 3: method = 'rankin'
    assert math.degrees(class_margin_bound(k, d, method).radians) >= REACHED[size] - 1e-7


def test_auto_is_the_smallest():
    for k, d in ((8, 3), (24, 4), (40, 6)):
        every = [class_margin_bound(k, d, m).radians for m in ('simplex', 'rankin', 'levenshtein', 'delsarte')]
        assert class_margin_bound(k, d).radians <= min(every)
    assert math.degrees(class_margin_bound(24, 4, 'delsarte').radians) == pytest.approx(61.4096, abs=1e-4)
    assert math.degrees(class_margin_bound(8, 3, 'delsarte').radians) < 76.17


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 14), st.integers(2, 6), st.integers(0, 10**6))
def test_no_code_exceeds_it(k, d, seed):
    points = torch.randn(k, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert class_margin(points) <= class_margin_bound(k, d).radians


def test_the_simplex_does_not_exceed_it():
    for k in range(2, 60): assert class_margin(simplex(k, k)) <= class_margin_bound(k, k).radians + 1e-14


@pytest.mark.parametrize('args,message', [((1, 3), 'k must be'), ((3, 0), 'd must be'),
                                          ((8, 3, 'guess'), 'method must be'), ((3, 5, 'circle'), 'says nothing'),
                                          ((4, 5, 'rankin'), 'says nothing')])
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=message): class_margin_bound(*args)


# Lies

@pytest.fixture(scope='module')
def certificate():
    return class_margin_bound(8, 3, 'delsarte').certificate


def signed(certificate, **changes):
    "A changed certificate whose checksum fits: only the mathematics can refuse it."
    lie = {**copy.deepcopy(certificate), **changes}
    return {**lie, 'sha256': checksum(lie)}


def test_verified_also_as_text(certificate):
    assert verify(certificate) and verify(json.dumps(certificate))


def test_a_tampered_certificate_is_refused_by_the_mathematics(certificate):
    c = certificate['coefficients']
    lower = str(Fraction(certificate['cosine']) - Fraction(1, 1000))
    higher = str(Fraction(certificate['cosine']) + Fraction(1, 1000))
    lies = dict(
        negative=signed(certificate, coefficients=[*c, '-1/1000000000']),
        negative_inside=signed(certificate, coefficients=[c[0], f'-{c[1]}', *c[2:]]),
        cosine_too_large=signed(certificate, cosine=higher), cosine_too_small=signed(certificate, cosine=lower),
        angle_too_small=signed(certificate, radians=str(Fraction(certificate['radians']) - Fraction(1, 10**6))),
        other_d=signed(certificate, d=4), other_k=signed(certificate, k=9), smaller_k=signed(certificate, k=7),
        zero=signed(certificate, coefficients=['0', *c[1:]]), no_degree=signed(certificate, coefficients=c[:1]),
        missing_term=signed(certificate, coefficients=c[:-1]),
        angle_of_another_turn=signed(certificate, radians=str(Fraction(certificate['radians']) + 7)))
    assert {name: verify(lie) for name, lie in lies.items()} == dict.fromkeys(lies, False)


def test_malformed_certificates_are_refused(certificate, ends):
    c = certificate['coefficients']
    without = {k: v for k, v in certificate.items() if k != 'd'}
    digits = Fraction(c[3])
    ninth = str(digits + Fraction(1, 10**9))
    lies = dict(
        ninth_digit={**certificate, 'coefficients': [*c[:3], ninth, *c[4:]]},
        missing_key=without, extra_key=signed(certificate, note='x'), floats=signed(certificate, cosine=.3),
        float_coefficient=signed(certificate, coefficients=[1.0, *c[1:]]), text_k=signed(certificate, k='8'),
        true_k=signed(certificate, k=True), decimals=signed(certificate, cosine='0.3'),
        huge_degree=signed(certificate, coefficients=['1'] * 100_000),
        huge_number=signed(certificate, cosine='9' * 10**6), huge_k=signed(certificate, k=10**30),
        division_by_zero=signed(certificate, radians='1/0'), kind=signed(certificate, kind='other'),
        a_list=[certificate], nothing=None, not_json='{"k": 8', json_null='null', number=3)
    assert {name: verify(lie) for name, lie in lies.items()} == dict.fromkeys(lies, False)


def test_a_bound_cannot_borrow_a_certificate(certificate):
    bound = class_margin_bound(8, 3, 'delsarte')
    assert bound.verify()
    assert not Bound(7, 3, bound.radians, 'delsarte', None, certificate).verify()
    assert not Bound(8, 3, bound.radians - 1e-3, 'delsarte', None, certificate).verify()
    assert not Bound(8, 3, 1.5, 'rankin').verify() and not Bound(4, 3, math.pi / 2, 'rankin').verify()
    assert not Bound(8, 3, 1.3, 'fejes-toth').verify() and not Bound(8, 2, .78, 'circle').verify()
    assert not Bound(8, 3, bound.radians, 'rankin', None, certificate).verify()
    assert not Bound(8, 3, bound.radians, 'three-point', None, certificate).verify()
    assert not Bound(8, 3, bound.radians, 'delsarte', True, certificate).verify()  # nobody showed that
    code = next(c for c in stored_certificates() if (c['kind'], c['k'], c['d']) == ('code', 8, 3))
    for method in ('delsarte', 'three-point', 'code'):  # which says that they can be so far apart
        assert not Bound(8, 3, float(Fraction(code['radians'])), method, None, code).verify()


MALFORMED = [
    dict(), dict(method='delsarte'), dict(method='levenshtein'), dict(method='three-point'), dict(method='auto'),
    dict(method='nonsense'), dict(method=None), dict(method=[]), dict(k='8'), dict(k=None), dict(k=8.), dict(k=True),
    dict(k=1), dict(k=0), dict(k=-8), dict(d=0), dict(d=-3), dict(d='3'), dict(radians=math.nan),
    dict(radians=math.inf), dict(radians=-1.), dict(radians='1.2'), dict(radians=None), dict(radians=1j),
    dict(attained=True), dict(attained=3),
    dict(certificate={}), dict(certificate=[]), dict(certificate='x'), dict(certificate={'kind': 'delsarte'}),
    dict(method='delsarte', certificate={}), dict(method='delsarte', certificate={'kind': 'delsarte', 'radians': '1'}),
    dict(method='delsarte', certificate='{}'), dict(method='delsarte', certificate=7)]


@pytest.mark.parametrize('changes', MALFORMED, ids=repr)
def test_a_malformed_bound_is_not_proved(changes):
    assert Bound(**{**dict(k=8, d=3, radians=1.2, method='rankin'), **changes}).verify() is False


@pytest.mark.parametrize('method,k,d', [('simplex', 4, 3), ('rankin', 5, 3), ('fejes-toth', 12, 3), ('circle', 5, 2),
                                        ('line', 3, 1), ('caps', 9, 3), ('delsarte', 9, 3), ('three-point', 9, 3)])
def test_every_field_of_a_bound_counts(method, k, d):
    bound = class_margin_bound(k, d, method)
    assert bound.verify() is True
    less = bound.radians - 1e-3
    changes = (dict(radians=less), dict(method='guess'), dict(k=None), dict(d=None), dict(attained='yes'),
               dict(certificate=[1]))
    lies = [replace(bound, **change) for change in changes]
    if bound.attained is None: lies.append(replace(bound, attained=True))
    if bound.certificate: lies += [replace(bound, certificate=None), replace(bound, k=k - 1), replace(bound, d=d + 1)]
    assert not any(lie.verify() for lie in lies)


@given(st.fractions(0, Fraction(22, 7), max_denominator=10**6))
def test_cosine_bounds(angle):
    mp.dps = 50
    low, high = cosine_bounds(angle)
    exact = mp.cos(mp.mpf(angle.numerator) / angle.denominator)
    assert mp.mpf(low.numerator) / low.denominator <= exact + mp.mpf(10)**-45
    assert mp.mpf(high.numerator) / high.denominator >= exact - mp.mpf(10)**-45
    assert high - low < Fraction(1, 2**70)
    with pytest.raises(ValueError, match='angle'): cosine_bounds(Fraction(4))
