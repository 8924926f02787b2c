"What is proved is accepted, what is not is refused, and no input keeps the verifier busy."
import copy
import json
import math
import random
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from largest_margins.bounds import class_margin_bound, code_certificate, stored_certificates
from largest_margins.certificates import checksum, verify
from largest_margins.codes import sample_margin_certificate, simplex
from largest_margins.margins import class_margin

STORED = {(c['kind'], c['k'], c['d']): c for c in stored_certificates()}
EXAMPLES = {
    'delsarte': class_margin_bound(13, 3, 'delsarte').certificate, 'three-point': STORED['three-point', 8, 3],
    'code': STORED['code', 8, 3], 'hull': sample_margin_certificate(simplex(4, 3), 1)}


def signed(certificate, **changes):
    "A changed certificate whose checksum fits: only the mathematics can refuse it."
    lie = {**copy.deepcopy(certificate), **changes}
    return {**lie, 'sha256': checksum(lie)}


def shifted(text, by):
    return str(Fraction(text) + Fraction(by))


# --- what comes with the package ---

def test_all_stored_certificates_are_proved():
    assert not [key for key, certificate in STORED.items() if not verify(certificate)]
    assert len(STORED) == len(stored_certificates())


def test_both_sides_of_every_stored_size_agree():
    "No code is further apart than a bound for as many points or fewer, in its dimension or a higher one."
    codes, bounds = ([c for c in STORED.values() if c['kind'] == kind] for kind in ('code', 'three-point'))
    for code in codes:
        for bound in bounds:
            if bound['k'] <= code['k'] and bound['d'] >= code['d']:
                assert Fraction(code['radians']) < Fraction(bound['radians'])


# what has to be proved at least, degrees from below and from above
SHARP = {(7, 3): (77.8695, 78.3), (8, 3): (74.8584, 74.9), (9, 3): (70.5287, 70.8), (10, 3): (66.1468, 67.),
         (11, 3): (63.4349, 64.7), (13, 3): (57.1367, 59.), (14, 3): (55.6705, 57.2), (10, 4): (80.4059, 80.43),
         (24, 4): (59.9999, 60.6), (25, 4): (57.4988, 60.2)}


@pytest.mark.parametrize('k,d', SHARP)
def test_the_known_sizes_are_enclosed(k, d):
    low, high = SHARP[k, d]
    bound = class_margin_bound(k, d)
    assert bound.method == 'three-point' and bound.verify()
    assert low <= math.degrees(Fraction(STORED['code', k, d]['radians'])) < math.degrees(bound.radians) <= high


# --- lies ---

@pytest.mark.parametrize('kind', EXAMPLES)
def test_what_is_true_is_accepted_as_dict_and_as_text(kind):
    assert verify(EXAMPLES[kind]) and verify(json.dumps(EXAMPLES[kind]))


def leaves(value, path=()):
    "Where numbers and strings stand in a certificate."
    if not isinstance(value, (dict, list)): return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]


def replaced(certificate, path, new):
    copied = copy.deepcopy(certificate)
    place = copied
    for key in path[:-1]: place = place[key]
    place[path[-1]] = new(place[path[-1]])
    return copied


def another(value):
    "A value that differs as little as possible."
    if isinstance(value, int): return value + 1
    return shifted(value, Fraction(1, 10**9)) if value.lstrip('-')[0].isdigit() and len(value) < 64 else value[::-1]


@pytest.mark.parametrize('kind', EXAMPLES)
def test_no_change_anywhere_keeps_the_checksum(kind):
    certificate = EXAMPLES[kind]
    for path in leaves(certificate): assert not verify(replaced(certificate, path, another)), path


WRONG = [None, True, False, 1.5, float('nan'), float('inf'), '', 'x', '0.5', '1/0', ' 1', '１', '1e3', '+1', '--1', [],
         {}, [[]], 10**50, -1, '9' * 500, '1/' + '9' * 401]


@pytest.mark.parametrize('kind', EXAMPLES)
@pytest.mark.parametrize('wrong', WRONG, ids=repr)
def test_a_wrong_type_anywhere_is_refused(kind, wrong):
    certificate = EXAMPLES[kind]
    paths = [(key,) for key in certificate] + leaves(certificate)[::7]
    for path in paths:
        lie = replaced(certificate, path, lambda _: wrong)
        if path != ('sha256',): lie = signed(lie)
        if kind == 'hull' and path[0] == 'lower' and wrong == -1: continue
        assert not verify(lie), path
        assert not verify(json.dumps(lie)), path


@pytest.mark.parametrize('kind', EXAMPLES)
def test_keys_are_those_of_the_kind(kind):
    certificate = EXAMPLES[kind]
    for key in certificate:
        lie = {name: value for name, value in certificate.items() if name != key}
        assert not verify(lie if key == 'sha256' else signed(lie))
        text = json.dumps(certificate)
        assert not verify('{' + json.dumps({key: certificate[key]})[1:-1] + ', ' + text[1:]), f'{key} stands twice'
    for extra in ({'note': ''}, {'proof': 1}): assert not verify(signed(certificate, **extra))
    for other in EXAMPLES:
        if other != kind: assert not verify(signed(certificate, kind=other))


