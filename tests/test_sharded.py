"Classes shared out among processes: the same value and the same gradients as in one, and no hang when one fails."
import copy
import math
import os
import time

import pytest
import torch
from loss_family import ON_COSINES, ignoring
from processes import returned, run_on_ranks
from torch import distributed as dist

from largest_margins.engine.cosines import cosine_matrix
from largest_margins.heads import ShardedMarginHead
from largest_margins.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CosFaceLoss,
    ElasticFaceLoss,
    GMSoftmaxLoss,
    LMSoftmaxLoss,
    NormFaceLoss,
    SampleMarginLoss,
)
from largest_margins.margins import sample_margins
from largest_margins.regularizers import zero_centroid

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


WEIGHT, PRIOR = torch.linspace(.2, 2, K, dtype=torch.float64), torch.linspace(1, 900, K)
OPTIONS = [  # every two values of two options meet: reduction, weight, whether some do not count, R_sm, prior
    ('mean', None, True, .5, PRIOR), ('mean', WEIGHT, False, 0, None), ('sum', None, False, .5, None),
    ('sum', WEIGHT, True, 0, PRIOR), ('none', None, False, 0, PRIOR), ('none', WEIGHT, True, .5, None),
    ('class-mean', None, True, 0, None), ('class-mean', WEIGHT, False, .5, PRIOR)]


def losses():
    "Every loss with all options by pairs, and whether some samples do not count."
    for row in ON_COSINES:
        for reduction, weight, ignored, sample_margin, prior in OPTIONS:
            given = dict(reduction=reduction, weight=weight)
            if row.name != 'R_sm': given |= dict(sample_margin=sample_margin)
            if row.name != 'R_sm' and 'prior' not in row.name: given |= dict(prior=prior)
            yield row.make(16., range(K), **given), ignored


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
    features, prototypes, all_targets = inputs(ranks, dtype)
    (mine, shard), worst = own_parts(rank, ranks), {}
    for i, (loss, ignored) in enumerate(losses()):
        targets = ignoring(all_targets) if ignored else all_targets
        true = value_and_gradients(dense(loss), features.double(), prototypes.double(), targets)
        got = value_and_gradients(shared(loss, chunk_size), features[mine], prototypes[shard], targets[mine])
        assert [x.dtype for x in got[1:]] == [dtype, dtype]
        worst[f'{i} {type(loss).__name__}({loss.extra_repr()})'] = distance(got, own_part(rank, ranks, *true))
    return worst


@pytest.mark.parametrize('ranks, chunk_size', [(1, 3), (2, 'auto'), (3, 3)])
def test_every_loss_in_float64(ranks, chunk_size):
    for worst in returned(run_on_ranks(compare, ranks, ranks, torch.float64, chunk_size)):
        assert len(worst) > 100
        assert max(worst.values()) < 1e-13, max(worst, key=worst.get)


def test_every_loss_in_float32():
    for worst in returned(run_on_ranks(compare, 2, 2, torch.float32, 'auto')):
        for name, error in worst.items(): assert error < (1e-5 if 'logsumexp' in name else 2e-6), name  # exp(s·loss)


def test_a_rank_without_a_target_is_among_these():
    for ranks in (2, 3):
        assert set(inputs(ranks)[2].tolist()).isdisjoint(range(K)[own_parts(ranks - 1, ranks)[1]])


