"Every loader on real files or small ones in the same format, every kind of damage, and the batches."
import gzip
import hashlib
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from fastai.distributed import DistributedDL
from PIL import Image
from torchvision import datasets
from torchvision.transforms.functional import InterpolationMode, rotate

from largest_margins import data as module
from largest_margins.data import (
    ImageData,
    ImageFiles,
    RandomAffine,
    image_folder,
    imbalanced_counts,
    imbalanced_indices,
    load,
    rotate_images,
)

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
    head = bytes([0, 0, 8, array.ndim]) + b''.join(n.to_bytes(4) for n in array.shape)
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
    raw = pickle.loads((root/cifar[2]).read_bytes())['data']
    assert np.array_equal(data.train_images[:4].numpy().reshape(4, -1), raw)


class Malice:
    "A pickle that acts when it is opened."
    def __reduce__(self): return (open, ('/nonexistent/harmed', 'w'))


def test_a_changed_pickle_is_never_opened(cifar):
    name, root, path = cifar
    path.write_bytes(pickle.dumps(Malice()))
    with pytest.raises(ValueError, match=f'{path.name}.*MD5'): load(name, root)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name): load(name, root)


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
    assert set(module.DATASETS) == {'digits', 'mnist_5k', 'fashion_mnist', 'mnist', 'cifar10', 'cifar100'}
