"Rankings against a walk down each list, folders in the real format with every trap, batches of people, end to end."
import pickle
import shutil
import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.losses import CrossEntropyLossFlat
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet50

from largest_margins.data import RandomAffine
from largest_margins.heads import MarginHead
from largest_margins.images import ImageFiles
from largest_margins.losses import CosFaceLoss, LMSoftmaxLoss, NormFaceLoss
from largest_margins.plots import BLUE, ORANGE
from largest_margins.reid import (
    BNNeck,
    PKSampler,
    cosine_distances,
    duke_folder,
    embed,
    evaluate,
    market_folder,
    parse_market_name,
    pk_dataloaders,
    plot_cmc,
    plot_ranked_gallery,
    reid_learner,
    resnet50_body,
)
from largest_margins.study.glyphs import write_glyph_market
from largest_margins.training.bodies import ConvBody
from largest_margins.verification import DeadNetwork


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def quiet(learn, f, *args):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return f(*args)


# Rankings, from the definition: walk down the sorted list of one query

def walked(row, person, camera, persons, cameras, junk, trapezoid):
    "Average precision, inverse penalty and rank of the first match; None without a match."
    kept = [(d, i) for i, d in enumerate(row)
            if persons[i] not in junk and not (persons[i] == person and cameras[i] == camera)]
    found = [persons[i] == person for _, i in sorted(kept)]
    if not any(found): return None
    total, hits, recall, precision, area = sum(found), 0, 0., 1., 0.
    for rank, hit in enumerate(found, 1):
        hits += hit
        new_recall, new_precision = hits / total, hits / rank
        height = (precision + new_precision) / 2 if trapezoid else new_precision
        area += (new_recall - recall) * height
        recall, precision = new_recall, new_precision
    last = max(rank for rank, hit in enumerate(found, 1) if hit)
    return area, total / last, found.index(True) + 1


def reference(distances, query, gallery, ap, unmatched, junk, max_rank):
    "mAP, mINP, CMC and the number of valid queries."
    found = [walked(row, p, c, *gallery, junk, ap == 'trapezoid')
             for row, p, c in zip(distances, *query, strict=True)]
    valid = [f for f in found if f]
    n = len(valid) if unmatched == 'skip' else len(found)
    cmc = [sum(first <= rank for *_, first in valid) / n for rank in range(1, max_rank + 1)]
    return sum(f[0] for f in valid) / n, sum(f[1] for f in valid) / n, cmc, len(valid)


@st.composite
def rankings(draw):
    "Few persons, cameras and distances, so that every kind of tie and of missing match happens."
    Q, G = draw(st.integers(1, 5)), draw(st.integers(1, 14))
    values = draw(st.sampled_from([[0., 1.], [-1.5, -1., -0., 0., .25, 3.], [k / 16 - 1 for k in range(60)]]))
    def numbers(n, low, high): return draw(st.lists(st.integers(low, high), min_size=n, max_size=n))
    distances = [draw(st.lists(st.sampled_from(values), min_size=G, max_size=G)) for _ in range(Q)]
    query, gallery = (numbers(Q, 1, 4), numbers(Q, 1, 3)), (numbers(G, -1, 4), numbers(G, 1, 3))
    return distances, query, gallery


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('around', [-1., -1e-30, 0., 1.])
def test_distances_that_differ_in_their_last_bits_are_ranked(around, dtype):
    "Negative ones too, whose bits are in the opposite order."
    distances = [torch.tensor(around, dtype=dtype)]
    for _ in range(5): distances.append(torch.nextafter(distances[-1], torch.tensor(torch.inf, dtype=dtype)))
    for right in range(6):
        found = evaluate(torch.stack(distances)[None], [1], [1], [1 if i == right else 2 for i in range(6)], [2] * 6)
        assert found.mAP == pytest.approx(1 / (right + 1)) and found.cmc[right] == 1 and not found.cmc[:right].any()


OPTIONS = dict(ap=st.sampled_from(['step', 'trapezoid']), unmatched=st.sampled_from(['skip', 'zero']),
               junk=st.sampled_from([(-1,), (), (-1, 2)]), max_rank=st.integers(1, 20),
               dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))


@settings(max_examples=300, deadline=None)
@given(case=rankings(), **OPTIONS)
def test_against_a_walk_down_each_list(case, ap, unmatched, junk, max_rank, dtype):
    distances, query, gallery = case
    call = dict(ap=ap, unmatched=unmatched, junk=junk, max_rank=max_rank)
    tensor = torch.tensor(distances, dtype=dtype)
    if unmatched == 'skip' and not any(walked(row, p, c, *gallery, junk, False)
                                       for row, p, c in zip(distances, *query, strict=True)):
        with pytest.raises(ValueError, match='no query has one'): evaluate(tensor, *query, *gallery, **call)
        return
    result = evaluate(tensor, *query, *gallery, **call)
    mAP, mINP, cmc, valid = reference(distances, query, gallery, **call)
    assert result.mAP == pytest.approx(mAP, abs=1e-12) and result.mINP == pytest.approx(mINP, abs=1e-12)
    assert result.cmc.tolist() == pytest.approx(cmc, abs=1e-12) and len(result.cmc) == max_rank
    assert result.valid_queries == valid == (~result.average_precisions.isnan()).sum()


