"""The heads in other people's training stacks: each wrapper trains as one process with the whole batch, or raises.

Loss × head × wrapper by pairs, on two gloo processes.
"""
import copy
import os
import warnings

import pytest
import torch
from processes import returned, run_on_ranks
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from largest_margins.heads import MarginHead, ShardedMarginHead, keep_shards_out_of_ddp
from largest_margins.losses import (
    AdaFaceLoss,
    ArcFaceLoss,
    CosFaceLoss,
    GMSoftmaxLoss,
    LDAMLoss,
    LMSoftmaxLoss,
    NormFaceLoss,
    SampleMarginLoss,
    SphereFaceLoss,
)

N, D, K, STEPS, RATE = 4, 5, 11, 3, .05  # N for each rank
LOSSES = {
    'NormFace': lambda: NormFaceLoss(8.), 'ArcFace with R_sm': lambda: ArcFaceLoss(8., sample_margin=.5),
    'CosFace with prior': lambda: CosFaceLoss(8., .2, prior=range(1, K + 1)), 'LM': lambda: LMSoftmaxLoss(8.),
    'SphereFace': lambda: SphereFaceLoss(8.), 'LDAM': lambda: LDAMLoss(range(1, K + 1), 8.),
    'GM per class': lambda: GMSoftmaxLoss(8., alpha1=torch.linspace(1, 2, K)), 'R_sm': SampleMarginLoss}
ONLY_TOGETHER = {  # the mean of two halves is not their value, so only a head of the whole batch takes them
    'LM log-sum-exp': lambda: LMSoftmaxLoss(8., 'logsumexp', sample_margin=.5),
    'weighted': lambda: ArcFaceLoss(8., weight=range(1, K + 1)),
    'class-mean': lambda: CosFaceLoss(8., .2, reduction='class-mean')}
WRAPPERS = ['none', 'DDP', 'DDP static', 'DDP unused', 'FSDP2', 'FSDP2 by layer', 'checkpoint', 'reentrant checkpoint',
            'compile', 'accelerate']


class Model(nn.Module):
    "A body, and a head that owns its loss; `unused` takes no part."

    def __init__(self, head, run=lambda layers, *args: layers(*args), unused=False):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, D)).double()
        self.head, self.run = head, run
        if unused: self.unused = nn.Linear(3, 3).double()

    def whole(self, images, targets): return self.head(self.body(images), targets)

    def forward(self, images, targets): return self.run(self.whole, images, targets)


def batches():
    "The batches of both ranks, one for each step, with targets of both shards."
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2 * N, 6, generator=generator, dtype=torch.float64),
             torch.randint(K, (2 * N,), generator=generator)) for _ in range(STEPS)]


def weight():
    return torch.randn(K, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def train(model, optimiser, part=slice(None), after=lambda: None, backward=torch.Tensor.backward):
    "Some steps; the losses."
    losses = []
    for images, targets in batches():
        optimiser.zero_grad()
        value = model(images[part].requires_grad_(), targets[part])
        assert type(value) is torch.Tensor and value.shape == ()
        backward(value)
        after()
        optimiser.step()
        losses.append(value.detach())
    return torch.stack(losses)


def sgd(model): return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)


def one_process(loss):
    "Losses and weights of one process with the whole batch, and how far the weights came."
    head = MarginHead(D, K, loss, dtype=torch.float64)
    head.load_state_dict({'weight': weight()}, strict=False)
    model = Model(head)
    before = [p.detach().clone() for p in model.parameters()]
    losses = train(model, sgd(model))
    after = [p.detach() for p in model.parameters()]
    assert all((a - b).norm() > 1e-4 for a, b in zip(after, before))
    return losses, after


def average(model, sharded):
    "What DDP does, by hand: the mean of the gradients, except of shards."
    for p in model.parameters():
        if p.grad is None or (sharded and p is model.head.weight): continue
        dist.all_reduce(p.grad)
        p.grad /= 2


