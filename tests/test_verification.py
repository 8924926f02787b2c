"Verification against plain loops over the definitions, and files that must not be trusted."
import copyreg
import io
import math
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import warnings
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pairs import pairs
from PIL import Image
from sklearn.metrics import roc_curve
from torch import nn

from largest_margins import verification as module
from largest_margins.verification import (
    DeadNetwork,
    Pair,
    Templates,
    decode_image,
    embed_images,
    evaluate_pairs,
    identity_overlap,
    kfold_accuracy,
    pair_distances,
    plot_pair_distances,
    plot_roc,
    read_bin,
    read_cfp_pairs,
    read_pair_list,
    read_pairs,
    read_template_media,
    read_template_pairs,
    tar_at_far,
    template_features,
    template_scores,
    write_bin,
    write_pairs,
)

matplotlib.use('Agg')


def quiet_tar(*args, **kwargs):
    "`tar_at_far` without its warning."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return tar_at_far(*args, **kwargs)


# Accuracy over folds

def folds_of(n, folds):
    "Contiguous index lists; the first n % folds of them are longer by one."
    start, parts = 0, []
    for fold in range(folds):
        size = n // folds + (1 if fold < n % folds else 0)
        parts.append(list(range(start, start + size)))
        start += size
    return parts


def kfold_by_definition(distances, same, folds, thresholds):
    "Accuracies and thresholds, one comparison at a time."
    accuracies, chosen = [], []
    for fold in folds_of(len(distances), folds):
        others = [i for i in range(len(distances)) if i not in fold]
        if thresholds == 'grid': candidates = [i * .01 for i in range(400)]
        else:
            values = sorted({distances[i] for i in others})
            candidates = [-math.inf, *((a + b) / 2 for a, b in zip(values, values[1:])), math.inf]
        best, most = None, -1
        for t in candidates:
            right = sum((distances[i] < t) == same[i] for i in others)
            if right > most: best, most = t, right
        accuracies.append(sum((distances[i] < best) == same[i] for i in fold) / len(fold))
        chosen.append(best)
    return accuracies, chosen


coarse = st.integers(0, 40).map(lambda i: i / 10)  # on the grid's own points, with many ties
fine = st.floats(0, 4, width=32)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.one_of(coarse, fine), st.booleans()), min_size=2, max_size=40), st.integers(2, 12),
       st.sampled_from(['grid', 'midpoints']))
def test_kfold_is_the_definition(pairs, folds, thresholds):
    assume(folds <= len(pairs))
    distances, same = map(list, zip(*pairs))
    result = kfold_accuracy(distances, same, folds=folds, thresholds=thresholds)
    accuracies, chosen = kfold_by_definition(distances, same, folds, thresholds)
    assert result.accuracies.tolist() == accuracies
    assert result.thresholds.tolist() == chosen
    n = len(accuracies)
    mean = sum(accuracies) / n
    squares = sum((a - mean)**2 for a in accuracies)
    assert result.mean == pytest.approx(mean, abs=1e-12)
    assert result.std == pytest.approx(math.sqrt(squares / n), abs=1e-12)
    assert result.sem == pytest.approx(math.sqrt(squares / (n - 1)) / math.sqrt(n), abs=1e-12)


def test_ten_folds_are_the_default_and_std_is_three_times_sem():
    rng = np.random.default_rng(0)
    same = np.tile(np.repeat([True, False], 30), 10)
    result = kfold_accuracy(np.where(same, rng.uniform(0, 2, 600), rng.uniform(1, 4, 600)), same)
    assert result.accuracies.shape == (10,) and result.accuracies.dtype == torch.float64
    assert result.std == pytest.approx(3 * result.sem, rel=1e-12)
    assert f'{result.mean:.2%}' in str(result) and f'standard error {result.sem:.2%}' in str(result)


def test_the_comparison_is_strict():
    # 0.5 is on the grid and on the distances: only a threshold above it accepts the pair.
    result = kfold_accuracy([.5, .51, .5, .51], [True, False] * 2, folds=2)
    assert result.thresholds.tolist() == [.51, .51] and result.accuracies.tolist() == [1, 1]
    swapped = kfold_accuracy([.5, .51, .51, .51], [True, False, True, False], folds=2)
    assert swapped.accuracies.tolist()[1] == .5, 'a distance at the threshold is "different"'


def test_float32_distances_are_compared_as_the_numbers_that_they_are():
    d = np.float32(.61)  # a little above the double 0.61
    assert float(d) > .61
    result = kfold_accuracy(np.array([d, 1, d, 1], np.float32), [True, False] * 2, folds=2)
    assert result.thresholds.tolist() == [.62, .62]


def test_the_first_best_threshold_wins_and_never_sees_its_own_fold():
    # Alone, the first fold would want a threshold above 3; the others say 0.11.
    result = kfold_accuracy([3., 3.5, .1, 2, .1, 2], [True, False] * 3, folds=3)
    assert result.thresholds[0].item() == pytest.approx(.11) and result.accuracies[0].item() == .5


@pytest.mark.parametrize('make', [list, np.array, torch.tensor,
                                  lambda x: torch.tensor(x).double(), lambda x: torch.tensor(x).bfloat16()])
def test_lists_arrays_and_tensors(make):
    distances, same = [.25, .5, .125, 1.5], [True, False, True, False]
    expected = kfold_accuracy(distances, same, folds=2)
    for labels in (same, np.array(same), torch.tensor(same), [1, 0, 1, 0], torch.tensor([1, 0, 1, 0])):
        result = kfold_accuracy(make(distances), labels, folds=2)
        assert result.accuracies.tolist() == expected.accuracies.tolist()
        assert quiet_tar(make(distances), labels, .5).tar == quiet_tar(distances, same, .5).tar


@pytest.mark.parametrize('call,error,message', [
    (lambda: kfold_accuracy([], []), ValueError, 'distances must be [N]'),
    (lambda: kfold_accuracy([[1.]], [True]), ValueError, 'got shape (1, 1)'),
    (lambda: kfold_accuracy(['a'], [True]), TypeError, 'distances must be numbers'),
    (lambda: kfold_accuracy([1j, 1], [1, 0]), TypeError, 'distances must be numbers'),
    (lambda: kfold_accuracy([0, math.inf], [1, 0], folds=2), ValueError, 'finite, got inf at index 1'),
    (lambda: kfold_accuracy([0., 1], [True], folds=2), ValueError, 'same must be [N] with N = 2, got shape (1,)'),
    (lambda: kfold_accuracy([0., 1], [1., 0.], folds=2), TypeError, 'same must be bools'),
    (lambda: kfold_accuracy([0., 1], [1, 2], folds=2), ValueError, '0 and 1 only, got 2'),
    (lambda: kfold_accuracy([0., 1], [1, -1], folds=2), ValueError, 'got -1'),
    (lambda: kfold_accuracy([0., 1], [1, 0]), ValueError, 'folds must be ≥ 2 and ≤ 2, got 10'),
    (lambda: kfold_accuracy([0., 1], [1, 0], folds=1), ValueError, 'folds'),
    (lambda: kfold_accuracy([0., 1], [1, 0], folds=2.), TypeError, 'folds'),
    (lambda: kfold_accuracy([0., 1], [1, 0], folds=2, thresholds='all'), ValueError, "'grid' or 'midpoints'"),
    (lambda: kfold_accuracy([-1., 1], [1, 0], folds=2), ValueError, 'got -1 to 1'),
    (lambda: kfold_accuracy([0., 4.2], [1, 0], folds=2), ValueError, "'midpoints' takes any"),
    (lambda: tar_at_far([0., 1], [1, 0], 1.5), ValueError, 'far must be ≥ 0 and ≤ 1'),
    (lambda: tar_at_far([0., 1], [1, 0], math.nan), ValueError, 'far'),
    (lambda: tar_at_far([0., 1], [1, 0], '0.1'), TypeError, 'far must be a number'),
    (lambda: tar_at_far([0., 1], [1, 0], True), TypeError, 'far must be a number'),
    (lambda: tar_at_far([0., 1], [1, 0], .5, rule='lax'), ValueError, "'strict' or 'nearest'"),
    (lambda: tar_at_far([0., 1], [1, 1], .5), ValueError, 'only genuine'),
    (lambda: tar_at_far([0., 1], [0, 0], .5), ValueError, 'only impostors'),
    (lambda: tar_at_far([0., math.nan], [0, 1], .5), ValueError, 'scores must be finite'),
])
def test_bad_numbers(call, error, message):
    with pytest.raises(error, match=re.escape(message)): call()


