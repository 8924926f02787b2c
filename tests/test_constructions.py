"Known constructions: exact cosines, subsets and axes, monotone in both sizes, and the calculator's whole table."
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from largest_margins.bounds import class_margin_bound, stored_certificates
from largest_margins.codes import best_packing
from largest_margins.margins import class_margin
from largest_margins.theory.constructions import constructions, known_packing

FILE = Path(__file__).parent.parent/'benchmarks/results/packings.json'
ROWS = json.loads(FILE.read_text())['rows']
SMALL = [code for code in constructions() if code.k <= 1000]


@pytest.mark.parametrize('code', SMALL, ids=lambda code: f'{code.k} in {code.d}')
def test_a_construction_is_what_it_says(code):
    rows = code.rows()
    exact = isinstance(code.cosine, Fraction)
    products = rows @ rows.T if exact else np.einsum('id,jd->ij', rows, rows)
    assert products.shape == (code.k, code.k)
    square, off = products[0, 0], products[~np.eye(code.k, dtype=bool)].max()
    if exact:
        assert np.issubdtype(rows.dtype, np.integer) and (products.diagonal() == square).all()
        assert Fraction(int(off), int(square)) == code.cosine
    else: assert off / square == pytest.approx(code.cosine, abs=1e-15)
    points = code.points()
    assert points.shape == (code.k, code.d) and (points.norm(dim=1) - 1).abs().max() < 1e-14
    assert np.abs(points.numpy() @ points.numpy().T - products / square).max() < 1e-12  # as far apart as the integers


def test_the_largest_constructions_by_some_of_their_points():
    for code in constructions()[-1::-1]:
        if code.k < 5000: continue
        rows = code.rows()
        some = rows[np.random.default_rng(1).integers(code.k, size=20)]
        products = some @ rows.T
        square = int(rows[0] @ rows[0])
        assert len(rows) == code.k and ((rows * rows).sum(1) == square).all()
        assert Fraction(int(products[products < square].max()), square) == code.cosine
        assert (products == square).sum() == 20  # each only with itself


@pytest.mark.parametrize('k,d,degrees', [
    (23, 4, 60), (24, 4, 60), (40, 5, 60), (72, 6, 60), (126, 7, 60), (240, 8, 60), (500, 10, 60),
    (256, 16, math.degrees(math.acos(1 / 4))), (112, 21, math.degrees(math.acos(1 / 9))),
    (162, 21, math.degrees(math.acos(1 / 7))), (275, 22, math.degrees(math.acos(1 / 6))),
    (100, 24, math.degrees(math.acos(1 / 11))), (552, 23, math.degrees(math.acos(1 / 5))), (120, 4, 36)])
def test_known_optima_are_taken(k, d, degrees):
    points, name = known_packing(k, d)
    assert points.shape == (k, d) and name
    assert math.degrees(class_margin(points).item()) == pytest.approx(degrees, abs=1e-9)


def cosine(k, d):
    "What `known_packing` has, from its list alone."
    return min((c.cosine for c in constructions() if c.d <= d and k <= c.k + 2 * (d - c.d)), default=1)


def test_more_points_are_no_further_apart_and_more_dimensions_no_closer():
    for d in (*range(3, 26), 31, 32, 52, 60, 64, 105, 128, 256):
        for k in (2 * d + 1, 3 * d, 100, 240, 241, 500, 1000, 5000):
            assert cosine(k, d) <= cosine(k + 1, d) and cosine(k, d + 1) <= cosine(k, d)


@pytest.mark.parametrize('k,d', [(25, 5), (245, 9), (242, 9), (243, 9), (60, 20), (27, 7), (29, 7), (30, 7)])
def test_axes_fill_the_dimensions_that_are_left(k, d):
    points, _ = known_packing(k, d)
    assert class_margin(points).item() == pytest.approx(math.acos(cosine(k, d)), abs=1e-12)
    assert (points.norm(dim=1) - 1).abs().max() < 1e-14


def test_nothing_is_known_where_nothing_fits():
    assert known_packing(121, 4) is None and known_packing(13, 3) is None


# --- the calculator's table ---

def test_no_entry_of_the_table_is_below_one_that_contains_it_or_below_a_construction():
    assert len({(row['k'], row['d']) for row in ROWS}) == len(ROWS) > 350
    for row in ROWS:
        k, d, margin = row['k'], row['d'], row['class_margin']
        contains = [other['class_margin'] for other in ROWS if other['k'] >= k and other['d'] <= d]
        assert margin > max(contains) - 1e-8, (k, d)
        assert margin > math.degrees(math.acos(cosine(k, d))) - 1e-8, (k, d)
        assert margin <= row['bound'] + 1e-9 and row['how']


def test_every_size_up_to_32_points_has_a_certified_code_that_the_table_is_not_below():
    codes = {(c['k'], c['d']): math.degrees(Fraction(c['radians']))
             for c in stored_certificates() if c['kind'] == 'code'}
    table = {(row['k'], row['d']): row['class_margin'] for row in ROWS}
    assert {(k, d) for d in range(3, 9) for k in range(2 * d + 1, 33)} <= set(codes)
    assert all(table[size] > degrees - 1e-8 for size, degrees in codes.items())


def test_two_cross_polytopes_in_parallel_hyperplanes_are_in_the_table():
    "Heights ±h, and m the largest cosine between the axes of the layers: h² = m/(2 + m)."
    table = {(row['k'], row['d']): row['class_margin'] for row in ROWS}
    for size, m in {(20, 6): 6 / 11, (24, 7): 5**-.5}.items():
        assert table[size] == pytest.approx(math.degrees(math.acos(m / (2 + m))), abs=1e-7)


def test_every_construction_is_in_the_table():
    sizes = {(row['k'], row['d']) for row in ROWS}
    assert all((min(c.k, 1000), c.d) in sizes for c in constructions() if min(c.k, 1000) > 2 * c.d)


@pytest.mark.parametrize('k,d', [(23, 4), (200, 8), (256, 16), (100, 24), (1000, 24), (1000, 64), (500, 128)])
def test_the_search_never_ends_below_the_table_where_a_construction_is_best(k, d):
    row = next(row for row in ROWS if (row['k'], row['d']) == (k, d))
    packing = best_packing(k, d, starts=1, seconds=.1)
    assert math.degrees(packing.class_margin) > row['class_margin'] - 1e-8
    assert packing.how == row['how'] and packing.bound == class_margin_bound(k, d).radians
    assert torch.equal(packing.points, best_packing(k, d, starts=1, seconds=.1).points)