def wrapped(model, name, sharded):
    "(what is called, what is optimised, what else a step needs, how a loss goes back)"
    by_hand, back = lambda: average(model, sharded), torch.Tensor.backward
    if sharded: keep_shards_out_of_ddp(model)
    kept = {model.head.weight} if sharded else set()
    if name == 'DDP': return DistributedDataParallel(model), model, lambda: None, back
    if name == 'DDP static': return DistributedDataParallel(model, static_graph=True), model, lambda: None, back
    if name == 'DDP unused':
        return DistributedDataParallel(model, find_unused_parameters=True), model, lambda: None, back
    if name.startswith('FSDP2'):
        mesh = init_device_mesh('cpu', (2,))
        if 'layer' in name:
            fully_shard(model.body, mesh=mesh)
            if not sharded: fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=kept)
        return model, model, lambda: None, back
    if name == 'accelerate':
        from accelerate import Accelerator
        os.environ |= dict(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE='2',
                           MASTER_ADDR='127.0.0.1', MASTER_PORT='1', ACCELERATE_USE_CPU='true')
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        return accelerator.prepare(model), model, lambda: None, accelerator.backward
    if name == 'compile': return torch.compile(model, backend='aot_eager'), model, by_hand, back
    return model, model, by_hand, back


def runs(name):
    "How a model calls its layers."
    if 'checkpoint' not in name: return lambda layers, *args: layers(*args)
    return lambda layers, *args: checkpoint(layers, *args, use_reentrant='reentrant' in name)


def full(x): return x.full_tensor() if hasattr(x, 'full_tensor') else x


def difference(rank, name, loss, sharded):
    "The largest difference of losses and weights to one process."
    make = (LOSSES | ONLY_TOGETHER)[loss]
    true_losses, true_weights = one_process(make())
    head = (ShardedMarginHead if sharded else MarginHead)(D, K, make(), dtype=torch.float64)
    head.load_state_dict({'weight': weight()}, strict=False)
    model = Model(head, runs(name), unused=name == 'DDP unused')
    called, optimised, after, backward = wrapped(model, name, sharded)
    losses = train(called, sgd(optimised), slice(rank * N, (rank + 1) * N), after, backward)
    if not sharded:  # each rank has the loss of its own samples
        dist.all_reduce(losses)
        losses /= 2
    weights = [head.full_weight() if sharded and p is head.weight else full(p).detach()
               for n, p in model.named_parameters() if 'unused' not in n]
    pairs = zip([losses, *weights], [true_losses, *true_weights], strict=True)
    return max(((got - true).norm() / true.norm()).item() for got, true in pairs)


def pairs(wrappers):
    "Each wrapper with both heads and each head with every loss; the losses go round, two for each wrapper."
    for sharded in (False, True):
        losses = [*LOSSES, *(ONLY_TOGETHER if sharded else ())]
        for i, name in enumerate(WRAPPERS):
            for loss in (2 * i, 2 * i + 1) if name != 'compile' else [2 * i]:
                if name in wrappers: yield name, losses[loss % len(losses)], sharded


def differences(rank, wrappers):
    "All cases of these wrappers, in one process group."
    warnings.filterwarnings('ignore')
    found = {}
    for name, loss, sharded in pairs(wrappers):
        torch._dynamo.reset() if name == 'compile' else None
        try: found[f'{name}, {loss}, sharded={sharded}'] = difference(rank, name, loss, sharded)
        except Exception as e: raise RuntimeError(f'{name}, {loss}, sharded={sharded}') from e
    return found


@pytest.mark.parametrize('wrappers', [WRAPPERS[:4], WRAPPERS[4:6], WRAPPERS[6:8], WRAPPERS[8:9], WRAPPERS[9:]],
                         ids=lambda wrappers: wrappers[0])
def test_every_wrapper_trains_what_one_process_trains(wrappers):
    for found in returned(run_on_ranks(differences, 2, wrappers, seconds=120)):
        assert {name.split(', ')[0] for name in found} == set(wrappers)
        worst = max(found, key=found.get)
        assert found[worst] < 1e-10, (worst, found[worst])


# --- what cannot be right is refused ---

def sharded_model():
    "Shards of one size, which DDP does not notice."
    head = ShardedMarginHead(D, K - 1, CosFaceLoss(8., .2), dtype=torch.float64)
    head.load_state_dict({'weight': weight()[:K - 1]})
    return Model(head)