@settings(max_examples=50, deadline=None)
@given(case=rankings())
def test_trapezoid_is_never_more_than_step(case):
    distances, query, gallery = case
    step, trapezoid = (evaluate(torch.tensor(distances), *query, *gallery, ap=ap, unmatched='zero')
                       for ap in ('step', 'trapezoid'))
    assert trapezoid.mAP <= step.mAP + 1e-12 and torch.equal(step.cmc, trapezoid.cmc)


def test_worked_values():
    gallery = [7, 7, 3, 7, 0, -1, 7], [1, 2, 1, 3, 2, 2, 4]  # own camera, match, wrong, match, distractor, junk, match
    step = evaluate(torch.arange(7.)[None], [7], [1], *gallery)
    trapezoid = evaluate(torch.arange(7.)[None], [7], [1], *gallery, ap='trapezoid')
    assert step.mAP == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert trapezoid.mAP == pytest.approx((1 + (1 / 2 + 2 / 3) / 2 + (2 / 4 + 3 / 5) / 2) / 3)
    assert step.mINP == pytest.approx(3 / 5) and step.cmc.tolist() == [1.] * 10
    counted = evaluate(torch.arange(7.)[None], [7], [1], *gallery, junk=())
    assert counted.mAP == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)


def test_a_person_of_another_camera_alone_is_left_out_not_the_camera():
    result = evaluate(torch.tensor([[0., 1., 2.]]), [1], [1], [2, 1, 1], [1, 1, 2])
    assert result.mAP == .5 and result.cmc.tolist()[:2] == [0, 1]


def test_ties_follow_the_gallery_for_every_dtype_and_zero_has_no_sign():
    gallery = [2] * 50 + [1] + [2] * 50, [2] * 101
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32):
        assert evaluate(torch.zeros(1, 101, dtype=dtype), [1], [1], *gallery).mAP == pytest.approx(1 / 51)
    signed = torch.cat([torch.zeros(50), torch.full((51,), -0.)])[None]
    assert evaluate(signed, [1], [1], *gallery).mAP == pytest.approx(1 / 51)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_extreme_distances_stay_before_what_is_left_out(dtype):
    big = torch.finfo(dtype).max
    distances = torch.tensor([[-big, big, big, torch.finfo(dtype).tiny]], dtype=dtype)
    result = evaluate(distances, [1], [1], [-1, 2, 1, 2], [1, 1, 2, 1])
    assert result.mAP == pytest.approx(1 / 3)


@pytest.mark.parametrize('Q,G', [(150, 1000), (3, 100_000)])  # 65 queries at once, and one
def test_many_queries_are_the_queries_one_by_one(Q, G):
    g = torch.Generator().manual_seed(0)
    distances, drawn = torch.rand(Q, G, generator=g), torch.randint(1, 5, (2 * (Q + G),), generator=g)
    query, gallery = drawn[:2 * Q].split(Q), drawn[2 * Q:].split(G)
    together = evaluate(distances, *query, *gallery)
    alone = [evaluate(distances[i:i + 1], query[0][i:i + 1], query[1][i:i + 1], *gallery) for i in range(Q)]
    assert together.average_precisions.tolist() == pytest.approx([a.mAP for a in alone], abs=1e-12)
    assert together.mINP == pytest.approx(np.mean([a.mINP for a in alone]), abs=1e-12)


def test_anything_that_holds_numbers_is_taken():
    plain = evaluate([[.1, .2]], [1], [1], [2, 1], [1, 2])
    arrays = evaluate(np.array([[.1, .2]]), np.array([1], np.int16), (1,), np.array([2, 1]), torch.tensor([1, 2]))
    graph = evaluate(torch.tensor([[.1, .2]], requires_grad=True), [1], [1], [2, 1], [1, 2])
    assert plain.mAP == arrays.mAP == graph.mAP == .5


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, '>i4', '>u8'])
def test_ids_of_every_width(dtype):
    distances, labels = torch.tensor([[.1, .2, .3]]), ([1], [1], [2, 1, 7], [1, 2, 3])
    arrays = [np.array(x, dtype) for x in labels]
    assert evaluate(distances, *arrays, junk=7).mAP == evaluate(distances, *labels).mAP == .5
    if not str(dtype).startswith('>'):
        assert evaluate(distances, *map(torch.from_numpy, arrays)).mAP == .5
    with pytest.raises(ValueError, match='query_ids must be below 2'):
        evaluate(distances, np.array([2**63], np.uint64), *labels[1:])