def test_midpoints_take_distances_of_any_size():
    result = kfold_accuracy([-7., 900, -7, 900], [True, False] * 2, folds=2, thresholds='midpoints')
    assert result.thresholds.tolist() == [446.5, 446.5] and result.mean == 1
    huge = kfold_accuracy([1.5e308, 1.7e308] * 2, [True, False] * 2, folds=2, thresholds='midpoints')
    assert huge.mean == 1 and huge.thresholds.isfinite().all()
    neighbours = [1., math.nextafter(1, 2)]
    assert kfold_accuracy(neighbours * 2, [True, False] * 2, folds=2, thresholds='midpoints').mean == 1


# TAR at a FAR

def tar_by_definition(scores, same, far):
    "The best gate among all that accept scores from some score on, or none at all."
    genuine = [s for s, y in zip(scores, same) if y]
    impostors = [s for s, y in zip(scores, same) if not y]
    best = None
    for t in [math.inf, *scores]:
        accepted = sum(s >= t for s in impostors) / len(impostors)
        tar = sum(s >= t for s in genuine) / len(genuine)
        if accepted <= far and (best is None or (tar, accepted) > best): best = tar, accepted
    return best


def tar_nearest(scores, same, far):
    "The point of the whole ROC with the nearest FAR; the higher of two, as in the scripts for IJB-C."
    fpr, tpr, _ = roc_curve(same, scores, drop_intermediate=False)
    fpr, tpr = fpr[::-1], tpr[::-1]
    _, i = min(zip(abs(fpr - far), range(len(fpr))))
    return tpr[i], fpr[i]


scored = st.lists(st.tuples(st.one_of(st.integers(-9, 9).map(float), st.floats(-1e6, 1e6, width=32)), st.booleans()),
                  min_size=2, max_size=40).filter(lambda x: len({y for _, y in x}) == 2)
fars = st.one_of(st.floats(0, 1), st.tuples(st.integers(0, 40), st.integers(1, 40)).map(lambda x: min(1, x[0] / x[1])))


@settings(deadline=None, max_examples=150)
@given(scored, fars)
def test_tar_is_the_definition(pairs, far):
    scores, same = map(list, zip(*pairs))
    result = quiet_tar(scores, same, far)
    tar, accepted = tar_by_definition(scores, same, far)
    assert result.tar == tar
    assert result.far == sum(s >= result.threshold for s, y in pairs if not y) / same.count(False) <= far
    assert result.tar == sum(s >= result.threshold for s, y in pairs if y) / same.count(True)
    assert result.far == accepted
    assert result.supported == (1 / same.count(False) <= far)


@settings(deadline=None, max_examples=150)
@given(scored, fars)
def test_the_nearest_rule_is_that_of_the_scripts(pairs, far):
    scores, same = map(list, zip(*pairs))
    result = quiet_tar(scores, same, far, rule='nearest')
    tar, accepted = tar_nearest(scores, same, far)
    assert (result.tar, result.far) == (pytest.approx(tar, abs=1e-12), pytest.approx(accepted, abs=1e-12))
    assert result.far == sum(s >= result.threshold for s, y in pairs if not y) / same.count(False)


def test_nearest_may_break_the_promise_and_strict_does_not():
    # 40 impostors at 0.00, 0.01, …; 36 genuine pairs spread so that one more impostor lets one more of them in.
    impostors = [i / 100 for i in range(40)]
    genuine = [.395] * 14 + [.385] + [0.] * 21
    scores, same = genuine + impostors, [True] * 36 + [False] * 40
    strict, nearest = tar_at_far(scores, same, .045), tar_at_far(scores, same, .045, rule='nearest')
    assert (strict.tar, strict.far) == (15 / 36, .025)
    assert (nearest.tar, nearest.far) == (15 / 36, .05) and nearest.far > .045
    lower = quiet_tar(scores, same, .0249), quiet_tar(scores, same, .0249, rule='nearest')
    assert (lower[0].tar, lower[1].tar) == (14 / 36, 15 / 36)
    between = quiet_tar([.9, .5, .7, .1], [True, True, False, False], .25, rule='nearest')  # 0 and 0.5 are as near
    assert (between.tar, between.far) == (1, .5)


