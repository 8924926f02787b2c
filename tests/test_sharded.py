"Classes shared out among processes: the same value and the same gradients as in one, and no hang when one fails."

import pytest
import torch
from loss_family import ON_COSINES, SMOOTHABLE
from processes import returned, run_on_ranks
from torch import distributed as dist

from largest_margins.reduction import cosine_matrix

SIZES = {1: [9], 2: [6, 3], 3: [1, 6, 2]}  # uneven, one of a single class
N, D, K = 4, 5, 9  # N for each rank


def inputs(ranks, dtype=torch.float64, classes=K):
    "The batch of all ranks; the last classes have no sample, so some ranks have no target."
    generator = torch.Generator().manual_seed(0)
    features, prototypes = (torch.randn(n, D, generator=generator, dtype=torch.float64).mul_(3).to(dtype)
                            for n in (ranks * N, classes))
    return features, prototypes, torch.randint(classes - 3, (ranks * N,), generator=generator)


def losses():
    "Every loss, every reduction, with class weights, label smoothing and the sample-margin term."
    weight = torch.linspace(.2, 2, K, dtype=torch.float64)
    for row in ON_COSINES:
        for reduction in ('mean', 'sum', 'none', 'class-mean'):
            yield row.make(16., range(K), reduction=reduction)
        yield row.make(16., range(K), reduction='class-mean', weight=weight)
        if row.name != 'R_sm': yield row.make(16., range(K), sample_margin=.5)
        if row in SMOOTHABLE: yield row.make(16., range(K), weight=weight, label_smoothing=.2)


def value_and_gradients(function, features, prototypes, targets):
    leaves = [x.clone().requires_grad_() for x in (features, prototypes)]
    value = function(*leaves, targets)
    (value * torch.linspace(.5, 2, N, dtype=value.dtype).repeat(len(value) // N) if value.ndim else value).sum(
        ).backward()
    return [value.detach(), *(x.grad for x in leaves)]


def own_part(rank, ranks, value, features_grad, prototypes_grad):
    "What a rank must see of the results of one process."
    first = sum(SIZES[ranks][:rank])
    mine = slice(rank * N, (rank + 1) * N)
    return [value[mine] if value.ndim else value, features_grad[mine],
            prototypes_grad[first:first + SIZES[ranks][rank]]]


def distance(got, true):
    return max(((g - t).norm() / t.norm().clamp_min(1e-3)).item() for g, t in zip(got, true, strict=True))


def compare(rank, ranks, dtype, chunk_size):
    "The largest difference between this rank's results and one process's, for each loss."
    features, prototypes, targets = inputs(ranks, dtype)
    first = sum(SIZES[ranks][:rank])
    mine, shard = slice(rank * N, (rank + 1) * N), prototypes[first:first + SIZES[ranks][rank]]
    worst = {}
    for i, loss in enumerate(losses()):
        true = value_and_gradients(lambda z, w, y, loss=loss: loss(cosine_matrix(z, w), y), features.double(),
                                   prototypes.double(), targets)
        got = value_and_gradients(lambda *a, loss=loss: loss.linear(*a, chunk_size=chunk_size, group=dist.group.WORLD),
                                  features[mine], shard, targets[mine])
        name = f'{i} {type(loss).__name__}({loss.extra_repr()})'
        worst[name] = distance([g.double() for g in got], own_part(rank, ranks, *true))
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