@pytest.mark.parametrize('junk', [2, (2,), [2, 9], {2}, np.array([2]), torch.tensor([2]), np.int64(2)])
def test_junk_in_every_form(junk):
    assert evaluate(torch.tensor([[.1, .2]]), [1], [1], [2, 1], [1, 2], junk=junk).mAP == 1


@pytest.mark.parametrize('junk', [-1, (), None])
def test_junk_that_is_not_there(junk):
    assert evaluate(torch.tensor([[.1, .2]]), [1], [1], [2, 1], [1, 2], junk=junk).mAP == .5
    with pytest.raises(TypeError, match='junk must be integers'): evaluate(*ONE, junk=[.5])


def test_ranks_cost_less_than_sorting():
    g = torch.Generator().manual_seed(0)
    distances, drawn = torch.rand(150, 15_913, generator=g), torch.randint(750, (16_063,), generator=g)
    def cpu(f):
        start = time.process_time()
        f()
        return time.process_time() - start
    ids, cameras = drawn.split([150, 15_913]), (drawn % 6).split([150, 15_913])
    ours = [cpu(lambda: evaluate(distances, ids[0], cameras[0] + 9, ids[1], cameras[1])) for _ in range(3)]
    sorting = [cpu(lambda: np.argsort(distances.numpy(), axis=1, kind='stable')) for _ in range(3)]
    assert min(ours) < min(sorting)


ONE = torch.tensor([[0., 1.]]), [1], [1], [1, 2], [2, 2]


def replaced(i, value): return [*ONE[:i], value, *ONE[i + 1:]]


@pytest.mark.parametrize('args,error,message', [
    (replaced(0, torch.zeros(2)), ValueError, r'distances must be \[Q, G\].*\(2,\)'),
    (replaced(0, torch.zeros(0, 2)), ValueError, 'distances'),
    (replaced(0, torch.zeros(1, 0)), ValueError, 'distances'),
    (replaced(0, torch.tensor([[0., float('nan')]])), ValueError, 'finite'),
    (replaced(0, torch.tensor([[0., float('inf')]])), ValueError, 'finite'),
    (replaced(0, torch.ones(1, 2).bool()), TypeError, 'distances'),
    (replaced(0, torch.ones(1, 2) * 1j), TypeError, 'distances'),
    (replaced(0, torch.ones(1, 2).to(torch.float8_e5m2)), TypeError, 'convert it to float32'),
    (replaced(1, [1, 1]), ValueError, r'query_ids must be \[1\]'),
    (replaced(2, [[1]]), ValueError, 'query_cameras'), (replaced(3, [1.5, 2.]), TypeError, 'gallery_ids'),
    (replaced(4, [True, False]), TypeError, 'gallery_cameras'), (replaced(4, [1]), ValueError, 'gallery_cameras')])
def test_bad_rankings(args, error, message):
    with pytest.raises(error, match=message): evaluate(*args)


@pytest.mark.parametrize('options', [dict(ap='area'), dict(unmatched='drop'), dict(max_rank=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))): evaluate(*ONE, **options)


def test_the_result_says_how_it_was_made():
    result = evaluate(torch.zeros(2, 3), [7, 8], [1, 1], [3, 7, 8], [1, 2, 1], unmatched='zero', ap='trapezoid',
                      max_rank=5)
    assert repr(result) == ('mAP 12.5 %, Rank-1 0.0 %, Rank-5 50.0 %, mINP 25.0 % '
                            '(1 of 2 queries, others count as 0; AP by trapezoid)')


# Names

@pytest.mark.parametrize('name,expected', [
    ('0002_c1s1_000451_03.jpg', (2, 1)), ('-1_c3s2_000001_00.jpg', (-1, 3)), ('0000_c6s3_094992_01.jpg', (0, 6)),
    ('0005_c2_f0046985.jpg', (5, 2)), ('1501_c12s1_000451_03.JPG', (1501, 12)), ('0002_c1_000451.jpeg', (2, 1)),
    ('run_2024_c1/0002_c3s1_000451_03.png', (2, 3)), ('/data/-1_c9/0007_c2s1_000001_01.jpg', (7, 2))])
def test_names(name, expected):
    assert parse_market_name(name) == expected


@pytest.mark.parametrize('name', [
    'Thumbs.db', '', 'x0002_c1s1_000451_03.jpg', '0002_c1s1_000451_03.jpg.txt', '0002_c1s1_000451_03', '0002c1.jpg',
    '-2_c1s1_000451_03.jpg', '0002_cxs1_000451_03.jpg', '0002_c1s1_000451_03.jpg\n', '٣_c1s1_000451_03.jpg',
    '0002_c1s1_000451_03.jpg/other', 'run_2024_c1/picture.jpg', '99999999999999999999_c1s1_000451_03.jpg'])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match='must look like 0002_c1s1_000451_03.jpg'): parse_market_name(name)


# Folders in the real format