def test_a_float_that_hides_a_whole_number():
    # 0.29·100 is 28.999… in floating point, but 29 of 100 is a FAR of 0.29.
    scores, same = [*range(100), 70.5], [False] * 100 + [True]
    assert int(.29 * 100) == 28
    assert tar_at_far(scores, same, .29).far == .29
    for n in (7, 49, 1000, 4321):
        scores, same = [*range(n), -1], [False] * n + [True]
        for k in (1, n // 3, n - 1):
            result = tar_at_far(scores, same, k / n)
            assert result.far == k / n and result.supported


def test_ties_that_span_the_limit_stay_out():
    scores = [.9] * 3 + [.5] * 5 + [.5] * 4 + [.1] * 8
    same = [True] * 8 + [False] * 12
    result = tar_at_far(scores, same, .25)  # three of twelve would be allowed, but four are tied
    assert (result.tar, result.far) == (3 / 8, 0) and .5 < result.threshold <= .9
    assert tar_at_far(scores, same, 4 / 12).tar == 1
    everything = tar_at_far([1.] * 4, [True, True, False, False], .5)
    assert (everything.tar, everything.far, everything.threshold) == (0, 0, math.inf)


def test_either_comparison_builds_the_same_gate():
    rng = np.random.default_rng(1)
    scores, same = rng.normal(size=400).astype(np.float32), rng.random(400) < .4
    for far in (.01, .1, .5, 1.):
        result = tar_at_far(scores, same, far)
        for accepted in (scores >= result.threshold, scores > result.threshold):
            assert accepted[same].mean() == result.tar and accepted[~same].mean() == result.far
    adjacent = [1., math.nextafter(1, 2)]
    assert quiet_tar(adjacent, [False, True], 0.).threshold == adjacent[1]


def test_a_far_that_the_pairs_cannot_support_is_said():
    scores, same = [*np.linspace(0, 1, 300), 2], [False] * 300 + [True]
    with pytest.warns(UserWarning, match=re.escape('FAR 0.0001 needs 10,000 impostor pairs or more, there are 300')):
        result = tar_at_far(scores, same, 1e-4)
    assert (result.tar, result.far, result.supported, result.impostors) == (1, 0, False, 300)
    assert 'TAR' not in str(result)
    with pytest.warns(UserWarning, match='endlessly many'): tar_at_far(scores, same, 0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert tar_at_far(scores, same, 1 / 300).supported


def test_only_the_order_of_scores_counts():
    rng = np.random.default_rng(2)
    scores, same = rng.uniform(-1, 1, 500), rng.random(500) < .5
    for far in (.01, .2):
        plain, bent = (tar_at_far(f(scores), same, far) for f in (np.array, np.exp))
        assert (plain.tar, plain.far) == (bent.tar, bent.far)


def test_millions_of_scores_in_little_memory():
    rng = np.random.default_rng(3)
    scores = rng.standard_normal(3_000_000, dtype=np.float32)
    same = np.arange(len(scores)) < 20_000
    tracemalloc.start()
    result = tar_at_far(scores, same, 1e-4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    impostors = np.sort(scores[~same])[::-1]
    assert result.tar == np.mean(scores[same] > impostors[int(1e-4 * len(impostors))])
    assert peak < 4 * scores.nbytes


# Lists of pairs

names = st.from_regex(r'[A-Za-zÉ][A-Za-z_\-]{0,8}', fullmatch=True)
numbers = st.integers(1, 12345)


def image(name, number): return f'{name}/{name}_{number:04d}'


@st.composite
def lfw_pairs(draw):
    folds, half = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    pairs = []
    for _ in range(folds):
        for _ in range(half):
            name, both = draw(names), draw(st.lists(numbers, min_size=2, max_size=2, unique=True))
            pairs.append(Pair(*(image(name, number) for number in both), True))
        for _ in range(half):
            first, second = draw(st.lists(names, min_size=2, max_size=2, unique=True))
            pairs.append(Pair(image(first, draw(numbers)), image(second, draw(numbers)), False))
    return folds, pairs


@settings(deadline=None, max_examples=60)
@given(drawn=lfw_pairs())
def test_pairs_come_back(drawn, tmp_path_factory):
    folds, pairs = drawn
    path = tmp_path_factory.mktemp('pairs')/'pairs.txt'
    write_pairs(path, pairs, folds)
    assert read_pairs(path) == read_pairs(str(path)) == read_pairs(path.read_text(encoding='utf-8')) == pairs


def test_the_official_form(tmp_path):
    official = '2\t1\nAbel_Pacheco\t1\t4\nAbdel_Madi_Shabneh\t1\tDean_Barker\t1\nZico\t2\t3\nZico\t1\tYao_Ming\t12\n'
    pairs = read_pairs(official)
    assert pairs[1] == ('Abdel_Madi_Shabneh/Abdel_Madi_Shabneh_0001', 'Dean_Barker/Dean_Barker_0001', False)
    assert pairs[3].second == 'Yao_Ming/Yao_Ming_0012' and [p.same for p in pairs] == [True, False, True, False]
    development = official.replace('2\t1\n', '2\n').replace('Abdel_Madi_Shabneh\t1\tDean_Barker\t1\nZico\t2\t3\n',
                                                            'Zico\t2\t3\nAbdel_Madi_Shabneh\t1\tDean_Barker\t1\n')
    assert [p.same for p in read_pairs(development)] == [True, True, False, False]
    (tmp_path/'windows.txt').write_bytes(b'\xef\xbb\xbf' + official.replace('\n', '\r\n').encode())
    assert read_pairs(tmp_path/'windows.txt') == read_pairs(official.replace('\t', ' ') + '\n\n') == pairs
    write_pairs(tmp_path/'again.txt', pairs, folds=2)
    assert (tmp_path/'again.txt').read_bytes() == official.encode()


@pytest.mark.parametrize('text,message', [
    ('\n', 'is empty'), ('ten\nA 1 2\nA 1 B 1', 'line 1: wanted the numbers of folds'),
    ('1 1 1\n', 'line 1: wanted the numbers of folds'), ('10 300\nA 1 2', "line 1: '10 300' means 6000 pairs, got 1"),
    ('0\n', 'means 0 pairs'), ('1\nA 1 2', 'means 2 pairs, got 1'),
    ('1\nA 1 2\nA 1 2', 'line 3: wanted name1 n1 name2 n2'), ('1\nA 1 B 2\nA 1 2', 'line 2: wanted name n1 n2'),
    ('1\nA 1 2\nA 1 A 2', 'two names'), ('1\nA 1 01\nA 1 B 2', 'two numbers'),
    ('1\nA 1 x\nA 1 B 2', "got 'A 1 x'"), ('1\nA 0 1\nA 1 B 2', 'line 2'),
    ('1\nA -1 1\nA 1 B 2', 'line 2'), ('1\nA 1 ٢\nA 1 B 2', 'line 2'), ('1\nA 1 1_0\nA 1 B 2', 'line 2'),
    ('1\nA 1 9999999999\nA 1 B 2', 'line 2'), ('1\nA 1 2\n../A 1 B 2', 'line 3'), ('1\nA 1 2\n.. 1 B 2', 'line 3'),
    ('1\n\n\nA 1 2\n\nA 1 2\n', 'line 6')])
def test_bad_pairs_are_named_by_line(text, message):
    with pytest.raises(ValueError, match=re.escape(message)): read_pairs(text)


def test_bad_files_of_pairs(tmp_path):
    (tmp_path/'latin.txt').write_bytes(b'1\nJos\xe9 1 2\nA 1 B 1\n')
    with pytest.raises(ValueError, match='latin.txt is not a text in UTF-8'): read_pairs(tmp_path/'latin.txt')
    (tmp_path/'bad.txt').write_text('1\nA 1 2\nA 1 2\n')
    with pytest.raises(ValueError, match=r'bad\.txt, line 3'): read_pairs(tmp_path/'bad.txt')
    with pytest.raises(FileNotFoundError): read_pairs(tmp_path/'none.txt')
    with pytest.raises(TypeError, match='path_or_text'): read_pairs(7)
    assert len(read_pairs('\ufeff1\nA 1 2\nA 1 B 1\n')) == 2, 'a text that an editor marked as UTF-8'


@pytest.mark.parametrize('pairs,message', [
    ([], 'multiple of 2'), ([Pair('A/A_0001', 'A/A_0002', True)], 'multiple of 2'),
    ([Pair('A/A_0001', 'B/B_0001', False), Pair('A/A_0001', 'A/A_0002', True)], 'pairs[0] must be genuine'),
    ([Pair('A/A_0001', 'B/B_0001', True)] * 2, 'pairs[0] must be genuine'),
    ([Pair('A/A_0001', 'A/A_0002', True)] * 2, 'pairs[1] must be an impostor'),
    ([Pair('A/B_0001', 'A/A_0002', True)] * 2, "such as 'Ada/Ada_0001'"),
    ([Pair('A/A_0001.jpg', 'A/A_0002', True)] * 2, 'pairs[0] must name images'),
    ([Pair('A/A_01', 'A/A_0002', True)] * 2, 'pairs[0] must name'),
    ([Pair('A/A_0000', 'A/A_0002', True)] * 2, 'pairs[0] must name'),
    ([Pair('A/A_00012', 'A/A_0002', True)] * 2, 'pairs[0] must name'),
    ([Pair('A b/A b_0001', 'A b/A b_0002', True)] * 2, 'pairs[0] must name'),
    ([Pair('../.._0001', '../.._0002', True)] * 2, 'pairs[0] must name'),
    ([Pair(b'png', b'png', True)] * 2, 'pairs[0] must name')])
def test_pairs_that_the_format_cannot_say(pairs, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message).replace('such\\ as', '(such as|as in)')):
        write_pairs(tmp_path/'pairs.txt', pairs, folds=1)
    assert not (tmp_path/'pairs.txt').exists()


def test_lists_with_labels():
    assert read_pair_list('a/1.jpg a/2.jpg 1\nx y 0\nx z -1\n') == [
        Pair('a/1.jpg', 'a/2.jpg', True), Pair('x', 'y', False), Pair('x', 'z', False)]
    for line in ('a b', 'a b 2', 'a b c 1', 'a b true'):
        with pytest.raises(ValueError, match='line 2: wanted "first second label"'): read_pair_list(f'a b 1\n{line}')


def cfp(root, folds=2):
    "A folder in CFP's form: three people, two frontal images and one profile each."
    protocol = root/'Protocol'
    frontal = [f'{p:03d}/frontal/{i:02d}.jpg' for p in (1, 2, 3) for i in (1, 2)]
    profile = [f'{p:03d}/profile/01.jpg' for p in (1, 2, 3)]
    for kind in ('FP', 'FF'):
        for fold in range(1, folds + 1):
            (protocol/'Split'/kind/f'{fold:02d}').mkdir(parents=True)
            (protocol/'Split'/kind/f'{fold:02d}'/'same.txt').write_text('1,1\n3,2\n' if kind == 'FP' else '1,2\n3,4\n')
            (protocol/'Split'/kind/f'{fold:02d}'/'diff.txt').write_text('2,3\n' if fold == 1 else '5,1\n')
    for side, images in (('F', frontal), ('P', profile)):
        (protocol/f'Pair_list_{side}.txt').write_text(
            ''.join(f'{i} ../Data/Images/{path}\n' for i, path in enumerate(images, 1)))
    return root


def test_cfp(tmp_path):
    pairs = read_cfp_pairs(cfp(tmp_path))
    assert pairs == [
        Pair('001/frontal/01.jpg', '001/profile/01.jpg', True), Pair('002/frontal/01.jpg', '002/profile/01.jpg', True),
        Pair('001/frontal/02.jpg', '003/profile/01.jpg', False),
        Pair('001/frontal/01.jpg', '001/profile/01.jpg', True), Pair('002/frontal/01.jpg', '002/profile/01.jpg', True),
        Pair('003/frontal/01.jpg', '001/profile/01.jpg', False)]
    assert read_cfp_pairs(tmp_path, 'FF')[0] == Pair('001/frontal/01.jpg', '001/frontal/02.jpg', True)
    assert all((pair.first[:3] == pair.second[:3]) == pair.same for pair in pairs)
    assert identity_overlap(['002'], pairs) == ['002']
    with pytest.raises(ValueError, match="'FP' or 'FF'"): read_cfp_pairs(tmp_path, 'PP')
    (tmp_path/'Protocol/Split/FP/02/diff.txt').write_text('1,3\n1,4\n')
    with pytest.raises(ValueError, match=r'diff\.txt, line 2: wanted "i,j"'): read_cfp_pairs(tmp_path)
    (tmp_path/'Protocol/Pair_list_P.txt').write_text('1 somewhere.jpg\n')
    with pytest.raises(ValueError, match=r'Pair_list_P\.txt, line 1'): read_cfp_pairs(tmp_path)


def test_overlap_by_name():
    pairs = [Pair('Ada_Byron/Ada_Byron_0001', 'Bob/Bob_0002', False)]
    assert identity_overlap(['ada byron', 'Eve'], pairs) == ['Ada_Byron']
    assert identity_overlap(pairs, ['ADA-BYRON_0003.jpg', 'Bob_0001.png', 'x/y']) == ['ADA-BYRON', 'Bob']
    assert identity_overlap([], pairs) == [] == identity_overlap(['Adam'], pairs)
    assert identity_overlap(['n_000012'], ['n_000013', 'n_000012']) == ['n_000012'], 'names may end in a number'
    with pytest.raises(TypeError, match='have none'): identity_overlap([Pair(b'1', b'2', True)], pairs)
    with pytest.raises(TypeError, match='list of names'): identity_overlap('Bob', pairs)


# Files of images

IMAGES, FLAGS = [b'one', b'', b'three' * 100, b'\xff\x00four'], [True, False]
PAIRS = [Pair(b'one', b'', True), Pair(b'three' * 100, b'\xff\x00four', False)]


@pytest.mark.parametrize('protocol, kind, flags', pairs(
    range(6), [bytes, 'array', 'column', 'row'],
    [list, tuple, np.array, partial(np.array, dtype='>i2'), lambda x: list(map(int, x))]))
def test_bin_in_every_form(protocol, kind, flags):
    def made(x):
        if kind is bytes: return x
        array = np.frombuffer(x, np.uint8).copy()
        return array if kind == 'array' else array[:, None] if kind == 'column' else array[None]
    content = pickle.dumps(([made(x) for x in IMAGES], flags(FLAGS)), protocol=protocol)
    assert read_bin(content) == PAIRS
    assert all(type(pair.same) is bool and type(pair.first) is bytes for pair in read_bin(content))


def test_an_array_written_twice_and_a_list_instead_of_a_tuple():
    array = np.frombuffer(b'shared', np.uint8).copy()
    for protocol in range(6):
        assert read_bin(pickle.dumps([[array, array], [True]], protocol=protocol)) == [Pair(b'shared', b'shared', True)]


@pytest.mark.parametrize('protocol', range(6))
def test_the_order_of_an_array_in_memory_is_kept(protocol):
    array = np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    content = pickle.dumps(([array, array.T], [True]), protocol=protocol)
    assert read_bin(content) == [Pair(bytes([0, 1, 2, 3, 4, 5]), bytes([0, 3, 1, 4, 2, 5]), True)]


def python2_string(x):
    "A str as Python 2's cPickle wrote it in protocol 2."
    return b'U' + bytes([len(x)]) + x if len(x) < 256 else b'T' + struct.pack('<i', len(x)) + x


def python2_array(x):
    "An array of bytes as NumPy 1 wrote it under Python 2 in protocol 2."
    return (b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K' + bytes([len(x)])
            + b'\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89'
            + python2_string(x) + b'tb')


@pytest.mark.parametrize('write', [python2_string, python2_array])
def test_bin_of_python_2(write):
    images = [bytes(range(256))[:200], b'caf\xe9', b'', b'x']
    content = b'\x80\x02](' + b''.join(map(write, images)) + b'e](\x88\x89e\x86q\x01.'
    assert read_bin(content) == [Pair(*images[:2], True), Pair(*images[2:], False)]
    if write is python2_string:
        long = [b'\xf0' * 300, b'y']
        content = b'\x80\x02](' + b''.join(map(write, long)) + b'e](I01\ne\x86.'
        assert read_bin(content) == [Pair(*long, True)]


class Reduced:
    "Pickles as a call of the function with the arguments."

    def __init__(self, function, *arguments): self.call = function, arguments

    def __reduce__(self): return self.call


def image_list(x, protocol=4): return pickle.dumps(([x, b''], [True]), protocol=protocol)


def named(module_name, name): return pickle.dumps(module_name, 4)[:-1] + pickle.dumps(name, 4)[2:-1] + b'\x93.'


ARRAY = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR'
BYTES_DTYPE = b"cnumpy\ndtype\n(Vu1\nI00\nI01\ntR(I3\nV|\nNNNI-1\nI-1\nI0\ntb"


def with_dtype(state, code=b'u1'):
    return b'(cnumpy\ndtype\n(V' + code + b'\nI00\nI01\ntR' + state + b'bt.'


# Written by Python 2.7.18, by pickle and cPickle, the arrays and np.bool_ by NumPy 1.16.6
STRINGS_OF_PYTHON_2 = [
    (b'((lp1\nS\'caf\\xe9\\n\\\'"\\\\\'\np2\naS\'\'\naS\'\\xff\\xd8\\x00\'\np3\naS"it\'s"\np4\na(lp5\nI01\na'
     b'I00\nat.'),
    (b'((lp0\nS\'caf\\xe9\\n\\\'"\\\\\'\np1\naS\'\'\np2\naS\'\\xff\\xd8\\x00\'\np3\naS"it\'s"\np4\na(lp5\nI0'
     b'1\naI00\natp6\n.'),
]
THREE_BYTES_OF_PYTHON_2 = [
    (b"((lp0\nc__builtin__\nbytearray\np1\n(V\xff\xd8\\u000a\np2\nS'latin-1'\np3\ntp4\nRp5\nag1\n(V\np6\nS'l"
     b"atin-1'\np7\ntp8\nRp9\na(lp10\nI01\natp11\n."),
    (b'\x80\x02]q\x00(c__builtin__\nbytearray\nq\x01X\x05\x00\x00\x00\xc3\xbf\xc3\x98\nq\x02U\x07latin-1q'
     b'\x03\x86q\x04Rq\x05h\x01X\x00\x00\x00\x00q\x06U\x07latin-1q\x07\x86q\x08Rq\te]q\n\x88a\x86q\x0b.'),
    (b"((lp1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntS'b'\ntRp4\n(I1\n(I3\ntc"
     b"numpy\ndtype\np5\n(S'u1'\nI0\nI1\ntRp6\n(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\xff\\xd8\\n'\ntbag2\n("
     b"g3\n(I0\ntS'b'\ntRp7\n(I1\n(I0\ntg6\nI00\nS''\ntba(lp8\ncnumpy.core.multiarray\nscalar\np9\n(g5\n(S'b"
     b"1'\nI0\nI1\ntRp10\n(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbS'\\x01'\ntRp11\nat."),
    (b'(]q\x01(cnumpy.core.multiarray\n_reconstruct\nq\x02(cnumpy\nndarray\nq\x03(K\x00tU\x01btRq\x04(K\x01('
     b'K\x03tcnumpy\ndtype\nq\x05(U\x02u1K\x00K\x01tRq\x06(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK'
     b'\x00tbI00\nU\x03\xff\xd8\ntbh\x02(h\x03(K\x00tU\x01btRq\x07(K\x01(K\x00th\x06I00\nU\x00tbe]q\x08cnump'
     b'y.core.multiarray\nscalar\nq\t(h\x05(U\x02b1K\x00K\x01tRq\n(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff'
     b'\xff\xffK\x00tbU\x01\x01tRq\x0bat.'),
    (b'\x80\x02]q\x01(cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87Rq'
     b'\x04(K\x01K\x03\x85cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87Rq\x06(K\x03U\x01|NNNJ\xff\xff\xff\xffJ'
     b'\xff\xff\xff\xffK\x00tb\x89U\x03\xff\xd8\ntbh\x02h\x03K\x00\x85U\x01b\x87Rq\x07(K\x01K\x00\x85h\x06'
     b'\x89U\x00tbe]q\x08cnumpy.core.multiarray\nscalar\nq\th\x05U\x02b1K\x00K\x01\x87Rq\n(K\x03U\x01|NNNJ'
     b'\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x01\x01\x86Rq\x0ba\x86.'),
]


@pytest.mark.parametrize('content', STRINGS_OF_PYTHON_2)
def test_what_python_2_wrote_in_protocol_0(content):
    assert read_bin(content) == [Pair(b'caf\xe9\n\'"\\', b'', True), Pair(b'\xff\xd8\x00', b"it's", False)]
    with pytest.raises(ValueError, match='STRING .* must be quoted'): read_bin(content.replace(b"'\np", b'\np', 1))


@pytest.mark.parametrize('content', THREE_BYTES_OF_PYTHON_2)
def test_arrays_and_bytearrays_of_python_2(content):
    assert read_bin(content) == [Pair(b'\xff\xd8\n', b'', True)]


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('kind', [bytes, bytearray, lambda x: np.frombuffer(x, np.uint8)])
def test_flags_of_numpy_and_bytearrays(protocol, kind):
    for flags in ([np.bool_(flag) for flag in FLAGS], [np.int64(flag) for flag in FLAGS], (np.uint8(1), np.False_)):
        content = pickle.dumps(([kind(x) for x in IMAGES], flags), protocol=protocol)
        assert read_bin(content) == PAIRS and all(type(pair.same) is bool for pair in read_bin(content))


SIZE, COUNT = 250_000, 4000
LARGE = b'B' + struct.pack('<I', SIZE) + bytes(SIZE) + b'q\xf0'  # bytes, in the memo
TEXT = b'X' + struct.pack('<I', SIZE) + b'a' * SIZE + b'q\xf0'
GET = b'h\xf0'


def listed(first, again): return b'\x80\x04(](' + first + again * (COUNT - 1) + b'e](' + b'\x88' * (COUNT // 2) + b'et.'


def array_of(raw):
    return ARRAY + b'(K\x01J' + struct.pack('<i', SIZE) + b'\x85' + BYTES_DTYPE + b'\x89' + raw + b'tb'


BYTEARRAY = b'\x96' + struct.pack('<Q', SIZE) + bytes(SIZE) + b'q\xf0'


@pytest.mark.parametrize('content', [
    listed(LARGE, GET), listed(array_of(LARGE) + b'q\xf1', b'h\xf1'), listed(array_of(LARGE), array_of(GET)),
    listed(BYTEARRAY, GET), listed(array_of(BYTEARRAY), array_of(GET)),
    listed(b'cbuiltins\nbytearray\n' + LARGE + b'\x85R', b'cbuiltins\nbytearray\n' + GET + b'\x85R'),
    listed(b'c_codecs\nencode\n' + TEXT + b'Vlatin1\n\x86R', b'c_codecs\nencode\n' + GET + b'Vlatin1\n\x86R')],
    ids=['bytes', 'array', 'arrays', 'bytearray', 'arrays of a bytearray', 'bytearrays', 'encoded'])
def test_many_references_to_one_image_take_little(content):
    tracemalloc.start()
    try: assert len(read_bin(content)) == COUNT // 2
    except ValueError as e: assert 'would fill the memory' in str(e)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * SIZE + 1000 * COUNT


@pytest.mark.parametrize('content', [
    b"cos\nsystem\n(S'touch ran'\ntR.", b"cposix\nsystem\n(S'touch ran'\ntR.", b'(Vtouch ran\nios\nsystem\n.',
    b'(cos\nsystem\nVtouch ran\no.', b'cbuiltins\neval\n.', b'c__builtin__\nexec\n.', b'cbuiltins\ngetattr\n.',
    b'c_codecs\ndecode\n.', b'ccodecs\nencode\n.', b'cnumpy\nload\n.', b'cnumpy\nfromfile\n.',
    b'cnumpy.testing\nruntest\n.', b'cevil.numpy\nndarray\n.', b'cevilnumpy\nndarray\n.', b'cnumpy.core\nndarray\n.',
    b'cx.numpy.core.multiarray\n_reconstruct\n.', named('numpy', 'core.multiarray._reconstruct'),
    named('numpy.ndarray', '__class__'), named('os', 'system'), named('numpy', 'ndarray.__reduce__'),
    image_list(Reduced(print, 'ran')), image_list(Reduced(exec, 'ran'), 2), image_list([[[Reduced(eval, '1')]]]),
    image_list(Path('x')), image_list(partial(print)), image_list(np.array([Reduced(eval, '1')])),
    image_list(np.array([None])), image_list(np.array(['a'])), image_list(np.array([b'a'])),
    image_list(np.zeros(1, 'c8')), image_list(np.zeros(1, 'M8[s]')), image_list(np.zeros(1, [('x', 'u1')])),
    image_list(np.zeros(1, 'O')), image_list(np.zeros((2, 2, 2), 'u1')), image_list({'a': 1}), image_list({1}),
    image_list(1.5), b'\x82\x01.', b'Pid\n.', b'I1\nQ.', b'I1\n2.', b'I1\n0.', b'\x80\x05\x97.',
    b'cnumpy\nndarray\n)\x81.', b'cnumpy\nndarray\n)R.', b'I1\n)R.', b'cbuiltins\nbytes\n(I9\ntR.',
    b'c_codecs\nencode\n(Vx\nVrot13\ntR.', b'cnumpy\nndarray\n(I1\ntb.', b'](I1\ntb.', b'I1\nI2\na.',
    b'cnumpy\ndtype\nI1\na.', with_dtype(b'(I4\nV|\nNNNI-1\nI-1\nI0\nt'),
    with_dtype(b'(I3\nV|\nV(2,)u1\nNNI-1\nI-1\nI0\nt'), with_dtype(b'N', b'object'), with_dtype(b'N', b'u1,u1'),
    ARRAY + b'(I1\n(I1000000000000000000\nt' + BYTES_DTYPE + b'I00\nC\x01atb.',
    ARRAY + b'(I1\n(I0\nI1000000000000000000\nt' + BYTES_DTYPE + b'I00\nC\x00tb.',
    ARRAY + b'(I1\n(I-1\nt' + BYTES_DTYPE + b'I00\nC\x01atb.',
    ARRAY + b'(I1\n(I2\nt' + BYTES_DTYPE + b'I00\nC\x01atb.',
    ARRAY + b'(I1\n(I1\nt' + BYTES_DTYPE + b'I00\nC\x03abctb.',
    ARRAY + b'(I1\n(I2\nI2\nt' + BYTES_DTYPE + b'I00\nC\x03abctb.',
    ARRAY + b'(I1\n(I1\nt' + BYTES_DTYPE + b'I00\nVa\ntb.', ARRAY + b'(I1\n(I1\nt' + ARRAY + b'I00\nC\x01atb.',
    ARRAY + (b'(I1\n(I1\nt' + BYTES_DTYPE + b'I00\nC\x01atb') * 2 + b'.'])
def test_nothing_but_data(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for where in (content, b'\x80\x04](' + content.removeprefix(b'\x80\x04')[:-1] + b'e.'):
        with pytest.raises(ValueError, match='the content is no .bin file of image pairs'): read_bin(where)
    assert not list(tmp_path.iterdir()), 'it ran'
    assert 'x.numpy' not in sys.modules and 'evilnumpy' not in sys.modules


def test_an_extension_that_the_process_knows_is_refused_too():
    copyreg.add_extension('os', 'system', 240)
    try:
        content = b'\x80\x02\x82\xf0.'
        assert pickle.loads(content) is not None  # the ordinary way finds os.system
        with pytest.raises(ValueError, match='a name by its number, 240'): read_bin(content)
    finally: copyreg.remove_extension('os', 'system', 240)


def test_no_unpickler_is_used(monkeypatch):
    def forbidden(*args, **kwargs): raise AssertionError('unpickled')
    content = pickle.dumps((IMAGES, FLAGS))
    for name in ('load', 'loads', 'Unpickler', '_Unpickler'): monkeypatch.setattr(pickle, name, forbidden)
    assert read_bin(content) == PAIRS


@pytest.mark.parametrize('content', [
    b'\x80\x04\x8e' + struct.pack('<Q', 1 << 62) + b'x.', b'\x80\x04\x8d' + struct.pack('<Q', 1 << 40) + b'x.',
    b'B\xff\xff\xff\xffx.', b'T\xff\xff\xff\x7fx.', b'\x8b\xff\xff\xff\x7fx.', b'\x80\x05\x96' + b'\xff' * 8 + b'.',
    b'I1\nr\xff\xff\xff\x7f.', b'(' * 1000 + b'l.'], ids=range(8))
def test_what_is_only_announced_takes_no_memory(content):
    tracemalloc.start()
    with pytest.raises(ValueError, match='no .bin file'): read_bin(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 21


def test_a_tuple_of_tuples_of_tuples_is_not_walked():
    # Sixty doublings name 2^60 leaves; what is looked at stays small.
    bomb = b'I1\n' + b'q\x00h\x00\x86' * 60
    with pytest.raises(ValueError, match='wanted a list of flags|got'): read_bin(b'(' + bomb + b'I1\nt.')
    deep = b'(' * 50_000 + b't' * 50_000 + b'.'
    with pytest.raises(ValueError, match='wanted a pair of images and flags'): read_bin(deep)


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('kind', [bytes, lambda x: np.frombuffer(x, np.uint8)])
def test_half_a_file(protocol, kind):
    content = pickle.dumps(([kind(x) for x in IMAGES[:2]], [True]), protocol=protocol)
    for n in range(len(content)):
        with pytest.raises(ValueError, match='the content is no .bin file of image pairs'): read_bin(content[:n])


@settings(deadline=None, max_examples=250)
@given(st.data())
def test_no_damage_surprises(data):
    protocol = data.draw(st.integers(0, 5))
    kind = data.draw(st.sampled_from([bytes, lambda x: np.frombuffer(x, np.uint8).copy()]))
    content = bytearray(pickle.dumps(([kind(x) for x in IMAGES[:2]], [True]), protocol=protocol))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try: pairs = read_bin(bytes(content))
    except ValueError as e: assert 'is no .bin file of image pairs' in str(e)
    else: assert all(isinstance(pair, Pair) and isinstance(pair.first, bytes) for pair in pairs)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_noise_is_no_bin_file(content):
    with pytest.raises(ValueError, match='no .bin file'): read_bin(content)


@pytest.mark.parametrize('loaded,message', [
    ([[b'a', b'b']], 'wanted a pair of images and flags'), (([b'a', b'b'], [True], 1), 'wanted a pair of images'),
    (b'ab', 'wanted a pair of images'), (7, 'wanted a pair'), ((b'ab', [True]), 'wanted a list of images'),
    (([b'a', b'b'], True), 'wanted a list of flags'), (([b'a'], [True]), '1 images and 1 flags'),
    (([], []), '0 images and 0 flags'), (([b'a', b'b'], [2]), 'flag 0 must be a bool, got 2'),
    (([b'a', b'b'], [None]), 'flag 0 must be a bool'), (([b'a', 1], [True]), 'image 1 must be bytes'),
    (([b'a', None], [True]), 'image 1'), (([b'a', np.zeros(2)], [True]), 'image 1 must be bytes or an array of bytes'),
    (([b'a', np.uint8(3)], [True]), 'image 1'), (([b'a', b'b'], np.array([[True]])), 'flag 0'),
    (([b'a', b'b'], [np.float32(1)]), 'flag 0 must be a bool, got 1.0'),
    (([b'a', b'b'], np.array([.5])), 'flag 0 must be a bool, got 0.5'),
    (([b'a', b'b'], np.array(True)), 'wanted a list of flags')])
def test_data_of_another_form(loaded, message, tmp_path):
    with open(tmp_path/'wrong.bin', 'wb') as file: pickle.dump(loaded, file, protocol=5)
    with pytest.raises(ValueError, match=re.escape(message)) as caught: read_bin(tmp_path/'wrong.bin')
    assert 'wrong.bin is no .bin file of image pairs' in str(caught.value)


# Images and features

def png(array, kind='PNG'):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def noise():
    return [np.random.default_rng(i).integers(0, 256, (6, 4, 3)) for i in range(7)]


def test_decoding(noise, tmp_path):
    x = decode_image(png(noise[0]), size=None)
    assert x.shape == (3, 6, 4) and x.dtype == torch.float32
    torch.testing.assert_close(x, torch.tensor((noise[0].transpose(2, 0, 1) / 255 - .5) / .5, dtype=torch.float32))
    assert decode_image(png(noise[0]), size=(5, 9)).shape == (3, 5, 9)
    assert decode_image(png(noise[0])).shape == (3, 112, 112)
    grey = decode_image(png(noise[0][..., 0]), size=None)
    assert torch.equal(grey[0], grey[2])
    (tmp_path/'a.jpg').write_bytes(png(noise[0], 'JPEG'))
    for name in ('a.jpg', 'a'): assert decode_image(name, tmp_path, None).shape == (3, 6, 4)
    for kind in ('BMP', 'PPM', 'WEBP'): assert decode_image(png(noise[0], kind), size=None).shape == (3, 6, 4)


def test_images_that_are_refused(noise, tmp_path):
    bomb = bytearray(png(noise[0]))
    bomb[16:24] = struct.pack('>II', 60_000, 60_000)
    for content in (b'', b'junk', png(noise[0])[:60], bytes(bomb), b'II*\0', b'GIF89a',
                    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n'):
        with pytest.raises(ValueError, match='image of .* bytes is not readable'): decode_image(content)
    (tmp_path/'a.png').write_bytes(b'junk')
    with pytest.raises(ValueError, match=r'image .*a\.png is not readable'): decode_image('a.png', tmp_path)
    with pytest.raises(FileNotFoundError, match='b was not found'): decode_image('b', tmp_path)
    (tmp_path/'inside').mkdir()
    for name in ('../a.png', str(tmp_path/'a.png'), 'x/../../a', '..\\a.png'):
        with pytest.raises(ValueError, match='must be a path below the root'): decode_image(name, tmp_path/'inside')
    for size in ((0, 5), (5,), 5):
        with pytest.raises(ValueError, match='size must be'): decode_image(png(noise[0]), size=size)


def test_flip_fusion_by_hand(noise):
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(72, 5))
    images = [png(x) for x in noise]
    for batch_size in (1, 3, 64):
        plain, fused = (embed_images(images, linear, size=None, flip=flip, batch_size=batch_size)
                        for flip in (False, True))
        for i, array in enumerate(noise):
            x = torch.tensor((array / 255 - .5) / .5, dtype=torch.float32)
            z, mirrored = (linear(y.permute(2, 0, 1)[None])[0].detach() for y in (x, x[:, torch.arange(3, -1, -1)]))
            torch.testing.assert_close(plain[i], z / z.norm(), atol=1e-5, rtol=0)
            torch.testing.assert_close(fused[i], (z + mirrored) / (z + mirrored).norm(), atol=1e-5, rtol=0)
    assert not fused.requires_grad and fused.device.type == 'cpu'


def test_a_network_is_in_evaluation_mode_and_gets_its_modes_back(noise):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(.5), nn.BatchNorm2d(3), nn.Flatten())
    network.train()
    network[2].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = [png(x) for x in noise]
    first, again = (embed_images(images, network, size=None, batch_size=b) for b in (2, 7))
    torch.testing.assert_close(first, again)
    assert [m.training for m in network.modules()] == [True, True, True, False, True]
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match=re.escape('images[1]: the image of 4 bytes')):
        embed_images([images[0], b'junk'], network, size=None)
    assert network.training and not network[2].training


def test_half_precision_and_devices(noise):
    images, seen = [png(x) for x in noise], []
    def embed(x):
        seen.append((x.device.type, x.shape))
        return x.flatten(1).bfloat16()
    z = embed_images(images, embed, size=(4, 4), batch_size=4, device='cpu')
    assert z.dtype == torch.float32 and (z.norm(dim=1) - 1).abs().max() < 1e-6
    assert seen == [('cpu', (4, 3, 4, 4))] * 2 + [('cpu', (3, 3, 4, 4))] * 2


@pytest.mark.parametrize('embed,error,message', [
    (lambda x: x, ValueError, r'embed must return \[7, d\] for 7 images, got shape \(7, 3, 6, 4\)'),
    (lambda x: x.flatten(1)[:1], ValueError, r'got shape \(1, 72\)'), (lambda x: [1], TypeError, 'got list'),
    (lambda x: x.flatten(1) * math.nan, ValueError, r'finite features, got others for images\[0\]')])
def test_bad_embeddings(embed, error, message, noise):
    with pytest.raises(error, match=message): embed_images([png(x) for x in noise], embed, size=None)


def test_zero_features_are_like_nobody_and_are_counted(noise):
    images = [png(x) for x in noise]
    def embed(x): return x.flatten(1) * (torch.arange(len(x)) % 3 > 0)[:, None]  # every third face is not found
    with pytest.warns(UserWarning, match='3 of 7 features of embed are zero'):
        features = embed_images(images, embed, size=None, flip=False)
    assert (~features.any(1)).tolist() == [True, False, False] * 2 + [True]
    with pytest.warns(UserWarning, match='3 of 7 features are zero'):
        distances = pair_distances(features, [0, 0, 1, 0, 1], [3, 1, 3, 0, 1])
    assert distances.tolist() == [2, 2, 2, 2, 0], 'cosine 0 with others, with other zeros and with itself'
    with pytest.warns(UserWarning, match='1 of 3 features are zero'):
        scores = template_scores(Templates(np.array([3, 5, 9]), torch.tensor([[0., 0], [1, 0], [0, 1]])),
                                 [3, 3, 5, 5], [3, 5, 5, 9])
    assert scores.tolist() == [0, 0, 1, 0]
    with pytest.warns(UserWarning) as said:
        templates = template_features(torch.tensor([[0., 0], [0, 0], [3, 4]]), [1, 1, 2], [1, 2, 1])
    messages = [str(warning.message) for warning in said]
    assert '2 of 3 features are zero' in messages[0] and '1 of 2 templates are zero' in messages[1]
    assert templates.features[0].tolist() == [0, 0] and templates.features[1].tolist() == pytest.approx([.6, .8])


def test_failed_detections_are_not_accepted(people):
    root, pairs = people
    lost = {image(f'P{i}', j) for i in (0, 5) for j in (1, 2)}
    for path in lost: (root/f'{path}.png').write_bytes(png(np.zeros((8, 8, 3))))
    def blind(x): return colour(x) * (x.flatten(1).amax(1, keepdim=True) > -1)
    with pytest.warns(UserWarning, match='4 of 32 features of embed are zero'):
        result = evaluate_pairs(pairs, blind, root, folds=2, fars=(.1,), size=(8, 8))
    touched = torch.tensor([bool({p.first, p.second} & lost) for p in pairs])
    assert (result.cosines[touched] == 0).all() and result.zeros == 4
    assert '4 images have a feature of zeros' in str(result)


@pytest.mark.parametrize('value', [0., 2.])
def test_a_dead_network_is_said_to_be_one(people, value):
    root, pairs = people
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(DeadNetwork, match='the network is dead: it has .* for all 32 images'):
            evaluate_pairs(pairs, lambda x: torch.full((len(x), 5), value), root, folds=2)


@pytest.mark.parametrize('scale', [1e-44, 1e-40, 1e-38, 1e-30, 1e30, 1e37])
def test_features_of_any_size(scale):
    features = (torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) * scale * (9 if scale < 1e-43 else 1))
    features[(features == 0).all(1)] = 1
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    i, j = torch.triu_indices(20, 20)
    expected = (unit[i] - unit[j]).square().sum(1)
    assert (pair_distances(features, i, j).double() - expected).abs().max() < 1e-5
    templates = template_features(features, range(20), [0] * 20)
    assert (templates.features.double() - unit).abs().max() < 1e-5
    assert (1 - template_scores(templates, i, j).double() - expected / 2).abs().max() < 1e-5


def test_bad_batches(noise):
    images = [png(noise[0]), png(noise[1][:5])]
    with pytest.raises(ValueError, match=re.escape('size=None needs images of one size, got (5, 4) and (6, 4)')):
        embed_images(images, nn.Flatten(), size=None)
    with pytest.raises(ValueError, match='batch_size'): embed_images(images, nn.Flatten(), batch_size=0)
    with pytest.raises(ValueError, match='at least one'): embed_images([], nn.Flatten())


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 30), st.integers(1, 40), st.integers(0, 99))
def test_distances_of_pairs(n, d, count, chunk_size, seed):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d)) * rng.uniform(.1, 9, (n, 1))
    first, second = rng.integers(0, n, (2, count))
    unit = [row / math.sqrt(sum(x * x for x in row)) for row in features]
    expected = [sum((x - y)**2 for x, y in zip(unit[i], unit[j])) for i, j in zip(first, second)]
    got = pair_distances(torch.tensor(features), first, second, chunk_size=chunk_size)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)
    assert (got[first == second] == 0).all()


