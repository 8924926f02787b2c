"""What a GPU would do, tested without one.

Fake CUDA tensors know shapes, dtypes and devices, and run forward, where our gradients are made. FakeTensorMode raises
where a value would have to be known or where devices do not match; `NoCopies` raises where something would be copied
between host and GPU, for which the host waits.
"""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loss_family import ON_COSINES, ignoring
from processes import interpret, returned, run_alone, run_on_ranks
from torch import distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import largest_margins.data as data_module
from largest_margins import checks, losses, margins
from largest_margins.callbacks import MarginModel
from largest_margins.data import ImageDataset, ImageLoader, RandomAffine, load
from largest_margins.engine import fused, shards
from largest_margins.engine.cosines import cosine_matrix
from largest_margins.heads import CosineLinear, MarginHead, ShardedMarginHead
from largest_margins.learner import _SmoothLoss, margin_learner, margin_neck
from largest_margins.losses import AdaFaceLoss, CosFaceLoss, GMSoftmaxLoss
from largest_margins.margins import class_margin, class_sample_margins, min_sample_margin, norm_ratio, sample_margins
from largest_margins.regularizers import zero_centroid
from largest_margins.training.bodies import ConvBody

GPU_CHECK = Path(__file__).parent.parent/'benchmarks'/'gpu.py'
N, D, K = 7, 3, 4
ENGINES = {'linear': lambda loss: lambda z, w, y: loss.linear(z, w, y),
           'in chunks': lambda loss: lambda z, w, y: loss.linear(z, w, y, chunk_size=3),
           'dense': lambda loss: lambda z, w, y: loss(cosine_matrix(z, w), y),
           'matrix': lambda loss: lambda z, w, y: loss(z @ w.T, y)}
WEIGHT = torch.linspace(.2, 2, K)
OPTIONS = {'plain': {}, 'none': {'reduction': 'none', 'prior': [1., 2., 3., 4.]},
           'all': {'weight': WEIGHT, 'reduction': 'class-mean', 'sample_margin': .5}}


def possible(row, given):
    "What of these options a loss has."
    given = dict(given)
    if row.name == 'R_sm': given.pop('sample_margin', None)
    if row.name == 'R_sm' or 'prior' in row.name: given.pop('prior', None)
    return given


CASES = [pytest.param(row, possible(row, given), id=f'{row.name}, {name}')
         for row in ON_COSINES for name, given in OPTIONS.items()]


class NoCopies(TorchDispatchMode):
    "Refuses what copies between host and GPU: `.cpu()`, `.to('cuda')`, `torch.tensor(…, device='cuda')`."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
        if 'copy' in func.__name__ and len({x.device.type for x in tensors}) > 1:
            raise AssertionError(f'{func} copies between host and GPU')
        return result


@pytest.fixture
def fake(monkeypatch):
    """Fake CUDA, to be entered when the losses are made, for these look at the values of their arguments.

    The engine of autograd wants a real GPU, so here it answers with slopes of the right shape and device.
    """
    monkeypatch.setattr(torch.autograd, 'grad', lambda outputs, inputs, *_, **__: [torch.ones_like(x) for x in inputs])
    return FakeTensorMode(allow_non_fake_inputs=True)


def batch(dtype=torch.float32):
    "Fake features, prototypes and targets on the GPU."
    leaves = [torch.rand(rows, D, device='cuda', dtype=dtype, requires_grad=True) for rows in (N, K)]
    return *leaves, torch.zeros(N, dtype=torch.long, device='cuda')


def on_gpu(x): return x.device.type == 'cuda'


# --- device placement ---

def test_the_guard_sees_what_it_must(fake):
    with fake:
        x = torch.rand(3, device='cuda')
        for copies in (lambda: torch.tensor([1.], device='cuda'), lambda: x.new_tensor(2.), lambda: x.cpu(),
                       lambda: torch.ones(3).to(x), lambda: torch.as_tensor(1., device='cuda'),
                       lambda: x.copy_(torch.ones(3))):
            with NoCopies(), pytest.raises(AssertionError, match='copies between host and GPU'): copies()
        with NoCopies(), pytest.raises(DataDependentOutputException): bool(x[0] > 0)
        with NoCopies(): assert on_gpu(torch.where(x > 0, x, 1).double() + x.new_full((), 2.))