TRAIN = ['0012_c1s1_000001_01.jpg', '0002_c1s1_000451_03.jpg', '0002_c12s1_000451_03.jpg', '0010_c2s1_000001_02.jpg']
QUERY = ['0001_c1s1_001051_00.jpg', '0003_c2s3_000076_00.jpg']
GALLERY = ['0001_c2s1_000301_01.jpg', '0001_c1s6_011741_02.jpg', '0003_c1s1_000001_01.jpg', '0000_c1s1_000151_01.jpg',
           '0000_c4s2_000151_02.jpg', '-1_c1s1_000401_03.jpg', '-1_c3s2_000401_03.jpg', '-1_c5s1_000401_04.jpg']


def fill(root, train=TRAIN, query=QUERY, gallery=GALLERY):
    for split, names in (('bounding_box_train', train), ('query', query), ('bounding_box_test', gallery)):
        (root/split).mkdir(parents=True)
        for i, name in enumerate(names): Image.new('RGB', (64, 128), (i, 50, 200)).save(root/split/name)
    return root


@pytest.fixture
def market(tmp_path): return fill(tmp_path/'run_2024_c1')


def test_market_folder(market):
    for split in ('query', 'bounding_box_test', 'bounding_box_train'): (market/split/'Thumbs.db').write_bytes(b'\xd0')
    (market/'readme.txt').write_text('not a split')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data = market_folder(market)
    assert data.train.persons.tolist() == [2, 2, 10, 12] and data.train.cameras.tolist() == [12, 1, 2, 1]
    assert data.gallery.persons.tolist() == [0, 0, 1, 1, 3] and data.junk == 3
    assert [p.name for p in data.query.paths] == QUERY and data.unmatched() == []
    assert all(images.persons.dtype == images.cameras.dtype == torch.int64 for images in (data.train, data.query))
    assert repr(data).splitlines() == [
        'run_2024_c1     ids   images  cameras', 'train             3        4        3',
        'query             2        2        2', 'gallery           3        5        3',
        'gallery: 2 images are distractors (ids: 1); 3 junk images left out']


def test_training_classes_are_the_sorted_persons(market):
    training = market_folder(market).training((32, 16))
    assert training.classes == ['2', '10', '12'] and training.train_targets.tolist() == [0, 0, 1, 2]
    assert training.train_images.shape == (4, 3, 32, 16) and training.test_targets.tolist() == [0, 1, 2]
    assert torch.equal(training.test_images, training.train_images[[0, 2, 3]])


def test_a_person_in_training_and_test_is_an_error(market):
    shutil.copy(market/'query'/QUERY[0], market/'bounding_box_train')
    with pytest.raises(ValueError, match=r'must not share persons, 1 are in both, such as \[1\]'): market_folder(market)


def test_queries_without_a_match_are_counted(market):
    (market/'bounding_box_test'/GALLERY[0]).unlink()
    with pytest.warns(UserWarning, match='1 of 2 queries have no match on another camera'): data = market_folder(market)
    assert data.unmatched() == [0]
    distances = torch.rand(2, len(data.gallery))
    assert evaluate(distances, *data.labels).valid_queries == 1


@pytest.mark.parametrize('split,name,message', [
    ('query', 'IMG_1234.jpg', 'query: 1 files are not named like.*IMG_1234.jpg'),
    ('bounding_box_train', '-1_c1s1_000401_03.jpg', 'train must hold persons ≥ 0, got -1'),
    ('bounding_box_train', '0000_c1s1_000401_03.jpg', r'not share persons, 1 are in both, such as \[0\]'),
    ('query', '-1_c1s1_000401_03.jpg', 'query must hold persons ≥ 0, got -1'),
    ('bounding_box_test', '0005_c2_f0046985.jpg', 'named as in DukeMTMC-reID, see duke_folder')])
def test_what_does_not_belong_is_an_error(market, split, name, message):
    (market/split/name).write_bytes(b'')
    with pytest.raises(ValueError, match=message): market_folder(market)


@pytest.mark.parametrize('clutter', ['._0002_c1s1_000451_03.jpg', 'desktop.ini', 'Desktop.ini', 'Thumbs.db',
                                     '.DS_Store', '.ipynb_checkpoints/0002_c1s1_000451_03.jpg', '@eaDir/a.jpg'])
def test_what_systems_leave_behind_is_passed_over(market, clutter):
    expected = repr(market_folder(market))
    for split in ('query', 'bounding_box_test', 'bounding_box_train'):
        (market/split/clutter).parent.mkdir(exist_ok=True)
        (market/split/clutter).write_bytes(b'\0\5\x16\7')
    assert repr(market_folder(market)) == expected


