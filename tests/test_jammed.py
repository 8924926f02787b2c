"Certificates of local optimality: what is jammed has one, what is not has none, and a forged one is refused."
import copy
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from largest_margins.certificates import checksum
from largest_margins.codes import Packing, best_packing, simplex
from largest_margins.theory.constructions import known_packing
from largest_margins.theory.jammed import jammed_certificate, verify_jammed


def certificate_of(points):
    packing = Packing(torch.as_tensor(points), math.pi)
    return jammed_certificate(packing.points.numpy(), packing.contacts().numpy())


@pytest.mark.parametrize('k', [4, 7, 8, 9, 10, 12, 13, 14, 19, 20, 24])
def test_best_packings_in_space_are_jammed(k):
    packing = best_packing(k, 3, starts=12)
    certificate = packing.certificate
    assert verify_jammed(json.loads(json.dumps(certificate)))
    near, far = Fraction(certificate['nearest']), Fraction(certificate['radius'])
    assert near < 1e-9 and far > 1e-5
    assert packing.rigidity == 'jammed' and packing.optimum in ('local', 'proven')


@pytest.mark.parametrize('k,d', [(10, 4), (24, 4), (16, 5), (27, 6)])
def test_known_constructions_are_jammed(k, d):
    assert verify_jammed(certificate_of(known_packing(k, d)[0]))


def test_no_random_neighbour_of_a_jammed_packing_is_better():
    "The theorem, by trial: between the two distances every move closes some contact."
    packing = best_packing(8, 3, starts=2)
    certificate, points = packing.certificate, packing.points
    near, far = float(Fraction(certificate['nearest'])), float(Fraction(certificate['radius']))
    for seed in range(300):
        move = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        size = (far / near)**(seed / 400) * near * 2
        moved = torch.nn.functional.normalize(points + size * move / move.norm())
        u, _, v = torch.linalg.svd(moved.T @ points)
        distance = (moved @ (u @ v) - points).norm()
        if near < distance < far: assert Packing(moved, 4.).class_margin < packing.class_margin


SQUARE = np.array([[1., 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])


def test_what_is_not_jammed_has_no_certificate():
    assert certificate_of(SQUARE) is None  # stationary, but a tetrahedron is better
    for third in (90, 100, 120):  # five points at 90°: a whole family
        turn = np.radians([0, third, 240])
        five = np.concatenate([np.stack([np.cos(turn), np.sin(turn), 0 * turn], 1), [[0, 0, 1.], [0, 0, -1]]])
        assert certificate_of(five) is None
    points = np.random.default_rng(0).standard_normal((9, 3))
    assert certificate_of(points / np.linalg.norm(points, axis=1, keepdims=True)) is None
    cube = np.array([[x, y, z] for x in (1, -1) for y in (1, -1) for z in (1, -1)]) / math.sqrt(3)
    assert certificate_of(cube) is None  # turn one face, and it gets better


GOOD = certificate_of(simplex(4, 3).numpy())


def forged(**changes):
    certificate = {**copy.deepcopy(GOOD), **changes}
    return {**certificate, 'sha256': checksum(certificate)}


@pytest.mark.parametrize('changes', [
    dict(kind='hull'), dict(points=GOOD['points'][:3]), dict(points=[row[:2] for row in GOOD['points']]),
    dict(points=[[0, 0, 0]] * 4), dict(points=[[x // 2 for x in row] for row in GOOD['points']]),
    dict(points=[[*row[:2], float(row[2])] for row in GOOD['points']]), dict(points=[[True] * 3] * 4),
    dict(cosine=GOOD['cosine'] - 2**30), dict(cosine=str(GOOD['cosine'])), dict(cosine=2**61), dict(cosine=0),
    dict(contacts=GOOD['contacts'][:5], stress=GOOD['stress'][:5]), dict(contacts=[[0, 4]] * 6),
    dict(contacts=[[1, 0], *GOOD['contacts'][1:]]), dict(contacts=[GOOD['contacts'][1], *GOOD['contacts'][1:]]),
    dict(contacts=[], stress=[]), dict(stress=[0, *GOOD['stress'][1:]]), dict(stress=[-1, *GOOD['stress'][1:]]),
    dict(stress=[2 * GOOD['stress'][0], *GOOD['stress'][1:]]), dict(stress=[1] * 5), dict(radius='1/2'),
    dict(radius='1'), dict(nearest='0'), dict(nearest='-1'), dict(nearest=GOOD['radius']), dict(radius='nan'),
    dict(radius='1e-4'), dict(nearest=None), dict(more=1)], ids=lambda changes: ' '.join(changes))
def test_a_forged_certificate_is_refused(changes):
    assert verify_jammed(forged())
    assert not verify_jammed(forged(**changes))


@pytest.mark.parametrize('certificate', [None, [], {}, 'x', 1, {'kind': 'jammed'}, {**GOOD, 'sha256': 'x'}])
def test_what_is_no_certificate_is_refused(certificate):
    assert not verify_jammed(certificate)


def test_a_deep_list_is_refused():
    deep = []
    for _ in range(10**5): deep = [deep]
    for key in GOOD: assert not verify_jammed({**GOOD, key: deep})


def test_huge_certificates_are_refused_at_once():
    poles = [[2**60] + [0] * 1999, [-2**60] + [0] * 1999]  # few numbers, but two million turns
    assert not verify_jammed(forged(points=poles, contacts=[[0, 1]], stress=[1], cosine=1 - 2**60))
    assert jammed_certificate(np.eye(2000)[:2], np.array([[0, 1]])) is None
    assert not verify_jammed(forged(points=[[1] * 3] * 10_000))
    assert not verify_jammed(forged(stress=[1] * 10_000, contacts=[[0, 1]] * 10_000))
    assert not verify_jammed(forged(radius='9' * 10**6))