def test_bad_rows():
    z = torch.eye(3)
    for first, second, message in (([0], [3], 'second must be in 0..2'), ([-1], [0], 'first must be in 0..2'),
                                   ([0, 1], [0], 'for second')):
        with pytest.raises(ValueError, match=message): pair_distances(z, first, second)
    with pytest.raises(ValueError, match='features must be'): pair_distances(z[0], [0], [0])
    with pytest.raises(TypeError, match='first must be integers, got float64'): pair_distances(z, [0.], [0])
    with pytest.raises(TypeError, match='float8_e4m3fn has no arithmetic: convert it'):
        pair_distances(z.to(torch.float8_e4m3fn), [0], [0])
    with pytest.raises(TypeError, match=r'features must be .*, got torch\.sparse_coo'):
        pair_distances(z.to_sparse(), [0], [0])
    assert not pair_distances(nn.Parameter(z), [0], [1]).requires_grad, 'it is a measure, also of what is trained'


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, '>i4', '>u8'])
def test_numbers_of_rows_and_templates_of_every_width(dtype):
    z, first, second = torch.eye(3), np.array([0, 1, 2], dtype), np.array([0, 2, 2], dtype)
    assert pair_distances(z, first, second).tolist() == [0, 2, 0]
    templates = template_features(z, first, np.array([5, 5, 5]))
    assert template_scores(templates, first, second).tolist() == [1, 0, 1]
    if np.dtype(dtype).isnative: assert pair_distances(z, *map(torch.from_numpy, (first, second))).tolist() == [0, 2, 0]
    with pytest.raises(ValueError, match='first must be below'): pair_distances(z, np.array([2**63], np.uint64), [0])


