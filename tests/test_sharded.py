"Classes shared out among processes: the same value and the same gradients as in one, and no hang when one fails."
import math
import os
import time

import pytest
import torch
from loss_family import ON_COSINES, SMOOTHABLE
from processes import returned, run_on_ranks
from torch import distributed as dist

from largest_margins.chunked import LazyCosines
from largest_margins.losses import (
    ArcFaceLoss, GMSoftmaxLoss, LMSoftmaxLoss, NormFaceLoss, SampleMarginLoss)
from largest_margins.margins import sample_margins
from largest_margins.engine.cosines import cosine_matrix
from largest_margins.regularizers import zero_centroid
from largest_margins.sharded import ClassShards

SIZES = {1: [9], 2: [6, 3], 3: [1, 6, 2]}  # uneven, one of a single class
N, D, K = 4, 5, 9  # N for each rank


def inputs(ranks, dtype=torch.float64, classes=K):
    "The batch of all ranks; the last classes have no sample, so the last rank has no target."
    generator = torch.Generator().manual_seed(0)
    features, prototypes = (torch.randn(n, D, generator=generator, dtype=torch.float64).mul_(3).to(dtype)
                            for n in (ranks * N, classes))
    return features, prototypes, torch.randint(classes - 3, (ranks * N,), generator=generator)


def own_parts(rank, ranks):
    "The rank's samples and classes."
    first = sum(SIZES[ranks][:rank])
    return slice(rank * N, (rank + 1) * N), slice(first, first + SIZES[ranks][rank])


def losses():
    "Every loss, every reduction, with class weights, label smoothing and the sample-margin term."
    weight = torch.linspace(.2, 2, K, dtype=torch.float64)
    for row in ON_COSINES:
        for reduction in ('mean', 'sum', 'none', 'class-mean'):
            yield row.make(16., range(K), reduction=reduction)
        yield row.make(16., range(K), reduction='class-mean', weight=weight)
        if row.name != 'R_sm': yield row.make(16., range(K), sample_margin=.5)
        if row in SMOOTHABLE: yield row.make(16., range(K), weight=weight, label_smoothing=.2)


def dense(loss):
    "The loss in one process, of the matrix."
    return lambda features, prototypes, *args, **numbers: loss(cosine_matrix(features, prototypes), *args, **numbers)


def shared(loss, chunk_size='auto'):
    "The loss of all ranks."
    return lambda *args, **numbers: loss.linear(*args, chunk_size=chunk_size, group=dist.group.WORLD, **numbers)