@torch.no_grad()
def sent_back(value):
    "What the last steps hand over on the way back; autograd's own engine wants a real GPU."
    slopes, steps = value.grad_fn.apply(torch.ones_like(value)), value.grad_fn.next_functions
    found = zip(slopes[-len(steps):], steps, strict=True)
    return [then(x) if then and 'ToCopy' in then.name() else x for x, (then, _) in found if x is not None]


@pytest.mark.parametrize(('row', 'given'), CASES)
def test_losses_and_gradients(fake, row, given):
    "The value on each engine; gradients made in forward, handed over by backward, and made again by a second one."
    loss = row.make(20., range(K), **given)
    with fake:
        loss.to('cuda')
        features, prototypes, targets = batch()
        with NoCopies():
            for name, engine in ENGINES.items():
                value = engine(loss)(features, prototypes, targets)
                assert on_gpu(value) and value.requires_grad and value.dtype == torch.float32
                assert value.shape == ((N,) if loss.reduction == 'none' else ())
                if name in ('linear', 'in chunks'):
                    for _ in range(2):
                        found = sent_back(value)
                        assert [x.shape for x in found] == [(N, D), (K, D)] and all(map(on_gpu, found))
                with torch.no_grad(): assert not engine(loss)(features, prototypes, targets).requires_grad


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(fake, dtype):
    with fake:
        features, prototypes, targets = batch(dtype)
        with NoCopies():
            value = CosFaceLoss().linear(features, prototypes, targets, chunk_size=3)
            found = sent_back(value)
    assert value.dtype == torch.float32 and all(on_gpu(x) and x.dtype == dtype for x in found)


def test_numbers_for_each_sample(fake):
    with fake:
        features, prototypes, targets = batch()
        alpha = torch.rand(N, device='cuda', requires_grad=True)
        with NoCopies():
            value = GMSoftmaxLoss().linear(features, prototypes, targets, alpha1=alpha, chunk_size=3)
            assert [x.shape for x in sent_back(value)] == [(N, D), (K, D), (N,)]
            assert on_gpu(GMSoftmaxLoss()(features @ prototypes.T, targets, alpha1=alpha))


def test_what_a_loss_measures_itself(fake):
    "AdaFace's statistics and margins stay on the GPU."
    ada = AdaFaceLoss()
    with fake:
        ada.to('cuda')
        features, prototypes, targets = batch()
        with NoCopies():
            value = ada.linear(features, prototypes, targets)
            assert on_gpu(value) and on_gpu(ada.norm_mean) and all(map(on_gpu, sent_back(value)))


@pytest.mark.parametrize('given', [{}, {'weight': WEIGHT}, {'reduction': 'class-mean'}])
def test_focal_loss(fake, given):
    loss = losses.FocalLoss(**given)
    with fake:
        loss.to('cuda')
        features, prototypes, targets = batch()
        with NoCopies(): assert on_gpu(loss(features @ prototypes.T, targets))


def test_margins_and_heads(fake):
    with fake:
        features, prototypes, targets = batch()
        head, many = CosineLinear(D, K, device='cuda'), MarginHead(D, 2**20, CosFaceLoss(), device='cuda')
        with NoCopies():
            cosines, value = head(features), many(features, targets)
            assert cosines.shape == (N, K) and value.shape == () and many(features).shape == (N, 2**20)
            assert [x.shape for x in sent_back(value)] == [(N, D), (2**20, D)]
            found = [cosines, value, class_margin(prototypes), norm_ratio(prototypes), zero_centroid(prototypes),
                     *many.top(features, 2), many.sample_margins(features, targets),
                     class_margin(torch.rand(2100, D, device='cuda'))]  # the last in several tiles
            found += [f(cosines, targets) for f in (sample_margins, class_sample_margins, min_sample_margin)]
    assert all(map(on_gpu, found))