def mistakes(rank):
    "What wrappers that would mix the shards say."
    images, targets = batches()[0]
    targets = targets.clamp(max=K - 2)
    own, said = slice(rank * N, (rank + 1) * N), {}
    def note(name, function):
        try: function()
        except Exception as e: said[name] = f'{type(e).__name__}: {e}'
    ddp = {'DDP': {}, 'DDP static': dict(static_graph=True), 'DDP unused': dict(find_unused_parameters=True)}
    for name, options in ddp.items():
        model = DistributedDataParallel(sharded_model(), **options)
        note(name, lambda model=model: model(images[own], targets[own]))
        note(f'{name}, evaluated', lambda model=model: model.eval()(images[own], None))
    mesh = init_device_mesh('cpu', (2,))
    for name in ('FSDP2', 'FSDP2 by layer'):
        model = sharded_model()
        if 'layer' in name: fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        note(name, lambda model=model: model(images[own], targets[own]))
    head = MarginHead(D, K, CosFaceLoss(), dtype=torch.float64)
    fully_shard(head, mesh=mesh)
    features = images[own, :D]
    for name, function in (('top', lambda: head.top(features)), ('linear', lambda: head.loss.linear(
            features, head.weight, targets[own])), ('margins', lambda: head.sample_margins(features, targets[own]))):
        note(f'{name} of a part', function)
    return said


def test_what_would_mix_the_shards_is_refused():
    for said in returned(run_on_ranks(mistakes, 2, seconds=60)):
        for name in ('DDP', 'DDP static', 'DDP unused'):
            assert 'keep_shards_out_of_ddp' in said[name] and 'keep_shards_out_of_ddp' in said[f'{name}, evaluated']
        for name in ('FSDP2', 'FSDP2 by layer'): assert said[name].startswith('ValueError'), said[name]
        for name in ('top', 'linear', 'margins'): assert 'full_tensor' in said[f'{name} of a part'], said


def recomputed(rank):
    "How far a step is from that of one process where FSDP2 shards each layer and a checkpoint is around them all."
    warnings.filterwarnings('ignore')
    _, true = one_process(CosFaceLoss(8., .2))
    head = MarginHead(D, K, CosFaceLoss(8., .2), dtype=torch.float64)
    head.load_state_dict({'weight': weight()})
    model = Model(head)
    called, _, after, backward = wrapped(model, 'FSDP2 by layer', False)
    def run(*args): return checkpoint(called, *args, use_reentrant=False)
    train(run, sgd(model), slice(rank * N, (rank + 1) * N), after, backward)
    return max((full(p).detach() - t).norm().item() for p, t in zip(model.parameters(), true, strict=True))


def test_a_checkpoint_around_layers_that_fsdp_shards():
    assert max(returned(run_on_ranks(recomputed, 2))) < 1e-10


def averaged_twice(rank):
    "An average of a model with a sharded head, on a deep copy."
    head = ShardedMarginHead(D, K, CosFaceLoss(8., .2), dtype=torch.float64)
    mean = torch.optim.swa_utils.AveragedModel(Model(head))
    images, targets = batches()[0]
    own = slice(rank * N, (rank + 1) * N)
    before = mean(images[own], targets[own])
    with torch.no_grad(): head.weight.mul_(-1)
    return (before - mean(images[own], targets[own])).item()


def test_a_sharded_head_is_copied():
    assert returned(run_on_ranks(averaged_twice, 2)) == [0, 0]


def statistics(rank):
    "AdaFace's running statistics in both heads, and what they are after a checkpoint."
    found = {}
    for sharded in (False, True):
        head = (ShardedMarginHead if sharded else MarginHead)(D, K, AdaFaceLoss(8., momentum=.5), dtype=torch.float64)
        model = Model(head)
        called, optimised, after, backward = wrapped(model, 'DDP', sharded)
        train(called, sgd(optimised), slice(rank * N, (rank + 1) * N), after, backward)
        state = copy.deepcopy(head.loss.state_dict())
        found[sharded] = state['norm_mean'], state['norm_std']
        with torch.no_grad(): model.eval()(batches()[0][0], batches()[0][1])
        assert head.loss.norm_mean == found[sharded][0]
    return found


def test_statistics_of_a_head_that_sees_all_ranks():
    first, second = returned(run_on_ranks(statistics, 2))
    assert first[True] == second[True] and first[True][0] != 20
