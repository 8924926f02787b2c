"`ShardedMarginHead`: checkpoints that load on any number of ranks or are refused, and what a head refuses."
import pytest
import torch
from processes import returned, run_on_ranks
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from largest_margins.heads import CosineLinear, MarginHead, ShardedMarginHead
from largest_margins.losses import AdaFaceLoss, LMSoftmaxLoss, NormFaceLoss
from largest_margins.margins import class_margin

D, K = 5, 11  # 11 classes in 6 + 5, in 4 + 4 + 3
LOSS = LMSoftmaxLoss(16.)


def batch():
    "The same whole batch and prototypes for each number of ranks."
    generator = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (24, K))
    return features, torch.randint(K, (24,), generator=generator), weight


def head_of(cls=ShardedMarginHead, loss=LOSS): return cls(D, K, loss, dtype=torch.float64)


def distance(got, true):
    return max(((g - t).norm() / t.norm()).item() for g, t in zip(got, true, strict=True))


def training(ranks, rank=None, steps=2):
    "A head, and an optimiser with a state, after some steps; one process's head if there is no rank."
    features, targets, weight = batch()
    head = head_of(MarginHead if rank is None else ShardedMarginHead)
    head.load_state_dict({'weight': weight})
    optimizer = torch.optim.AdamW(head.parameters(), lr=.05)
    own = [x if rank is None else x.chunk(ranks)[rank] for x in (features, targets)]
    for _ in range(steps):
        optimizer.zero_grad()
        head(*own).backward()
        optimizer.step()
    return head, optimizer, own


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
    head, optimizer, _ = training(ranks, rank)
    checkpoint.save(checkpointed(head, optimizer), checkpoint_id=f'{directory}/distributed')
    weight = head.full_weight()
    if rank == 0: save_file({'weight': weight}, f'{directory}/weight.safetensors')
    return weight


def load(rank, ranks, directory):
    "The weight after loading, after one more step, and from the safetensors file."
    head, optimizer, own = training(ranks, rank, steps=0)
    state = checkpointed(head, optimizer)
    checkpoint.load(state, checkpoint_id=f'{directory}/distributed')
    local(head, optimizer, state)
    loaded = head.full_weight()
    optimizer.zero_grad()
    head(*own).backward()
    optimizer.step()
    other = head_of()
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


def rank0_checkpoint(rank, ranks, directory):
    "What every trainer does: rank 0 saves its `state_dict`, all ranks load it. What each says and holds after."
    model, path = nn.Sequential(nn.Linear(4, D), head_of()).double(), f'{directory}/rank0.pt'
    before = model[1].full_weight()
    if ranks == 2:  # else: a file of other ranks
        torch.save(model.state_dict(), f'{directory}/rank{rank}.pt')
        dist.barrier()
    other, said = nn.Sequential(nn.Linear(4, D), head_of()).double(), 'loaded'
    kept = other[1].full_weight()
    try: other.load_state_dict(torch.load(path, weights_only=True))
    except (ValueError, RuntimeError) as e: said = str(e)
    after = other[1].full_weight()
    shards, mine = other[1].shards, slice(other[1].shards.first, other[1].shards.first + other[1].shards.size)
    assert len(shards.sizes) == ranks
    own = nn.Sequential(nn.Linear(4, D), head_of()).double()
    if ranks == 2: own.load_state_dict(torch.load(f'{directory}/rank{rank}.pt', weights_only=True))
    assert ranks != 2 or torch.equal(own[1].full_weight(), before)  # each rank's own file is right
    return said, torch.equal(after[mine], kept[mine]), torch.equal(after[mine], before[mine])


def test_rank_zeros_state_dict_is_refused_elsewhere(tmp_path):
    "With the two ways to do it; nothing is loaded then."
    found = returned(run_on_ranks(rank0_checkpoint, 2, 2, str(tmp_path)))
    assert found[0] == ('loaded', False, True)
    for said, kept, loaded in [*found[1:], *returned(run_on_ranks(rank0_checkpoint, 3, 3, str(tmp_path)))]:
        assert 'full_weight' in said and 'torch.distributed.checkpoint' in said
        assert kept and not loaded
    state = torch.load(tmp_path/'rank0.pt', weights_only=False)
    single = nn.Sequential(nn.Linear(4, D), head_of(MarginHead)).double()
    with pytest.raises((RuntimeError, TypeError, ValueError, AttributeError)): single.load_state_dict(state)


def other_heads(rank):
    "A head's weight is that of a `CosineLinear` of all classes, its loss keeps its statistics, and fixed points stay."
    features, targets, weight = batch()
    whole, head = CosineLinear(D, K).double(), head_of(loss=AdaFaceLoss(8.))
    whole.load_state_dict({'weight': weight})
    head.load_state_dict(whole.state_dict(), strict=False)
    assert torch.equal(head.full_weight(), weight)
    head(features, targets)
    state = head.state_dict()
    assert set(state) == {'weight', 'classes', 'loss.norm_mean', 'loss.norm_std'}
    assert state['loss.norm_mean'] == head.loss.norm_mean != 20
    assert tuple(state['weight'].shape) == (K, D)  # says of the whole what it is
    for points in (2 * weight, (2 * weight)[head.shards.first:head.shards.first + head.shards.size]):
        fixed = head_of().fix(points)
        assert torch.equal(fixed.full_weight(), 2 * weight) and not list(fixed.parameters())
        fixed.reset_parameters()
        assert torch.equal(fixed.full_weight(), 2 * weight)
        fixed(features.requires_grad_(), targets).backward()
    with pytest.raises(ValueError, match='^points must'): head_of().fix(weight[:3])
    torch.manual_seed(0)
    one, two = head_of(), head_of()
    assert not torch.equal(one.weight, two.weight)
    assert class_margin(torch.cat([one.full_weight(), two.full_weight()])) > .01  # no rank draws another's prototypes
    for wrong in ('no', 1, None):
        with pytest.raises(TypeError, match='^averaged must'): one.averaged = wrong
        with pytest.raises(TypeError, match='^averaged must'): ShardedMarginHead(D, K, LOSS, averaged=wrong)
    with torch.no_grad(): assert not one(features, targets).requires_grad  # of a leaf that wants a gradient
    with torch.inference_mode(): one(features, targets)
    shown = repr(one)
    assert 'out_features=11' in shown and f'classes {one.shards.first} to' in shown
    return True


def test_what_a_head_keeps_and_refuses():
    assert all(returned(run_on_ranks(other_heads, 2)))


def averaged(rank, ranks):
    "With `averaged` the features' gradient is what DDP will divide by the number of ranks."
    features, targets, weight = batch()
    own, slopes = slice(rank * 4, rank * 4 + 4), []
    for flag in (False, True):
        head = ShardedMarginHead(D, K, NormFaceLoss(8.), averaged=flag, dtype=torch.float64)
        head.load_state_dict({'weight': weight})
        leaf = features[own].clone().requires_grad_()
        slopes.append(torch.autograd.grad(head(leaf, targets[own]), (leaf, head.weight)))
    (z, w), (z_averaged, w_averaged) = slopes
    return distance([z_averaged, w_averaged], [ranks * z, w])


@pytest.mark.parametrize('ranks', [1, 3])
def test_averaged(ranks): assert max(returned(run_on_ranks(averaged, ranks, ranks))) < 1e-14


def refused(rank):
    ShardedMarginHead(D, 4, LOSS)


def test_every_rank_needs_a_class():
    for kind, text in run_on_ranks(refused, 3):
        assert kind == 'raised' and 'out_features must' in text