def value_and_gradients(function, features, prototypes, targets, wanted=(True, True), **numbers):
    "The gradients of what is wanted, and of all numbers."
    leaves = [x.clone().requires_grad_(want) for x, want in zip((features, prototypes), wanted)]
    numbers = {name: x.clone().requires_grad_() for name, x in numbers.items()}
    value = function(*leaves, targets, **numbers)
    (value * torch.linspace(.5, 2, N, dtype=value.dtype).repeat(len(value) // N) if value.ndim else value).sum(
        ).backward()
    return [value.detach(), *(x.grad for x in (*leaves, *numbers.values()))]


def own_part(rank, ranks, value, features_grad, prototypes_grad, *numbers_grad):
    "What a rank must see of the results of one process."
    mine, shard = own_parts(rank, ranks)
    return [value[mine] if value.ndim else value, features_grad[mine], prototypes_grad[shard],
            *(x[mine] for x in numbers_grad)]


def distance(got, true):
    return max(((g.double() - t).norm() / t.norm().clamp_min(1e-3)).item() for g, t in zip(got, true, strict=True))


def compare(rank, ranks, dtype, chunk_size):
    "The largest difference between this rank's results and one process's, for each loss."
    features, prototypes, targets = inputs(ranks, dtype)
    (mine, shard), worst = own_parts(rank, ranks), {}
    for i, loss in enumerate(losses()):
        true = value_and_gradients(dense(loss), features.double(), prototypes.double(), targets)
        got = value_and_gradients(shared(loss, chunk_size), features[mine], prototypes[shard], targets[mine])
        assert [x.dtype for x in got[1:]] == [dtype, dtype]
        worst[f'{i} {type(loss).__name__}({loss.extra_repr()})'] = distance(got, own_part(rank, ranks, *true))
    return worst


@pytest.mark.parametrize('ranks', SIZES)
@pytest.mark.parametrize('chunk_size', [3, 'auto'])
def test_every_loss_in_float64(ranks, chunk_size):
    for worst in returned(run_on_ranks(compare, ranks, ranks, torch.float64, chunk_size)):
        assert len(worst) > 60
        assert max(worst.values()) < 1e-13, max(worst, key=worst.get)


def test_every_loss_in_float32():
    for worst in returned(run_on_ranks(compare, 2, 2, torch.float32, 'auto')):
        assert max(worst.values()) < 2e-6, max(worst, key=worst.get)


def test_a_rank_without_a_target_is_among_these():
    for ranks in (2, 3):
        assert set(inputs(ranks)[2].tolist()).isdisjoint(range(K)[own_parts(ranks - 1, ranks)[1]])


def numbers_of_each_sample(rank, ranks):
    features, prototypes, targets = inputs(ranks)
    ends = dict(alpha1=(.5, 1), alpha2=(1, 2), beta1=(-.3, .1), beta2=(0, .2))
    numbers = {name: torch.linspace(*ends, ranks * N, dtype=torch.float64) for name, ends in ends.items()}
    (mine, shard), worst = own_parts(rank, ranks), []
    for reduction in ('mean', 'none', 'class-mean'):
        loss = GMSoftmaxLoss(16., sample_margin=.5, reduction=reduction)
        true = value_and_gradients(dense(loss), features, prototypes, targets, **numbers)
        got = value_and_gradients(shared(loss, 3), features[mine], prototypes[shard], targets[mine],
                                  **{name: x[mine] for name, x in numbers.items()})
        worst.append(distance(got, own_part(rank, ranks, *true)))
    return max(worst)


@pytest.mark.parametrize('ranks', [2, 3])
def test_numbers_of_each_sample_get_their_gradients(ranks):
    assert max(returned(run_on_ranks(numbers_of_each_sample, ranks, ranks))) < 1e-13


def some_gradients(rank, all_wanted):
    "Only some leaves want a gradient, not the same on every rank."
    features, prototypes, targets = inputs(2)
    (mine, shard), worst = own_parts(rank, 2), []
    for loss in (NormFaceLoss(16., reduction='none'), ArcFaceLoss(16., sample_margin=.5), SampleMarginLoss(),
                 LMSoftmaxLoss(16., reduction='class-mean', sample_margin=.5)):
        true = own_part(rank, 2, *value_and_gradients(dense(loss), features, prototypes, targets))
        for wanted in all_wanted:
            got = value_and_gradients(shared(loss), features[mine], prototypes[shard], targets[mine], wanted[rank])
            assert [x is not None for x in got[1:]] == list(wanted[rank])
            worst.append(distance(*zip(*((g, t) for g, t in zip(got, true) if g is not None))))
    return max(worst)


def test_gradients_of_some():
    neither, first, second, both = (False, False), (True, False), (False, True), (True, True)
    pairs = [(a, b) for a in (neither, first, second, both) for b in (neither, first, second, both) if a != b]
    pairs += [(first, first), (second, second)]
    assert max(returned(run_on_ranks(some_gradients, 2, pairs))) < 1e-13


def backward_twice(rank):
    features, prototypes, targets = inputs(2)
    (mine, shard), worst = own_parts(rank, 2), []
    for loss in (NormFaceLoss(16.), ArcFaceLoss(16., reduction='none'), LMSoftmaxLoss(16., sample_margin=.5)):
        leaves = features[mine].clone().requires_grad_(), prototypes[shard].clone().requires_grad_()
        value = shared(loss)(*leaves, targets[mine]).sum()
        once, twice = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
        worst.append(distance(twice, once))
        squares = shared(loss)(*leaves, targets[mine]).square().sum()
        for slope in torch.autograd.grad(squares, leaves, create_graph=True):
            with pytest.raises(RuntimeError, match='once_differentiable'): slope.sum().backward(retain_graph=True)
    return max(worst)


def test_backward_twice_and_no_second_derivative():
    assert max(returned(run_on_ranks(backward_twice, 2))) < 1e-15


def bfloat16_features(rank):
    "Features of a body under autocast, prototypes in float32."
    features, prototypes, targets = inputs(2, torch.bfloat16)
    (mine, shard), worst = own_parts(rank, 2), []
    for loss in (NormFaceLoss(16.), ArcFaceLoss(16., sample_margin=.5, reduction='none'), SampleMarginLoss()):
        true = value_and_gradients(dense(loss), features.double(), prototypes.double(), targets)
        got = value_and_gradients(shared(loss), features[mine], prototypes[shard].float(), targets[mine])
        assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.float32]
        true = own_part(rank, 2, *true)
        worst.append((distance(got[::2], true[::2]), distance(got[1:2], true[1:2])))
    return [max(v) for v in zip(*worst)]