# --- a training step ---

def test_images_stay_on_the_gpu_and_batches_are_made_there(fake):
    images = torch.randint(0, 255, (64, 3, 8, 8), dtype=torch.uint8)
    data = ImageDataset(images, torch.arange(64) % K, list('abcd'), torch.ones(3), torch.ones(3))
    with fake:
        loader = ImageLoader(data, bs=16, shuffle=True, augment=RandomAffine(2, True, 10.), device=torch.device('cuda'))
        assert on_gpu(loader.dataset.images) and on_gpu(loader.dataset.targets) and not on_gpu(data.images)
        batches = iter(loader)
        next(batches)
        with NoCopies(): assert all(on_gpu(x) and on_gpu(y) for x, y in batches)


def test_too_many_images_are_pinned(fake, monkeypatch):
    monkeypatch.setattr(data_module, 'MOST_PLACED', 100)
    pinned = []
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda x: pinned.append(x) or x)
    data = ImageDataset(torch.zeros(6, 1, 8, 8).byte(), torch.arange(6) % K, list('abcd'), torch.ones(1), torch.ones(1))
    with fake:
        loader = ImageLoader(data, bs=3, device=torch.device('cuda'))
        x, y = next(iter(loader))
    assert not on_gpu(loader.dataset.images) and on_gpu(x) and on_gpu(y) and len(pinned) == 2


def test_a_step_and_its_smoothed_loss_do_not_wait(fake):
    with fake, torch.device('cuda'):
        model = MarginModel(ConvBody(1, (4, 8)), margin_neck((2, 8, 2, 2), D)[0], MarginHead(D, K, CosFaceLoss()))
        model.mixed_precision, smooth = True, _SmoothLoss()
        x, y = torch.rand(N, 1, 8, 8), torch.zeros(N, dtype=torch.long)
        with NoCopies():
            value = model(x, y)
            smooth.accumulate(SimpleNamespace(loss=value))
        assert on_gpu(value) and on_gpu(smooth.val)