def test_three_points_prove_no_more_than_they_prove():
    true = EXAMPLES['three-point']
    c, pairs, q, F = (true[key] for key in ('coefficients', 'pairs', 'multiplier', 'matrices'))
    lower, less = shifted(true['cosine'], '1/1000'), shifted(true['radians'], '-1/1000')
    negative = [[[-x for x in row] for row in matrix] for matrix in F]
    indefinite = copy.deepcopy(F)
    indefinite[1][2][1] += 10**13
    lies = dict(
        angle=signed(true, radians=less), angle_and_cosine=signed(true, radians=less, cosine=lower),
        cosine=signed(true, cosine=lower), other_d=signed(true, d=4), plane=signed(true, d=2), fewer=signed(true, k=7),
        more=signed(true, k=9), negative_matrices=signed(true, matrices=negative),
        indefinite=signed(true, matrices=indefinite), no_matrices=signed(true, matrices=[]),
        fewer_matrices=signed(true, matrices=F[:-1]), longer=signed(true, matrices=[*F, [[1]]]),
        transposed=signed(true, matrices=[[row[::-1] for row in matrix] for matrix in F]),
        no_coefficient=signed(true, coefficients=[]), zero=signed(true, coefficients=[0, *c[1:]]),
        negative=signed(true, coefficients=[c[0], -1, *c[2:]]), half=signed(true, coefficients=[c[0] // 2, *c[1:]]),
        no_pairs=signed(true, pairs=[]), pairs=signed(true, pairs=[[-1], *pairs[1:]]),
        skew=signed(true, pairs=[pairs[0], [10**12, pairs[1][1]]]), negative_q=signed(true, multiplier=[-1, *q[1:]]),
        short_q=signed(true, multiplier=q[:-1]), no_q=signed(true, multiplier=[0] * len(q)),
        huge_q=signed(true, multiplier=[10**40] * len(q)))
    assert {name: verify(lie) for name, lie in lies.items()} == dict.fromkeys(lies, False)


def test_points_that_are_not_there():
    true = EXAMPLES['code']
    points = true['points']
    lies = dict(
        angle=signed(true, radians=shifted(true['radians'], '1/100000000')), nine=signed(true, k=9),
        nine_with_twins=signed(true, k=9, points=[*points, points[0]]), seven=signed(true, k=7), flat=signed(true, d=2),
        zero=signed(true, points=[[0, 0, 0], *points[1:]]), empty=signed(true, points=[]),
        ragged=signed(true, points=[points[0][:2], *points[1:]]), opposite=signed(true, points=[points[0]] * 8),
        text=signed(true, points='12345678'), long=signed(true, radians='4'), negative=signed(true, radians='-1'))
    assert {name: verify(lie) for name, lie in lies.items()} == dict.fromkeys(lies, False)
    assert verify(signed(true, points=points[::-1])) and verify(signed(true, radians='0'))
    assert verify(signed(true, points=[[7 * x for x in row] for row in points]))  # only directions count
    assert verify(signed(true, k=7, points=points[:7]))


def true_statement(certificate):
    "What an accepted certificate says is not refuted by what we know otherwise."
    k, d, radians = certificate['k'], certificate['d'], Fraction(certificate['radians'])
    if certificate['kind'] == 'code': return radians <= Fraction(class_margin_bound(k, d).radians)
    codes = [Fraction(c['radians']) for c in STORED.values() if c['kind'] == 'code' and c['k'] >= k and c['d'] <= d]
    return radians >= max(codes, default=Fraction(0))


@pytest.mark.parametrize('kind', ['delsarte', 'three-point', 'code'])
def test_random_changes_prove_nothing_false(kind):
    "Thousands of forgeries with a fitting checksum: whatever is accepted is true, and means the same as text."
    dice, paths = random.Random(0), leaves(EXAMPLES[kind])
    numbers = [path for path in paths if path[0] not in ('kind', 'sha256')]
    accepted = 0
    for _ in range(80 if kind == 'three-point' else 800):
        lie = copy.deepcopy(EXAMPLES[kind])
        for path in dice.sample(numbers, dice.choice([1, 1, 2, 5])):
            factor = dice.choice([-1, 0, 1, 1, 1, 2]) + dice.choice([0, 1, -1]) * Fraction(1, 10**dice.randint(1, 12))

            def new(value, factor=factor):
                return int(value * factor) if isinstance(value, int) else str(Fraction(value) * factor)
            lie = replaced(lie, path, new)
        lie = signed(lie)
        if verify(lie):
            accepted += 1
            assert true_statement(lie), lie
            assert verify(json.dumps(lie))
    assert accepted  # small changes of a proof with room are proofs, too


# --- input that would keep it busy ---

PRIMES = [n for n in range(10**4, 3 * 10**4) if all(n % p for p in range(2, 174))]


def hull(k, d, entry, weight='1/2'):
    points = [[entry(i, j) for j in range(d)] for i in range(k)]
    return signed(dict(kind='hull', points=points, target=0, weights=['0', weight, weight, *['0'] * (k - 3)],
                       direction=['1'] * d, lower='0', upper='9' * 399))


def code(k, d, radians, entry):
    points = [[entry(i, j) for j in range(d)] for i in range(k)]
    return signed(dict(kind='code', k=k, d=d, radians=radians, points=points))


def long_polynomial(degree):
    "A Delsarte certificate in numbers as long as allowed."
    c = ['9' * 399] + ['1/' + '9' * 399] * degree
    return signed(dict(kind='delsarte', k=2, d=10**9, cosine='9' * 39 + '/1' + '0' * 39, radians='1', coefficients=c))


BUSY = {
    'hull, 1.7 MB, no common denominator': lambda: hull(3, 60_000, lambda i, j: f'1/{PRIMES[(i + j) % len(PRIMES)]}'),
    'hull, as many numbers as allowed': lambda: hull(3, 66_000, lambda i, j: str(i + j)),
    'hull, as many digits as allowed': lambda: hull(3, 8_000, lambda i, j: f'{"7" * 399}/{"3" * 12}'),
    'hull, too many numbers': lambda: hull(3, 200_000, lambda i, j: '1'),
    'hull, weights without common denominator': lambda: signed(
        hull(3, 2, lambda i, j: '1'), weights=[f'1/{p}' for p in PRIMES[:1000]], points=[['1', '1']] * 1000),
    'delsarte, 64 long coefficients': lambda: long_polynomial(64),
    'delsarte, zeros at the end': lambda: signed(EXAMPLES['delsarte'], coefficients=[
        *EXAMPLES['delsarte']['coefficients'], *['0'] * 30, '1/' + '9' * 399]),
    'delsarte, a cosine that touches': lambda: signed(EXAMPLES['delsarte'], cosine=shifted(
        EXAMPLES['delsarte']['cosine'], '1/' + '1' + '0' * 8)),
    'three-point, a cosine a little larger': lambda: signed(STORED['three-point', 9, 3], cosine=shifted(
        STORED['three-point', 9, 3]['cosine'], '1/100000')),
    'three-point, long numbers': lambda: signed(dict(
        kind='three-point', k=2, d=10**9, cosine='9' * 39 + '/1' + '0' * 39, radians='1',
        coefficients=[10**40, *[10**38] * 20], pairs=[[10**30], [0, 10**30]],
        matrices=[[[0] * i + [10**37] for i in range(11 - n)] for n in range(11)], multiplier=[10**40] * 165)),
    'code, many points': lambda: code(1490, 1, '0', lambda i, j: 10**40 - i),
    'code, points of many coordinates': lambda: code(300, 200, '0', lambda i, j: 10**40 - i * j),
    'code, long numbers': lambda: code(840, 20, '1/1' + '0' * 38, lambda i, j: 10**40 - (i - j)**2),
    'code, too many points': lambda: code(4000, 3, '0', lambda i, j: 1),
    'a deep list': lambda: '[' * 100_000,
    'a long text': lambda: '{"kind": "delsarte", "k": ' + '9' * 10**7 + '}',
    'a long number': lambda: '{"kind": "delsarte", "k": ' + '9' * 10**6 + '}'}


@pytest.mark.parametrize('name', BUSY)
def test_every_input_is_answered(name, ends):
    assert verify(BUSY[name]()) in (True, False)


def test_the_kernel_needs_only_the_standard_library():
    code = '''import sys, largest_margins.certificates as c
print(sorted({'numpy', 'scipy', 'torch', 'clarabel', 'flint', 'sympy'} & set(sys.modules)), c.verify('{}'))'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '[] False', done.stderr


# --- codes ---

@pytest.mark.parametrize('k,d', [(2, 1), (2, 5), (4, 3), (12, 7), (30, 4), (100, 64)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_code_certificates_lose_almost_nothing(k, d, dtype):
    points = torch.randn(k, d, dtype=dtype, generator=torch.Generator().manual_seed(k)) if k > d + 1 else simplex(k, d)
    points = points * 3
    certificate = code_certificate(points)
    assert verify(certificate) and certificate['k'] == k and certificate['d'] == d
    assert abs(float(Fraction(certificate['radians'])) - class_margin(points.double()).item()) < 1e-8


def test_no_points_are_further_apart_than_pi():
    "The cosine rises again beyond π: of 22/7 it is larger than −1."
    apart = dict(kind='code', k=2, d=1, points=[[1], [-1]])
    assert verify(signed(apart, radians='3141592653/1000000000')) and not verify(signed(apart, radians='22/7'))
    assert not verify(signed(apart, radians='3141592654/1000000000'))


def test_code_certificate_of_twins_and_of_no_points():
    twins = torch.tensor([[1., 0], [2, 0], [0, 1]])
    certificate = code_certificate(twins)
    assert verify(certificate) and Fraction(certificate['radians']) == 0
    with pytest.raises(ValueError): code_certificate(torch.zeros(3, 2))