def test_ids_from_zero(tmp_path):
    root = fill(tmp_path/'zero', ['0002_c1_1.png', '0003_c1_1.png'], ['0000_c1_0.png', '0001_c2_0.png'],
                ['0000_c2_1.png', '0001_c1_1.png', '0004_c1_1.png', '0004_c2_1.png'])
    data = market_folder(root)
    assert data.unmatched() == [] and repr(data).splitlines()[-1] == (
        'gallery: 2 images are distractors (ids: 1); 0 junk images left out')
    assert evaluate(torch.tensor([[0., 1, 2, 3], [1, 0, 2, 3]]), *data.labels).mAP == 1
    trained = market_folder(fill(tmp_path/'trained', ['0000_c1_1.png', '0001_c1_1.png'], ['0002_c1_1.png'],
                                 ['0002_c2_1.png']))
    assert trained.training((8, 4)).classes == ['0', '1']


def test_each_split_may_number_its_people(tmp_path):
    root = fill(tmp_path/'own', ['0000_c1_1.png', '0001_c2_1.png'], ['0000_c1_0.png'],
                ['0000_c2_1.png', '0001_c1_1.png'])
    with pytest.raises(ValueError, match='2 are in both.*if each split has numbers of its own, say shared_ids=False'):
        market_folder(root)
    data = market_folder(root, shared_ids=False)
    assert data.train.persons.tolist() == [0, 1] and data.query.persons.tolist() == [0] and data.unmatched() == []


def test_cuhk03_np_is_two_folders_and_the_choice_is_named(tmp_path):
    for kind in ('labeled', 'detected'):
        fill(tmp_path/'cuhk03-np'/kind, ['0003_c1_21.png', '0003_c2_25.png'], ['0001_c1_1.png'], ['0001_c2_6.png'])
    with pytest.raises(FileNotFoundError, match='bounding_box_train is not a directory.*have one: detected, labeled'):
        market_folder(tmp_path/'cuhk03-np')
    data = market_folder(tmp_path/'cuhk03-np'/'labeled', cameras=2)
    assert data.train.persons.tolist() == [3, 3] and data.name == 'labeled'


def test_veri(tmp_path):
    root = tmp_path/'VeRi'
    for split, names in (('image_train', ['0001_c001_00016450_0.jpg', '0001_c020_00016460_0.jpg']),
                         ('image_query', ['0002_c002_00030600_0.jpg']),
                         ('image_test', ['0002_c002_00030600_0.jpg', '0002_c003_00084280_0.jpg'])):
        (root/split).mkdir(parents=True)
        for name in names: Image.new('RGB', (20, 16)).save(root/split/name)
        (root/f'name_{split[6:]}.txt').write_text('\n'.join(names))
    data = market_folder(root, cameras=20)
    assert data.train.cameras.tolist() == [1, 20] and data.gallery.persons.tolist() == [2, 2] and data.unmatched() == []
    assert evaluate(torch.tensor([[0., 1.]]), *data.labels).mAP == 1, 'the query itself is of the same camera'


MSMT = dict(list_train=['0000/0000_000_01_0303morning_0015_0.jpg 0', '0000/0000_001_14_0303morning_0020_1.jpg 0',
                        '0001/0001_000_03_0303noon_0012_2.jpg 1'],
            list_val=['0001/0001_001_05_0303noon_0013_2.jpg 1'],
            list_query=['0000/0000_000_01_0113morning_0001_0.jpg 0'],
            list_gallery=['0000/0000_004_15_0113afternoon_0007_0.jpg 0', '0001/0001_000_02_0113noon_0009_0_ex.jpg 1'])


@pytest.mark.parametrize('folders', [('train', 'test'), ('mask_train_v2', 'mask_test_v2')])
def test_msmt17(tmp_path, folders):
    root = tmp_path/'MSMT17_V1'
    for file, lines in MSMT.items():
        folder = root/folders['query' in file or 'gallery' in file]
        for line in lines:
            path = folder/line.split()[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (8, 16)).save(path)
        (root/f'{file}.txt').write_text('\n'.join([*lines, '']))
    data = market_folder(root, cameras=15)
    assert data.train.persons.tolist() == [0, 0, 1] and data.train.cameras.tolist() == [1, 14, 3]
    assert data.gallery.persons.tolist() == [0, 1] and data.gallery.cameras.tolist() == [15, 2]
    assert data.unmatched() == [] and data.training((8, 4)).classes == ['0', '1']
    assert evaluate(torch.tensor([[0., 1.]]), *data.labels).mAP == 1
    with pytest.raises(ValueError, match=r'have a camera outside 1\.\.14'): market_folder(root, cameras=14)
    with pytest.raises(FileNotFoundError, match='have one: MSMT17_V1'): market_folder(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match='1 files of list_gallery.txt are missing: 0001_000_02'): market_folder(root)
    (root/'list_query.txt').write_text('0000.jpg 0\n')
    with pytest.raises(ValueError, match=r'list_query\.txt, line 1: wanted a line such as'): market_folder(root)


def test_the_first_few_unknown_names_are_listed(market):
    for i in range(9): (market/'query'/f'x{i}.jpg').touch()
    (market/'query'/'folder').mkdir()
    with pytest.raises(ValueError, match='10 files .*: folder, x0.jpg, x1.jpg, …$'): market_folder(market)