def numbers_of_each_sample(rank, ranks):
    "Those of the caller, and those that a loss draws or measures itself."
    features, prototypes, targets = inputs(ranks)
    ends = dict(alpha1=(.5, 1), alpha2=(1, 2), beta1=(-.3, .1), beta2=(0, .2))
    numbers = {name: torch.linspace(*ends, ranks * N, dtype=torch.float64) for name, ends in ends.items()}
    (mine, shard), worst = own_parts(rank, ranks), []
    own = features[mine], prototypes[shard], targets[mine]
    for reduction in ('mean', 'none', 'class-mean'):
        loss = GMSoftmaxLoss(16., sample_margin=.5, reduction=reduction)
        true = value_and_gradients(dense(loss), features, prototypes, targets, **numbers)
        got = value_and_gradients(shared(loss, 3), *own, **{name: x[mine] for name, x in numbers.items()})
        worst.append(distance(got, own_part(rank, ranks, *true)))
    def elastic(seed): return ElasticFaceLoss(16., generator=torch.Generator().manual_seed(seed))
    margins = torch.cat([torch.normal(torch.full((N,), .5), .05, generator=elastic(r).generator) for r in range(ranks)])
    true = value_and_gradients(ArcFaceLoss(16.).linear, features, prototypes, targets, m2=margins)
    got = value_and_gradients(shared(elastic(rank)), *own)
    worst.append(distance(got, own_part(rank, ranks, *true[:3])))
    alone = AdaFaceLoss(16., momentum=.5)
    together = copy.deepcopy(alone)
    for some in (targets, ignoring(targets)):  # the statistics are those of all ranks' samples that count
        true = value_and_gradients(alone.linear, 9 * features, prototypes, some)
        got = value_and_gradients(shared(together), 9 * features[mine], prototypes[shard], some[mine])
        worst.append(1e-6 * distance(got, own_part(rank, ranks, *true)))  # the statistics are float32
        assert together.norm_mean != 20 and (together.norm_std - alone.norm_std).abs() < 1e-3
    return max(worst)


@pytest.mark.parametrize('ranks', [2, 3])
def test_numbers_of_each_sample_get_their_gradients(ranks):
    assert max(returned(run_on_ranks(numbers_of_each_sample, ranks, ranks))) < 1e-11


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
        with pytest.raises(RuntimeError, match='second derivatives'):
            torch.autograd.grad(squares, leaves, create_graph=True)
    return max(worst)


def test_backward_twice_and_a_second_derivative_is_refused():
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


def evaluation(rank, ranks):
    "What a head tells of all classes without targets: the matrix, the nearest classes, the margins."
    features, prototypes, targets = inputs(ranks)
    head = ShardedMarginHead(D, K, CosFaceLoss(), dtype=torch.float64)
    head.load_state_dict({'weight': prototypes})
    mine, true = own_parts(rank, ranks)[0], cosine_matrix(features, prototypes)
    out = head(features[mine])
    assert type(out) is torch.Tensor and not out.requires_grad and torch.equal(head.full_weight(), prototypes)
    worst = [distance([out], [true[mine]])]
    for n in (1, 4, K):
        cosines, classes = head.top(features[mine], n)
        expected, order = true[mine].topk(n)
        assert classes.tolist() == order.tolist() and cosines.shape == (N, n)
        worst.append(distance([cosines], [expected]))
    margins = head.sample_margins(features[mine], targets[mine])
    worst.append(distance([margins], [sample_margins(true, targets)[mine]]))
    for bad in (0, K + 1):
        with pytest.raises(ValueError, match='^n must be'): head.top(features[mine], bad)
    return max(worst)


@pytest.mark.parametrize('ranks', [2, 3])
def test_evaluation(ranks):
    assert max(returned(run_on_ranks(evaluation, ranks, ranks))) < 1e-14


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
def test_few_collectives_of_few_numbers(loss, per_sample):
    "A tiny one in which ranks agree; the batch, N·d + N; at most 3 numbers a sample; N·d on the way back."
    everybody = 2 * N
    for found in returned(run_on_ranks(collectives, 2, 'auto', loss)):
        (agree, few), *others = found
        assert agree == 'all_gather_single' and few <= 80
        assert others == [('all_gather_single', 8 * N * (D + 1)), ('all_gather_single', 8 * per_sample * everybody),
                          ('reduce_scatter_single', 8 * everybody * D)]
    chunks = math.ceil(everybody / 3)
    for found in returned(run_on_ranks(collectives, 2, 3, loss)):
        assert [name for name, _ in found] == ['all_gather_single'] * (2 + chunks) + ['reduce_scatter_single']
        assert sum(size for _, size in found[2:-1]) == 8 * per_sample * everybody