# The whole way

@pytest.fixture
def people(tmp_path):
    "Eight people of one colour each, four noisy images; a pairs.txt of two folds that share nobody."
    rng = np.random.default_rng(5)
    colours = rng.permutation(np.array([[r, g, b] for r in (40, 210) for g in (40, 210) for b in (40, 210)]))
    for i, colour in enumerate(colours):
        (tmp_path/f'P{i}').mkdir()
        for j in range(1, 5):
            pixels = (colour + rng.integers(-30, 31, (8, 8, 3))).clip(0, 255)
            (tmp_path/f'P{i}'/f'P{i}_{j:04d}.png').write_bytes(png(pixels))
    pairs = []
    for fold in (range(4), range(4, 8)):
        pairs += [Pair(image(f'P{i}', 1), image(f'P{i}', j), True) for i in fold for j in (2, 3, 4)]
        pairs += [Pair(image(f'P{i}', 1), image(f'P{j}', 2), False) for i in fold for j in fold if i != j]
    write_pairs(tmp_path/'pairs.txt', pairs, folds=2)
    return tmp_path, pairs


def colour(x): return x.mean((2, 3))


def test_from_pairs_to_numbers(people):
    root, pairs = people
    calls = []
    def embed(x):
        calls.append(len(x))
        return colour(x)
    result = evaluate_pairs(root/'pairs.txt', embed, folds=2, fars=(.1, .05), size=(8, 8), batch_size=5)
    assert sum(calls) == 2 * 32, 'each image once, and once mirrored'
    assert result.accuracy.mean == 1 and result.tar[0].tar == 1 and result.tar[0].far <= .1
    assert result.same.tolist() == [pair.same for pair in pairs]
    features = {p: colour(decode_image(p, root, (8, 8))[None])[0] for pair in pairs for p in pair[:2]}
    unit = {p: z / z.norm() for p, z in features.items()}
    expected = torch.stack([(unit[p.first] - unit[p.second]).square().sum() for p in pairs])
    torch.testing.assert_close(result.distances, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.cosines, 1 - expected / 2, atol=1e-5, rtol=0)
    by_hand = kfold_accuracy(result.distances, result.same, folds=2)
    assert by_hand.accuracies.tolist() == result.accuracy.accuracies.tolist()
    assert str(result) == f'{result.accuracy}\n{result.tar[0]}\n{result.tar[1]}'