def test_cameras_are_checked_when_their_number_is_given(market):
    assert market_folder(market, cameras=12).train.cameras.max() == 12
    with pytest.raises(ValueError, match=r'1 files have a camera outside 1\.\.6: 0002_c12s1'):
        market_folder(market, cameras=6)


def test_missing_and_empty_splits_are_named(market):
    for path in (market/'query').iterdir(): path.unlink()
    with pytest.raises(ValueError, match='query must hold images'): market_folder(market)
    (market/'query').rmdir()
    with pytest.raises(FileNotFoundError, match='query is not a directory'): market_folder(market)


def test_duke_needs_a_word_and_says_why(tmp_path):
    root = fill(tmp_path/'duke', ['0001_c2_f0046182.jpg'], ['0005_c2_f0046985.jpg'],
                ['0005_c5_f0051341.jpg', '0019_c8_f0055605.jpg'])
    with pytest.raises(ValueError, match='withdrawn by its authors in June 2019.*despite_withdrawal=True'):
        duke_folder(root)
    with pytest.raises(ValueError, match='withdrawn'): duke_folder(root, despite_withdrawal=1)
    data = duke_folder(root, despite_withdrawal=True)
    assert data.gallery.persons.tolist() == [5, 19] and data.junk == 0


# Pictures

def test_pictures_in_memory_and_on_disk_are_the_same(market):
    images = market_folder(market).train
    here, there = images.pixels((32, 16)), images.pixels((32, 16), budget=0)
    assert isinstance(there, ImageFiles) and here.dtype == torch.uint8 and here.shape == there.shape == (4, 3, 32, 16)
    assert torch.equal(there[torch.tensor([3, 1])], here[[3, 1]])
    for picture, path in zip(here, images.paths, strict=True):  # of one colour, as JPEG keeps it
        assert picture.flatten(1).unique(dim=1)[:, 0].tolist() == list(Image.open(path).getpixel((0, 0)))
    grey = images.pixels((32, 16), channels=1)
    assert grey.shape == (4, 1, 32, 16)
    with pytest.raises(ValueError, match='channels must be 1 or 3'): images.pixels(channels=4)


def test_a_picture_is_squeezed_not_cropped(tmp_path):
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, :20] = 255
    Image.fromarray(wide).save(tmp_path/'a.png')
    half = ImageFiles([tmp_path/'a.png'], (20, 10), channels=1, crop=False)[0][0]
    assert half.shape == (20, 10) and half[:, :4].eq(255).all() and half[:, 6:].eq(0).all()
    (tmp_path/'a.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match='a.png is not readable'): ImageFiles([tmp_path/'a.png'], 8)[0]


# Batches of people

@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(1, 23), min_size=1, max_size=12), people=st.integers(1, 6),
       images=st.integers(1, 5), seed=st.integers(0, 9))