def test_bfloat16_features():
    for exact, rounded in returned(run_on_ranks(bfloat16_features, 2)):
        assert exact < 2e-6
        assert rounded < 2**-8


def lazy(rank, ranks):
    "Predictions, matrix and sample margins of `LazyCosines` with shards."
    features, prototypes, targets = inputs(ranks)
    mine, shard = own_parts(rank, ranks)
    shards, w = ClassShards(SIZES[ranks], dist.group.WORLD), prototypes[shard].clone().requires_grad_()
    cosines, true = LazyCosines(features[mine], w, shards), cosine_matrix(features, prototypes)
    assert cosines.shape == (N, K)
    assert cosines.argmax(1).tolist() == true[mine].argmax(1).tolist()
    assert torch.argmax(cosines, -1, keepdim=True).shape == (N, 1)
    assert cosines.argmax(0).tolist() == true[mine].argmax(0).tolist()
    tied = LazyCosines(features[mine], torch.ones_like(w), shards).argmax(1)
    assert tied.tolist() == [0] * N
    margins = cosines.sample_margins(targets[mine])
    leaf = prototypes.clone().requires_grad_()
    both = margins, sample_margins(cosine_matrix(features, leaf), targets)
    slopes = [torch.autograd.grad(m.square().sum(), x)[0] for m, x in zip(both, (w, leaf))]
    assert torch.equal(shards.all_prototypes(w.detach()), prototypes)
    return distance([cosines.matrix(), margins.detach(), slopes[0]],
                    [true[mine], both[1][mine].detach(), slopes[1][shard]])


@pytest.mark.parametrize('ranks', [2, 3])
def test_cosines_that_nobody_computes(ranks):
    assert max(returned(run_on_ranks(lazy, ranks, ranks))) < 1e-14


RECEIVE_FIRST = {'all_gather_single', 'reduce_scatter_single'}
COLLECTIVES = {*RECEIVE_FIRST, 'all_gather', 'all_gather_object', 'all_reduce', 'all_to_all', 'all_to_all_single',
               'barrier', 'broadcast', 'gather', 'reduce', 'reduce_scatter', 'scatter', 'send', 'isend'}


def collectives(rank, chunk_size, loss):
    "(name, bytes that this rank sends) of every collective of a step."
    features, prototypes, targets = inputs(2)
    (mine, shard), found = own_parts(rank, 2), []

    def counting(name, original):
        def counted(*args, **kwargs):
            sent = args[name in RECEIVE_FIRST]
            found.append((name, sent.numel() * sent.element_size()))
            return original(*args, **kwargs)
        return counted

    for name in COLLECTIVES: setattr(dist, name, counting(name, getattr(dist, name)))
    value_and_gradients(shared(loss, chunk_size), features[mine], prototypes[shard], targets[mine])
    return found


