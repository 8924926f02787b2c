"Comparisons of rows against SciPy's own tests, and where there is nothing to compare."
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from largest_margins.study.comparisons import Comparison, adjust, compare_rows, plot_comparisons, ranking


def cell(*differences): return dict(enumerate(differences))


def finished(cells):
    "Runs as a table has them: (setting, row) -> numbers, one for each seed."
    def name(x): return SimpleNamespace(name=x)
    return [(SimpleNamespace(setting=name(s), row=name(r), configuration=SimpleNamespace(seed=seed)),
             dict(measured=dict(accuracy=x))) for (s, r), row in cells.items() for seed, x in enumerate(row)]


@pytest.mark.parametrize('seeds', [2, 3, 10])
def test_one_cell_is_student_s_test(seeds):
    x = np.random.default_rng(seeds).normal(1, 2, seeds)
    found, wanted = Comparison({('s', 'a', 'b'): cell(*x.tolist())}), ttest_1samp(x, 0)
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.interval(.9) == pytest.approx(tuple(wanted.confidence_interval(.9)))


def test_cells_are_averaged_within_a_seed_first():
    found = Comparison({('s', 'a', 'b'): cell(0., 2.), ('t', 'a', 'b'): cell(5., 6., 7., 8.)})
    assert found.by_seed == {0: 2.5, 1: 4.} and found.mean == 3.25 and found.raised == found.number == 2
    assert found.standard_error == pytest.approx(np.std([2.5, 4.], ddof=1) / np.sqrt(2))
    with pytest.raises(ValueError, match='two seeds or more in common'):
        Comparison({('s', 'a', 'b'): {0: 1., 1: 2.}, ('t', 'a', 'b'): {1: 1., 2: 2.}}).brief()


def test_copies_of_a_cell_say_no_more_than_one():
    one = Comparison({('s', 'a', 'b'): cell(1., 2., 4.)})
    many = Comparison({('s', 'a', str(i)): cell(1., 2., 4.) for i in range(50)})
    assert many.interval() == pytest.approx(one.interval()) and many.p == pytest.approx(one.p)


@pytest.mark.parametrize('seeds', [3, 5])
@pytest.mark.parametrize('shared, effect', [(1, 0), (0, 1), (2, 2), (0, 0)])
def test_intervals_cover_with_shared_rows_and_an_effect_of_the_seed(seeds, shared, effect):
    rng = np.random.default_rng(seeds)
    covered = 0
    for _ in range(800):
        numbers = (rng.standard_normal((8, seeds)) * np.linspace(.1, 2, 8)[:, None]
                   + shared * rng.standard_normal(seeds) + effect * rng.standard_normal(seeds))
        low, high = Comparison({('s', str(i), 'b'): cell(*x) for i, x in enumerate(numbers)}).interval()
        covered += low < 0 < high
    assert covered / 800 >= .93


def test_adjusting_is_holm_s_procedure():
    x = np.random.default_rng(1).normal(0, 1, (6, 5)) + np.arange(6)[:, None]
    family = adjust({i: Comparison({('s', 'a', 'b'): cell(*row)}) for i, row in enumerate(x)})
    p = [family[i].p for i in range(6)]
    wanted, level = {}, 0.
    for rank, i in enumerate(np.argsort(p)):
        wanted[i] = level = max(level, min(1., (6 - rank) * p[i]))
    assert [family[i].adjusted for i in range(6)] == pytest.approx([wanted[i] for i in range(6)])
    assert list(family) == list(range(6)) and all(c.family == 6 for c in family.values())
    assert all((c.verdict in ('raises', 'lowers')) == (c.adjusted < .05) for c in family.values())
    assert all(c.verdict.startswith('may') == (c.p < .05 <= c.adjusted) for c in family.values())
    assert adjust({}) == {}


def test_without_a_spread_only_a_difference_of_zero_is_none():
    assert Comparison({('s', 'a', 'b'): cell(0., 0.)}).verdict == 'no difference found'
    for n, verdict in ((2, 'no difference found'), (5, 'no difference found'), (6, 'lowers')):  # p = 2^(1−n)
        found = Comparison({('s', 'a', 'b'): cell(*[-1.] * n)})
        assert (found.p, found.verdict, found.interval()[1]) == (2**(1 - n), verdict, math.inf)


def test_rounding_is_no_rise_and_a_minus_is_a_minus():
    found = Comparison({('s', 'a', 'b'): cell(.222224, -.222218), ('t', 'a', 'b'): cell(-1., -2.)})
    assert found.raised == 0 and found.brief(1).startswith('−0.7 [−')
    assert Comparison({('s', 'a', 'b'): cell(.01, .02)}).raised == 1


def test_a_picture_has_a_line_for_each_comparison():
    spread = {'rise': [1., 1.1, 1.2], 'fall': [-1., -1.1, -1.2], 'nothing': [-1., 0., 1.]}
    ax = plot_comparisons({name: Comparison({('s', 'a', 'b'): cell(*x)}) for name, x in spread.items()})
    assert [label.get_text() for label in ax.get_yticklabels()] == list(spread)
    dots = [line for line in ax.lines if line.get_marker() == 'o']
    assert [line.get_xdata()[0] for line in dots] == pytest.approx([1.1, -1.1, 0])
    assert [line.get_mfc() == 'none' for line in dots] == [False, False, True]


def test_seeds_are_paired_and_diverged_runs_left_out():
    runs = finished({('s', 'a'): [1., None, 3., 4.], ('s', 'b'): [2., 9., 5., 7.], ('t', 'a'): [1.], ('t', 'b'): [2.]})
    assert compare_rows(runs, [('a', 'b')], 'accuracy').cells == {('s', 'a', 'b'): {0: 1., 2: 2., 3: 3.}}
    for pairs in ([('a', 'b'), ('a', 'b')], [('a', 'b'), ('b', 'a')], [('a', 'a')]):
        with pytest.raises(ValueError, match='count twice'): compare_rows(runs, pairs, 'accuracy')
    for pairs, name in (([('a', 'c')], 'accuracy'), ([('a', 'b')], 'mAP')):
        with pytest.raises(ValueError, match='two seeds or more'): compare_rows(runs, pairs, name)


def test_a_ranking_compares_with_the_best_and_adjusts():
    rng = np.random.default_rng(0)
    runs = finished({('s', f'row {i}'): (i + rng.normal(0, .1, 5)).tolist() for i in range(4)}
                    | {('s', 'twin'): (3 + rng.normal(0, .1, 5)).tolist(), ('s', 'alone'): [99.]})
    order = ranking(runs, 'accuracy')
    assert {s.row for s in order[:2]} == {'row 3', 'twin'} and all(s.ties for s in order[:2])
    assert [s.row for s in order[2:]] == ['row 2', 'row 1', 'row 0'] and not any(s.ties for s in order[2:])
    assert all(s.p >= s.behind.p for s in order[1:]) and order[0].behind is None
    with pytest.raises(ValueError, match='two seeds of accuracy'): ranking(finished({('s', 'a'): [1.]}), 'accuracy')