def test_the_same_pairs_in_every_form(people, tmp_path_factory):
    root, pairs = people
    options = dict(folds=2, fars=(.1,), size=(8, 8))
    expected = evaluate_pairs(root/'pairs.txt', colour, **options).distances
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    write_bin(elsewhere/'people.bin', pairs, root)
    with open(elsewhere/'arrays.bin', 'wb') as file:
        images = [np.frombuffer(x, np.uint8) for pair in read_bin(elsewhere/'people.bin') for x in pair[:2]]
        pickle.dump((images, [pair.same for pair in pairs]), file, protocol=2)
    (elsewhere/'list.txt').write_text(''.join(f'{p.first}.png {p.second}.png {int(p.same)}\n' for p in pairs))
    (elsewhere/'pairs.txt').write_text((root/'pairs.txt').read_text())
    for given_pairs, where in ((elsewhere/'people.bin', None), (str(elsewhere/'arrays.bin'), None), (pairs, root),
                               (elsewhere/'pairs.txt', root), (read_pair_list(elsewhere/'list.txt'), str(root))):
        assert torch.equal(evaluate_pairs(given_pairs, colour, where, **options).distances, expected)


def test_what_is_missing_is_named(people):
    root, pairs = people
    (root/'P3/P3_0001.png').unlink()
    with pytest.raises(FileNotFoundError, match='P3/P3_0001 was not found'):
        evaluate_pairs(root/'pairs.txt', colour, folds=2)
    with pytest.raises(ValueError, match='at least one pair'): evaluate_pairs([], colour)
    with pytest.warns(UserWarning, match='needs 1,000 impostor pairs or more, there are 21'):
        result = evaluate_pairs([p for p in pairs if 'P3_0001' not in str(p)] + pairs[:3], colour, root, folds=2,
                                size=(8, 8), thresholds='midpoints')
    assert result.accuracy.accuracies.shape == (2,)