def bad(rank, what):
    features, prototypes, targets = inputs(3)
    mine, shard = own_parts(rank, 3)
    z, w, y, loss = features[mine].clone(), prototypes[shard].clone(), targets[mine].clone(), NormFaceLoss(16.)
    if rank == 1:
        if what == 'targets': y += K
        elif what == 'negative': y[0] = -1
        elif what == 'features': z[1, 2] = torch.nan
        elif what == 'prototypes': w[0, 0] = torch.inf
        elif what == 'samples': z, y = z[:2], y[:2]
        elif what == 'dimensions': z, w = z[:, :3], w[:, :3]
        elif what == 'dtypes': w = w.float()
        elif what == 'dtypes of features': z = z.float()
        elif what == 'another scale': loss = NormFaceLoss(17.)
        elif what == 'another loss': loss = CosFaceLoss(16., 0.)
        elif what == 'another weight': loss = NormFaceLoss(16., weight=torch.full((K,), 2.))
        elif what == 'one shard twice': w = prototypes[:6].clone()
    if what == 'another weight' and rank != 1: loss = NormFaceLoss(16., weight=torch.ones(K))
    if what == 'one shard twice': w = prototypes[:2].clone()
    shared(loss)(z, w.requires_grad_(), y)


REFUSED = {'targets': 'targets must be in 0..8', 'negative': 'targets must be in 0..8',
           'features': f'features must be finite, row {N + 1}', 'prototypes': 'rank 1 refused',
           'samples': 'same samples',
           'dimensions': 'same dimensions', 'dtypes': 'same dtypes', 'dtypes of features': 'same dtypes',
           'another scale': 'same losses', 'another loss': 'same losses', 'another weight': 'same losses',
           'one shard twice': 'other prototypes'}


def all_bad(rank):
    "What each mistake of one rank says on this rank; nothing hangs, and the next step works."
    said = {}
    for what in REFUSED:
        try: bad(rank, what)
        except ValueError as e: said[what] = str(e)
    bad(rank, None)
    return said


def test_every_rank_refuses_what_one_got_wrong():
    for rank, said in enumerate(returned(run_on_ranks(all_bad, 3))):
        assert set(said) == set(REFUSED)
        for what, message in REFUSED.items():
            if what == 'prototypes' and rank == 1: message = 'prototypes must be finite'
            assert message in said[what], (what, said[what])


def test_what_only_a_rank_is_told():
    "A number per sample on one rank alone."
    for rank, (kind, text) in enumerate(run_on_ranks(numbers_on_one_rank, 2)):
        assert kind == 'raised' and 'same dtypes' in text, (rank, text)


def numbers_on_one_rank(rank):
    features, prototypes, targets = inputs(2)
    mine, shard = own_parts(rank, 2)
    given = dict(margin=torch.rand(N)) if rank else {}
    shared(CosFaceLoss(16.))(features[mine], prototypes[shard], targets[mine], **given)


def leave(rank, how):
    "The last of three ranks leaves the others alone."
    features, prototypes, targets = inputs(3)
    mine, shard = own_parts(rank, 3)
    leaves = features[mine].clone().requires_grad_(), prototypes[shard].clone().requires_grad_()
    if rank == 2 and how == 'raises': raise OSError('no more images')
    if rank == 2 and how == 'dies': os._exit(3)
    value = shared(NormFaceLoss(16.))(*leaves, targets[mine])
    if rank == 2 and how == 'dies before the way back': os._exit(3)
    if rank == 2 and how == 'sleeps': time.sleep(31)
    value.backward()


@pytest.mark.parametrize('how', ['raises', 'dies', 'dies before the way back', 'sleeps'])
def test_a_rank_that_leaves_ends_the_others(how):
    *others, last = run_on_ranks(leave, 3, how, seconds=30)
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