def test_batches_are_of_p_persons_and_k_images(counts, people, images, seed):
    persons = np.random.RandomState(seed).permutation(np.repeat(np.arange(len(counts)) * 3 + 1, counts))
    if len(counts) < people:
        with pytest.raises(ValueError, match='people must be at most'): PKSampler(persons, people, images, seed)
        return
    sampler = PKSampler(torch.tensor(persons), people, images, seed)
    groups, batches = [max(1, n // images) for n in counts], list(sampler)
    best = max(b for b in range(sum(groups) + 1) if sum(min(g, b) for g in groups) >= people * b)
    assert len(sampler) == len(batches) == best
    of = dict(zip((np.arange(len(counts)) * 3 + 1).tolist(), counts, strict=True))
    uses = np.bincount(np.concatenate(batches), minlength=len(persons))
    for batch in batches:
        found, times = np.unique(persons[batch], return_counts=True)
        assert len(found) == people and (times == images).all()
        for person in found:
            shown = {i for i in batch if persons[i] == person}
            assert len(shown) == min(images, of[person]), 'an image repeats though there are others'
    assert all(uses[persons == p].max() <= 1 for p, n in of.items() if n >= images)


def test_epochs_differ_seeds_differ_and_nothing_is_lost_for_good():
    persons = torch.arange(10).repeat_interleave(torch.tensor([5, 7, 2, 9, 4, 6, 5, 1, 8, 5]))
    torch.manual_seed(3), np.random.seed(3)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    sampler, same, other = PKSampler(persons, 3, 4, 1), PKSampler(persons, 3, 4, 1), PKSampler(persons, 3, 4, 2)
    first, second = list(sampler), list(sampler)
    assert first == list(same) != second == list(same) and first != list(other)
    same.set_epoch(0)
    assert list(same) == first
    seen = {i for _ in range(60) for batch in sampler for i in batch}
    assert seen == set(range(len(persons)))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002


@pytest.mark.parametrize('args,message', [
    (([1, 2], 0, 1), 'people must be ≥ 1'), (([1, 2], 1, 0), 'images'),
    (([[1, 2]], 1, 1), 'persons'),
    (([1, 1, 2], 3, 1), 'at most 2')])
def test_bad_samplers(args, message):
    with pytest.raises(ValueError, match=message): PKSampler(*args)
    with pytest.raises(TypeError, match='persons must be integers'): PKSampler([1., 2.], 1, 1)
    with pytest.raises(TypeError, match='images'): PKSampler([1, 2], 1, 1.5)


# The network, on glyphs

@pytest.fixture(scope='module')
def glyphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('glyphs')/'g'
    return market_folder(write_glyph_market(folder, identities=80, distractors=5, junk=9))


@pytest.fixture(scope='module')
def training(glyphs): return glyphs.training((28, 28), channels=1)


def test_pk_batches_in_a_learner(training):
    dls = pk_dataloaders(training, people=6, images=3, augment=RandomAffine(1))
    looked = dls.one_batch()[1]
    batches = [y for _, y in dls.train]
    assert torch.equal(looked, batches[0]) and len(batches) == len(dls.train) == 2 * 40 // 6
    assert all(y.unique(return_counts=True)[1].tolist() == [3] * 6 for y in batches)
    once = dls.train.new(shuffle=False, drop_last=False)
    assert torch.equal(torch.cat([y for _, y in once]), training.train_targets)
    learn = reid_learner(dls, ConvBody(widths=(8, 8)), CosFaceLoss(20., .1), lr=1e-2)
    quiet(learn, learn.fit, 2)
    assert dls.train.sampler.epoch == 3 and torch.stack(learn.recorder.losses).isfinite().all()
    predictions, targets = quiet(learn, learn.get_preds, 0)
    assert len(predictions) == 240 and torch.equal(targets, training.train_targets)


@pytest.mark.parametrize('loss,head', [(NormFaceLoss(20.), MarginHead), (CrossEntropyLossFlat(), nn.Linear)])
def test_the_shift_of_the_neck_stays_zero(training, loss, head):
    learn = reid_learner(training.dataloaders(64, seed=0), ConvBody(widths=(8, 8)), loss, embedding=12, wd=.1)
    neck = learn.model[1][-1]
    assert type(learn.model[2]) is head and getattr(learn.model[2], 'bias', None) is None
    assert type(neck) is BNNeck and 'bias' not in dict(neck.named_parameters())
    learn.freeze()
    learn.unfreeze()
    quiet(learn, learn.fit, 1, 1e-2)
    assert not neck.bias.any() and (neck.weight != 1).all() and neck.running_mean.any()
    assert learn.model.state_dict()['1.3.bias'].tolist() == [0.] * 12
    neck.train()
    assert neck(torch.rand(50, 12) + 5).mean(0).abs().max() < 1e-5


def test_a_linear_head_starts_near_zero_and_a_body_is_a_module(training):
    dls = training.dataloaders(64, seed=0)
    learn = reid_learner(dls, ConvBody(widths=(8, 8)), CrossEntropyLossFlat())
    assert 5e-4 < learn.model[2].weight.std() < 2e-3
    with pytest.raises(TypeError, match='body must be an nn.Module, got function'):
        reid_learner(dls, resnet18, CrossEntropyLossFlat())


def test_features_are_what_the_head_sees(glyphs, training):
    learn = reid_learner(training.dataloaders(64, seed=0), ConvBody(widths=(8, 8)), NormFaceLoss(20.))
    quiet(learn, learn.fit, 1, 1e-2)
    learn.model.train()
    query = glyphs.query.pixels((28, 28), 1)
    features = embed(learn, query)
    learn.model.eval()
    (x,), = list(learn.dls.test_dl(query))
    with torch.no_grad(): cosines = learn.model(x)
    assert torch.allclose(features @ F.normalize(learn.model[2].weight.detach()).T, cosines.as_subclass(torch.Tensor),
                          atol=1e-5)
    assert torch.allclose(features.norm(dim=1), torch.ones(len(query)), atol=1e-6)
    assert torch.equal(embed(learn, glyphs.query.pixels((28, 28), 1, budget=0)), features)


def test_cosine_distances_rank_as_euclidean_ones_of_unit_vectors():
    torch.manual_seed(0)
    x, y = torch.randn(6, 9), 100 * torch.randn(7, 9)
    distances = cosine_distances(x, y)
    assert torch.allclose(distances, torch.cdist(F.normalize(x), F.normalize(y))**2 / 2, atol=1e-5)


def test_features_of_zeros_are_like_nobody_and_tiny_ones_like_others():
    x, y = torch.randn(3, 8), torch.randn(4, 8)
    x[1], y[2] = 0, 0
    with pytest.warns(UserWarning, match='1 of [34] (query|gallery) are zero'): distances = cosine_distances(x, y)
    assert (distances[1] == 1).all() and (distances[:, 2] == 1).all()
    whole = x[::2]
    def unit(z): return z.double() / z.double().norm(dim=1, keepdim=True)
    for scale in (1e-38, 1e-40, 1e37):
        tiny = whole * scale
        expected = unit(tiny) @ unit(y[:2]).T
        assert torch.allclose(1 - cosine_distances(tiny, y[:2]).double(), expected, atol=1e-6)


@pytest.mark.parametrize('value', [0., 1.])
def test_a_dead_network_is_said_to_be_one(glyphs, training, value):
    class Dead(nn.Module):
        def forward(self, x): return torch.full((len(x), 4), value, requires_grad=True)
    learn = reid_learner(training.dataloaders(64, seed=0), ConvBody(widths=(8, 8)), NormFaceLoss(20.))
    learn.model = nn.Sequential(Dead(), nn.Identity(), nn.Identity())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(DeadNetwork, match='the network is dead'):
            embed(learn, glyphs.query.pixels((28, 28), 1))


def test_resnet_without_the_last_stride_and_with_the_users_weights(tmp_path):
    torch.manual_seed(0)
    published = resnet50()
    torch.save(published.state_dict(), tmp_path/'resnet50.pth')
    body = resnet50_body(tmp_path/'resnet50.pth').eval()
    assert torch.equal(body[0].weight, published.conv1.weight)
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        assert body(x).shape == (1, 2048, 4, 2)
        early = nn.Sequential(*list(published.eval().children())[:-3])
        assert torch.equal(body[:-1](x), early(x))
    torch.save(resnet18().state_dict(), tmp_path/'other.pth')
    with pytest.raises(ValueError, match="other.pth does not hold the weights of torchvision's resnet50"):
        resnet50_body(tmp_path/'other.pth')
    for content in (b'not weights', b'', b'PK\x03\x04 half a zip'):
        (tmp_path/'text.pth').write_bytes(content)
        with pytest.raises(ValueError, match="text.pth does not hold the weights"): resnet50_body(tmp_path/'text.pth')


class Malice:
    "A pickle that acts when it is opened."
    def __reduce__(self): return (open, ('/nonexistent/harmed', 'w'))


def test_weights_are_never_unpickled(tmp_path):
    (tmp_path/'weights.pth').write_bytes(pickle.dumps(Malice()))
    with pytest.raises(ValueError, match='weights.pth'): resnet50_body(tmp_path/'weights.pth')
    with pytest.raises(FileNotFoundError): resnet50_body(tmp_path/'nowhere.pth')


def test_end_to_end_on_glyphs(glyphs, training):
    query, gallery = (images.pixels((28, 28), 1) for images in (glyphs.query, glyphs.gallery))
    raw = evaluate(cosine_distances(query.flatten(1).float(), gallery.flatten(1).float()), *glyphs.labels)
    def run():
        torch.manual_seed(0)
        learn = reid_learner(training.dataloaders(32, seed=0), ConvBody(widths=(16, 32, 64)), LMSoftmaxLoss(20.))
        quiet(learn, learn.fit_one_cycle, 20, 1e-2)
        return evaluate(cosine_distances(embed(learn, query), embed(learn, gallery)), *glyphs.labels)
    first, again = run(), run()
    assert first.mAP > raw.mAP + .02 and first.valid_queries == 40
    assert first.mAP == again.mAP and torch.equal(first.average_precisions, again.average_precisions)


# Pictures of results

def test_cmc_curves():
    result = evaluate(torch.zeros(2, 3), [7, 8], [1, 1], [3, 7, 8], [1, 2, 2], max_rank=4)
    ax = plot_cmc({'a': result, 'b': result})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ['a', 'b']
    assert ax.lines[0].get_ydata().tolist() == [0, 50, 100, 100] and ax.lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    assert ax.lines[0].get_marker() != ax.lines[1].get_marker()


def test_the_ranked_gallery_shows_and_marks_the_ranking(market):
    data = market_folder(market)  # the gallery is 0 c1, 0 c4, 1 c1, 1 c2, 3 c1
    distances = torch.tensor([[4., 3., 0., 2., 1.], [0., 1., 2., 3., 4.]])
    axes = plot_ranked_gallery(data, distances, [0], top=6)
    titles = [ax.get_title() for ax in axes[0] if ax.axison]
    assert titles == ['query, c1', '✗ 3, c1', '✓ 1, c2', '✗ 0, c4', '✗ 0, c1']
    for ax in axes[0, 1:5]:
        right, spine = ax.get_title().startswith('✓'), ax.spines['left']
        assert spine.get_edgecolor() == plt.matplotlib.colors.to_rgba(BLUE if right else ORANGE)
        assert spine.get_linestyle() == ('-' if right else '--')
    assert axes[0, 2].images[0].get_array().shape == (128, 64, 3)
    assert plot_ranked_gallery(data, distances, range(2), top=2).shape == (2, 3)
    with pytest.raises(ValueError, match=r'queries must be in 0\.\.1'): plot_ranked_gallery(data, distances, [2])
    with pytest.raises(ValueError, match=r'gallery_ids must be \[4\]'): plot_ranked_gallery(data, distances[:, :4])