# Templates

def template_by_definition(features, templates, media, weights=None, keep_norms=False):
    "One template after the other, one medium after the other."
    result = {}
    for t in sorted(set(templates)):
        total = np.zeros(features.shape[1])
        for m in sorted({m for u, m in zip(templates, media) if u == t}):
            rows = [i for i in range(len(features)) if (templates[i], media[i]) == (t, m)]
            vectors = [features[i] if keep_norms else features[i] / np.linalg.norm(features[i]) for i in rows]
            if weights is not None: vectors = [weights[i] * v for i, v in zip(rows, vectors)]
            total += sum(vectors) / len(rows)
        result[t] = total / np.linalg.norm(total)
    return result


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 25), st.integers(0, 999), st.booleans(), st.booleans(), st.booleans())
def test_templates_are_the_definition(count, seed, keep_norms, weighted, mirrored):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 4)) + 3
    flipped = rng.normal(size=(count, 4)) + 3
    templates, media = rng.choice([3, 900, 17, 4], count), rng.integers(0, 3, count)
    weights = rng.uniform(.1, 1, count) if weighted else None
    ids, unit = template_features(torch.tensor(features), templates, media, norm_weights=keep_norms,
                                  flipped=torch.tensor(flipped) if mirrored else None, detector_scores=weights)
    expected = template_by_definition(features + flipped if mirrored else features, templates.tolist(), media.tolist(),
                                      weights, keep_norms)
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(unit.numpy(), list(expected.values()), atol=1e-12)
    first, second = rng.choice(ids, (2, 50))
    cosines = [expected[i] @ expected[j] for i, j in zip(first, second)]
    scores = template_scores(Templates(ids, unit), first, torch.tensor(second), chunk_size=7)
    np.testing.assert_allclose(scores.numpy(), cosines, atol=1e-12)