@pytest.mark.parametrize('loss,per_sample', [(NormFaceLoss(16.), 2), (ArcFaceLoss(16., sample_margin=.5), 3)])
def test_three_collectives_of_few_numbers(loss, per_sample):
    everybody = 2 * N
    gathered = 8 * N * (D + 1) + 24  # float64 features, targets, and three numbers of the rank
    for found in returned(run_on_ranks(collectives, 2, 'auto', loss)):
        assert found == [('all_gather_single', gathered), ('all_gather_single', 8 * per_sample * everybody),
                         ('reduce_scatter_single', 8 * everybody * D)]
    chunks = math.ceil(everybody / 3)
    for found in returned(run_on_ranks(collectives, 2, 3, loss)):
        assert [name for name, _ in found] == ['all_gather_single'] * (1 + chunks) + ['reduce_scatter_single']
        assert sum(size for _, size in found[1:-1]) == 8 * per_sample * everybody


def bad(rank, what):
    features, prototypes, targets = inputs(3)
    mine, shard = own_parts(rank, 3)
    if rank == 1:
        if what == 'targets': targets[mine] += K
        elif what == 'negative': targets[mine.start] = -1
        elif what == 'features': features[mine.start + 1, 2] = torch.nan
        else: prototypes[shard.start, 0] = torch.inf
    shared(NormFaceLoss(16.))(features[mine], prototypes[shard].requires_grad_(), targets[mine])


@pytest.mark.parametrize('what,message', [
    ('targets', 'targets must be in 0..8'), ('negative', 'targets must be in 0..8'),
    ('features', f'features must be finite, row {N + 1} is not'), ('prototypes', 'prototypes must be finite')])
def test_every_rank_refuses_what_one_got_wrong(what, message):
    for rank, (kind, text) in enumerate(run_on_ranks(bad, 3, what)):
        assert kind == 'raised' and text.startswith('ValueError: ')
        if what == 'prototypes' and rank != 1: message = 'rank 1 refused its arguments; its own error says why'
        else: message = dict(prototypes='prototypes must be finite').get(what, message)
        assert message in text


def leave(rank, how):
    "The last of three ranks leaves the others alone."
    features, prototypes, targets = inputs(3)
    mine, shard = own_parts(rank, 3)
    leaves = features[mine].clone().requires_grad_(), prototypes[shard].clone().requires_grad_()
    if rank == 2 and how == 'raises': raise OSError('no more images')
    if rank == 2 and how == 'dies': os._exit(3)
    value = shared(NormFaceLoss(16.))(*leaves, targets[mine])
    if rank == 2 and how == 'dies before the way back': os._exit(3)
    if rank == 2 and how == 'sleeps': time.sleep(11)
    value.backward()


@pytest.mark.parametrize('how', ['raises', 'dies', 'dies before the way back', 'sleeps'])
def test_a_rank_that_leaves_ends_the_others(how):
    start = time.monotonic()
    *others, last = run_on_ranks(leave, 3, how, seconds=10)
    assert time.monotonic() - start < 30
    assert [kind for kind, _ in others] == ['raised', 'raised']
    if how == 'raises': assert last[0] == 'raised' and 'no more images' in last[1]
    elif how == 'sleeps': assert last[0] == 'raised'
    else: assert last == ('died', 3)


def centroid(rank, ranks):
    "Value and gradient of the zero-centroid term of all classes."
    _, prototypes, _ = inputs(ranks)
    _, shard = own_parts(rank, ranks)
    leaf, part = prototypes.clone().requires_grad_(), prototypes[shard].clone().requires_grad_()
    true, got = zero_centroid(leaf), zero_centroid(part, dist.group.WORLD)
    (3 * true).backward()
    (3 * got).backward()
    return distance([got.detach(), part.grad], [true.detach(), leaf.grad[shard]])


@pytest.mark.parametrize('ranks', SIZES)
def test_zero_centroid_of_all_ranks(ranks):
    assert max(returned(run_on_ranks(centroid, ranks, ranks))) < 1e-14