def test_the_layout_of_a_body_elsewhere():
    dls = load('digits').dataloaders(64, device='meta')
    learn = margin_learner(dls, ConvBody(), CosFaceLoss())
    assert learn.model[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not learn.model.mixed_precision


# --- a mismatch is said clearly ---

@pytest.mark.parametrize('row', ON_COSINES, ids=repr)
def test_targets_elsewhere(fake, row):
    loss, on_cpu = row.make(20., range(K)), row.make(20., range(K))
    with fake:
        loss.to('cuda')
        features, prototypes, targets = batch()
        for engine in ENGINES.values():
            with pytest.raises(ValueError, match='^targets must be on cuda:0, got cpu'):
                engine(loss)(features, prototypes, torch.zeros(N, dtype=torch.long))
            with pytest.raises(ValueError, match='^targets must be on cpu, got cuda:0'):
                engine(on_cpu)(torch.rand(N, D), torch.rand(K, D), targets)


def test_prototypes_elsewhere(fake):
    with fake:
        features, prototypes, targets = batch()
        for engine in ('linear', 'dense'):
            for pair, where in (((features, prototypes.cpu()), 'cuda:0, got cpu'),
                                ((features.cpu(), prototypes), 'cpu, got cuda:0')):
                with pytest.raises(ValueError, match=f'^prototypes must be on {where}'):
                    ENGINES[engine](CosFaceLoss())(*pair, targets)
        with pytest.raises(ValueError, match='^prototypes must be on cuda:0, got cpu'): CosineLinear(D, K)(features)


def test_buffers_elsewhere(fake):
    made = [(CosFaceLoss(weight=WEIGHT), 'weight'), (losses.LDAMLoss([5, 6, 7, 8]), 'class_counts'),
            (GMSoftmaxLoss(alpha1=WEIGHT), 'alpha1'), (losses.SampleMarginLoss(weight=WEIGHT), 'weight')]
    focal = losses.FocalLoss(weight=WEIGHT)
    with fake:
        features, prototypes, targets = batch()
        for loss, name in made:
            for engine in ENGINES.values():
                with pytest.raises(ValueError, match=f'^{name} must be on cuda:0, got cpu'):
                    engine(loss)(features, prototypes, targets)
        with pytest.raises(ValueError, match='^weight must be on cuda:0, got cpu'):
            focal(features @ prototypes.T, targets)


class WithSlope:
    "GM-Softmax, with slopes for each sample that are on the CPU."

    def linear(self, *args, **given): return GMSoftmaxLoss().linear(*args, alpha1=torch.ones(N), **given)

    def __call__(self, *args): return GMSoftmaxLoss()(*args, alpha1=torch.ones(N))


def test_numbers_and_margins_elsewhere(fake):
    with fake:
        features, prototypes, targets = batch()
        for engine in ENGINES:
            with pytest.raises(ValueError, match='^alpha1 must be on cuda:0, got cpu'):
                ENGINES[engine](WithSlope())(features, prototypes, targets)
        with pytest.raises(ValueError, match='^targets must be on cuda:0, got cpu'):
            sample_margins(features @ prototypes.T, torch.zeros(N, dtype=torch.long))


# --- classes shared out ---

@pytest.fixture
def three_ranks():
    "A process group that carries nothing; this is its second process."
    dist.init_process_group('fake', store=FakeStore(), rank=1, world_size=3)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('row', ON_COSINES, ids=repr)
def test_a_sharded_head_reads_no_sizes(three_ranks, fake, row):
    "The head knows its shards, so no value has to come back from the GPU."
    classes = [*range(K), *range(K)]
    heads = [ShardedMarginHead(D, 2 * K, row.make(20., classes, **given)) for given in (
        {}, {'reduction': 'class-mean'}, {'weight': WEIGHT.repeat(2)})]
    with fake:
        for head in heads: head.to('cuda')
        features, _, targets = batch()
        with NoCopies():
            for head in heads:
                value = head(features, targets)
                assert on_gpu(value) and [x.shape for x in sent_back(value)] == [(3 * N, D), (3, D)]
            assert head(features).shape == (N, 2 * K) and head.sample_margins(features, targets).shape == (N,)
            assert head.top(features, 2)[1].shape == (N, 2)


@pytest.fixture
def unread(monkeypatch):
    "No value is looked at, as on a GPU."
    for module in (checks, fused, losses, margins, shards):
        monkeypatch.setattr(module, 'values_are_cheap', lambda x: False)


def value_and_gradients(function, features, prototypes, targets):
    leaves = [x.clone().requires_grad_() for x in (features, prototypes)]
    value = function(*leaves, targets)
    value.sum().backward()
    return [value.detach(), *(x.grad for x in leaves)]


def distance(got, true): return max(((g - t).norm() / t.norm()).item() for g, t in zip(got, true, strict=True))


@pytest.mark.parametrize(('row', 'given'), CASES)
def test_the_numbers_of_the_way_that_a_gpu_takes(unread, row, given):
    "What is skipped or done otherwise where values are not looked at changes no result; some samples do not count."
    generator = torch.Generator().manual_seed(0)
    features, prototypes = (10 * torch.randn(rows, D, generator=generator, dtype=torch.float64) for rows in (N, K))
    targets = ignoring(torch.randint(K - 1, (N,), generator=generator))
    loss = row.make(20., range(K), **given)
    got, chunked, true = (value_and_gradients(ENGINES[engine](loss), features, prototypes, targets)
                          for engine in ('linear', 'in chunks', 'dense'))
    assert distance(got, true) < 1e-13 and distance(chunked, true) < 1e-13


@pytest.mark.parametrize('size', [1e-40, 1e-30, 1e30, 1e38, 0.])
def test_extreme_rows_on_the_way_that_a_gpu_takes(unread, size):
    torch.manual_seed(0)
    features, prototypes, targets = torch.randn(N, D), torch.randn(K, D), torch.arange(N) % K
    features[0] = torch.nn.functional.normalize(features[0], dim=0) * size
    prototypes[1] = torch.nn.functional.normalize(prototypes[1], dim=0) * size
    for loss in (CosFaceLoss(), losses.ArcFaceLoss(sample_margin=.5), losses.LMSoftmaxLoss(100.), AdaFaceLoss()):
        for linear in (loss.linear, lambda *a, loss=loss: loss.linear(*a, chunk_size=3)):
            value, *slopes = value_and_gradients(linear, features, prototypes, targets)
            assert value.isfinite() and not any(x.isnan().any() for x in slopes)


def without_a_header(rank, ranks):
    "The largest difference to one process, and how many times a value was looked at."
    generator = torch.Generator().manual_seed(0)
    features, prototypes = (torch.randn(rows, D, generator=generator, dtype=torch.float64) for rows in (ranks * N, 5))
    targets = torch.randint(5, (ranks * N,), generator=generator)
    loss = CosFaceLoss(16., sample_margin=.5)
    true = value_and_gradients(loss.linear, features, prototypes, targets)
    for module in (checks, fused, losses, margins, shards): module.values_are_cheap = lambda x: False
    head = ShardedMarginHead(D, 5, loss, averaged=False, dtype=torch.float64)
    mine, shard = slice(rank * N, (rank + 1) * N), slice(head.shards.first, head.shards.first + head.shards.size)
    with torch.no_grad(): head.weight.copy_(prototypes[shard])
    read = []
    to_list, item = torch.Tensor.tolist, torch.Tensor.item
    torch.Tensor.tolist = lambda x: read.append(x) or to_list(x)
    torch.Tensor.item = lambda x: read.append(x) or item(x)
    leaf = features[mine].clone().requires_grad_()
    value = head(leaf, targets[mine])
    value.backward()
    got = [value.detach(), leaf.grad, head.weight.grad]
    count = len(read)
    return distance(got, [true[0], true[1][mine], true[2][shard]]), count


def test_ranks_that_read_no_header():
    for error, read in returned(run_on_ranks(without_a_header, 2, 2)): assert error < 1e-13 and read == 0


# --- the command ---

def run(*arguments):
    return run_alone(interpret, GPU_CHECK, *arguments, CUDA_VISIBLE_DEVICES='')


def test_without_a_gpu_it_claims_nothing(tmp_path):
    before = sorted(GPU_CHECK.parent.rglob('*.json'))
    for arguments in ('--out', tmp_path/'gpu.json'), ():
        status, printed = run(*arguments)
        assert status == 0 and 'No GPU' in printed and printed.count('\n') == 1
    assert not list(tmp_path.iterdir()) and sorted(GPU_CHECK.parent.rglob('*.json')) == before


def test_the_same_checks_on_a_cpu(tmp_path):
    status, printed = run('--device', 'cpu', '--quick', '--out', tmp_path/'cpu.json')
    assert status == 0, printed
    found = json.loads((tmp_path/'cpu.json').read_text())
    assert found['right'] and found['left out'] == [] and found['device'] and found['torch'] == torch.__version__
    assert len(found['correctness']) >= 20 and all(row['right'] for row in found['correctness'])
    assert {row['row'] for row in found['training']} == {'ArcFace', 'LM-Softmax', 'LDAM'}
    assert all(row['milliseconds'] > 0 for row in found['time'])
    assert len({row['row'] for row in found['study']}) == 5 and all(row['accuracy'] > 0 for row in found['study'])
    assert {'cross-entropy', 'ours, ArcFace', 'metric-learning ArcFace'} <= {row['row'] for row in found['time']}
    assert 'no sync' not in found  # a CPU says nothing about that
    assert [p.name for p in tmp_path.iterdir()] == ['cpu.json']


def test_without_time_it_measures_nothing_and_says_so(tmp_path):
    "A quarter of a minute is kept back for what is not measured."
    status, printed = run('--device', 'cpu', '--quick', '--minutes', '.25', '--out', tmp_path/'cpu.json')
    assert status == 0, printed
    found = json.loads((tmp_path/'cpu.json').read_text())
    assert any('time' in row for row in found['left out']) and 'time' not in found
