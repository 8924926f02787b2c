"`ShardedCosineLinear`: the same training as with one process's `CosineLinear`, under DDP, and checkpoints."
import pytest
import torch
from processes import returned, run_on_ranks
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from largest_margins.heads import CosineLinear, ShardedCosineLinear, keep_shards_out_of_ddp
from largest_margins.losses import ArcFaceLoss, LMSoftmaxLoss, NormFaceLoss

N, D, K = 4, 5, 11  # N for each rank; 11 classes in 6 + 5, in 4 + 4 + 3
LOSSES = [NormFaceLoss(16.), ArcFaceLoss(16., sample_margin=.5), LMSoftmaxLoss(16., reduction='class-mean')]


def batch(ranks, dtype):
    generator = torch.Generator().manual_seed(0)
    images, weight = (torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
                      for n, d in ((ranks * N, 6), (K, D)))
    return images, torch.randint(K, (ranks * N,), generator=generator), weight


def own(rank): return slice(rank * N, (rank + 1) * N)


def classes(head): return slice(head.shards.first, head.shards.first + head.shards.size)


def body(dtype):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, D)).to(dtype)


def distance(got, true):
    return max(((g - t).norm() / t.norm()).item() for g, t in zip(got, true, strict=True))


def one_process(loss, images, targets, weight):
    "Loss, and the gradients of the body and of the prototypes, on the whole batch."
    model = nn.Sequential(body(weight.dtype), CosineLinear(D, K, dtype=weight.dtype))
    model[1].load_state_dict({'weight': weight})
    value = loss(model(images), targets)
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters())]


def like_one_process(rank, ranks, dtype, wrapped):
    "The largest relative difference of loss and gradients."
    images, targets, weight = batch(ranks, dtype)
    worst = []
    for loss in LOSSES:
        *true, prototypes = one_process(loss, images, targets, weight)
        head = ShardedCosineLinear(D, K, averaged=wrapped != 'nothing', dtype=dtype)
        head.load_state_dict({'weight': weight})
        layers, model = body(dtype), nn.Sequential(body(dtype), head)
        if wrapped == 'body': model = nn.Sequential(DistributedDataParallel(layers), head)
        elif wrapped == 'model': model = DistributedDataParallel(keep_shards_out_of_ddp(model))
        value = loss(model(images[own(rank)]), targets[own(rank)])
        value.backward()
        *got, mine = (p.grad for p in model.parameters())
        if wrapped == 'nothing':  # the body's gradients are parts of a sum
            for x in got: dist.all_reduce(x)
        worst.append(distance([value.detach(), *got, mine], [*true, prototypes[classes(head)]]))
        assert torch.equal(head.full_weight(), weight)
    return max(worst)


@pytest.mark.parametrize('dtype,close', [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize('wrapped', ['nothing', 'body', 'model'])
def test_the_gradients_are_those_of_one_process(wrapped, dtype, close):
    assert max(returned(run_on_ranks(like_one_process, 2, 2, dtype, wrapped))) < close


@pytest.mark.parametrize('ranks', [1, 3])
def test_other_numbers_of_ranks(ranks):
    assert max(returned(run_on_ranks(like_one_process, ranks, ranks, torch.float64, 'model'))) < 1e-12


def training(ranks, rank=None, steps=2):
    "A head, and an optimiser with a state, after some steps; with one process's head if there is no rank."
    images, targets, weight = batch(6, torch.float64)  # the same whole batch for each number of ranks
    head = CosineLinear(D, K, dtype=torch.float64) if rank is None else ShardedCosineLinear(D, K, dtype=torch.float64)
    head.load_state_dict({'weight': weight})
    optimizer = torch.optim.AdamW(head.parameters(), lr=.05)
    features, targets = ([x] if rank is None else x.chunk(ranks)[rank:rank + 1] for x in (images[:, :D], targets))
    for _ in range(steps):
        optimizer.zero_grad()
        LMSoftmaxLoss(16.)(head(*features), *targets).backward()
        optimizer.step()
    return head, optimizer, features, targets


def checkpointed(head, optimizer):
    "Both states as `torch.distributed.checkpoint` wants them, the optimiser's rows as a `DTensor` too."
    model, optim = get_state_dict(head, optimizer)
    rows = optim['state']['weight']
    rows |= {name: head.shards.distributed(v) for name, v in rows.items() if v.shape == head.weight.shape}
    return {'model': model, 'optim': optim}


def local(head, optimizer, state):
    "Take the states back."
    rows = state['optim']['state']['weight']
    rows |= {name: v.to_local() for name, v in rows.items() if hasattr(v, 'to_local')}
    set_state_dict(head, optimizer, model_state_dict=state['model'], optim_state_dict=state['optim'])


def save(rank, ranks, directory):
    head, optimizer, *_ = training(ranks, rank)
    checkpoint.save(checkpointed(head, optimizer), checkpoint_id=f'{directory}/distributed')
    weight = head.full_weight()
    if rank == 0: save_file({'weight': weight}, f'{directory}/weight.safetensors')
    return weight


def load(rank, ranks, directory):
    "The weight after loading, after one more step, and from the safetensors file."
    head, optimizer, features, targets = training(ranks, rank, steps=0)
    state = checkpointed(head, optimizer)
    checkpoint.load(state, checkpoint_id=f'{directory}/distributed')
    local(head, optimizer, state)
    loaded = head.full_weight()
    optimizer.zero_grad()
    LMSoftmaxLoss(16.)(head(*features), *targets).backward()
    optimizer.step()
    other = ShardedCosineLinear(D, K, dtype=torch.float64)
    other.load_state_dict(load_file(f'{directory}/weight.safetensors'))
    return loaded, head.full_weight(), other.full_weight()


@pytest.mark.parametrize('ranks', [1, 2, 3])
def test_a_checkpoint_of_two_ranks(ranks, tmp_path):
    saved, same = returned(run_on_ranks(save, 2, 2, str(tmp_path)))
    assert torch.equal(saved, same)
    two, three = (training(1, steps=steps)[0].weight.detach() for steps in (2, 3))
    assert distance([saved], [two]) < 1e-12
    for loaded, trained_on, from_safetensors in returned(run_on_ranks(load, ranks, ranks, str(tmp_path))):
        assert torch.equal(loaded, saved) and torch.equal(from_safetensors, saved)
        assert distance([trained_on], [three]) < 1e-12


def refused(rank):
    ShardedCosineLinear(D, 4)


def test_every_rank_needs_a_class():
    for kind, text in run_on_ranks(refused, 3):
        assert kind == 'raised' and 'out_features must leave classes to each of 3 ranks' in text