def test_a_long_video_counts_as_much_as_a_photograph():
    features = torch.tensor([[1., 0]] * 999 + [[0., 1]])
    _, unit = template_features(features, [1] * 1000, [5] * 999 + [6])
    torch.testing.assert_close(unit, torch.tensor([[1., 1]]) / math.sqrt(2))


@pytest.mark.parametrize('call,message', [
    (lambda z: template_features(z[0], [1], [1]), 'features must be'),
    (lambda z: template_features(z[:0], [], []), 'M ≥ 1'),
    (lambda z: template_features(z * math.inf, [1, 1], [1, 1]), 'finite'),
    (lambda z: template_features(z, [1], [1, 1]), 'templates must be [2]'),
    (lambda z: template_features(z, [1, 1], [1]), 'media must be [2]'),
    (lambda z: template_features(z, [1, 1], [1, 1], flipped=z[:1]), 'flipped must be (2, 2)'),
    (lambda z: template_features(z, [1, 1], [1, 1], detector_scores=[1.]), 'detector_scores must be 2 numbers'),
    (lambda z: template_features(z, [1, 1], [1, 1], detector_scores=[1., -1]), 'got 2 from -1'),
    (lambda z: template_scores(Templates(np.array([4, 9]), z), [4, 5], [9, 9]), 'no template 5, asked for by pair 1'),
    (lambda z: template_scores(Templates(np.array([4, 9]), z), [4], [10]), 'no template 10')])
def test_bad_templates(call, message):
    with pytest.raises(ValueError, match=re.escape(message)): call(torch.ones(2, 2))


def test_the_files_of_ijb(tmp_path):
    (tmp_path/'media.txt').write_text('1.jpg 1 69544\n2.jpg 1 3720\n3.jpg 187955 111105\n')
    (tmp_path/'pairs.txt').write_text('1 11065 1\n171707 185794 0\n')
    images, templates, media = read_template_media(tmp_path/'media.txt')
    assert (images, templates.tolist(), media.tolist()) == (
        ['1.jpg', '2.jpg', '3.jpg'], [1, 1, 187955], [69544, 3720, 111105])
    first, second, same = read_template_pairs(tmp_path/'pairs.txt')
    assert (first.tolist(), second.tolist(), same.tolist()) == ([1, 171707], [11065, 185794], [True, False])
    (tmp_path/'media.txt').write_text('1.jpg 1 69544\n2.jpg 1\n')
    with pytest.raises(ValueError, match=r'media\.txt, line 2: wanted "name template medium"'):
        read_template_media(tmp_path/'media.txt')
    for text, message in (('1 2 1\n1 2 7\n', 'label 0 or 1, got 7 in line 2'), ('1 2\n', 'got 2 numbers in a line'),
                          ('1 2 x\n', 'wanted lines'), ('1 2 1\n1 2\n', 'wanted lines'), ('', 'pairs.txt is empty')):
        (tmp_path/'pairs.txt').write_text(text)
        with pytest.raises(ValueError, match=message): read_template_pairs(tmp_path/'pairs.txt')


# Pictures, imports

def test_the_roc_is_tar_at_each_far():
    rng = np.random.default_rng(6)
    same = rng.random(300) < .4
    scores = np.round(rng.normal(size=300) + same, 1)  # with ties
    ax = plot_roc(scores, same)
    curve, limit = ax.lines
    n = (~same).sum()
    assert ax.get_xscale() == 'log' and set(limit.get_xdata()) == {1 / n}
    assert curve.get_xdata()[0] == 1 / n and curve.get_xdata()[-1] == 1 and curve.get_ydata()[-1] == 1
    for far, tar in curve.get_xydata(): assert tar == pytest.approx(tar_at_far(scores, same, far).tar, abs=1e-12)
    assert curve.get_drawstyle() == 'steps-post'


def test_the_histograms_hold_every_pair():
    ax = plot_pair_distances([.1, .2, 3.], [True, True, False], .5)
    areas = [sum(bar.get_height() * bar.get_width() for bar in bars) for bars in ax.containers]
    assert areas == [pytest.approx(1), pytest.approx(1)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ['genuine', 'impostors', 't = 0.50']
    assert set(ax.lines[0].get_xdata()) == {.5}


def test_the_module_needs_torch_numpy_and_pillow_only():
    done = subprocess.run([sys.executable, '-c', f'import {module.__name__}, sys; print(*sys.modules)'],
                          capture_output=True, text=True, check=True)
    loaded = {name.split('.')[0] for name in done.stdout.split()}
    assert {'torch', 'numpy', 'PIL'} <= loaded
    assert not loaded & {'fastai', 'fastcore', 'matplotlib', 'sklearn', 'scipy', 'torchvision', 'pandas', 'cv2'}
