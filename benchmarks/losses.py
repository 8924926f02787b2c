"""Time, memory and error of one step of a classification head, ours beside the others'.

    python benchmarks/losses.py                                  # the stored table: benchmarks/results/losses.json
    python benchmarks/losses.py --shapes 512x512x100000          # one slice of it; the others stay as they are
    python benchmarks/losses.py --shapes 512x512x10000 --rows CE,ArcFace --rounds 3 --out mine.json

A step takes features [N, d] and prototypes [k, d] to a loss and to the gradients of both. All rows of a shape take
turns in one process, on one thread; what is stored are ratios of median CPU times: to plain cross-entropy, to the line
that everybody writes by hand, `F.cross_entropy(s * normalize(z) @ normalize(W).T, y)`, and to the three matrix products
that every row contains. Operations are counted by a dispatch mode over forward and backward, here and on a device
whose values nobody can look at, as a GPU's, which waits for each of them. Memory is the peak resident size of a fresh
process during one step less the size before it and less the gradients, in units of one N × k matrix. The error is the
largest of loss, dz and dW against the same loss by autograd in float64, relative; of ours, against the loss in steps
that autograd sees. A profile of one more step says which share of its time the matrix products take. Rows named
`dense` are the loss of the matrix that `CosineLinear` returns, rows named `by hand` that of
`F.normalize(z) @ F.normalize(w).T`.

What one shape measured is stored before the next begins, so whoever interrupts goes on with the shapes that are left.
"""
import argparse
import json
import math
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from time import process_time

import torch
from measure import RESULTS, machine, medians, peak, peak_in_fresh_process
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from largest_margins import losses
from largest_margins.engine.cosines import cosine_matrix
from largest_margins.files import write_file

SHAPES = '256x64x10', '128x512x100', '128x128x1000', '512x512x10000', '512x512x100000'
PRODUCTS = 'aten::mm', 'aten::addmm', 'aten::addmm_'
S, M = 64., .5


def inputs(n, d, k, dtype=torch.float32):
    "Random features, prototypes and targets; the same for every row."
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    prototypes = (.05 * torch.randn(k, d, generator=generator)).to(dtype).requires_grad_()
    return features, prototypes, torch.randint(k, (n,), generator=generator)


def of_function(function):
    "A row from (features, prototypes, targets) → loss."
    def make(n, d, k):
        features, prototypes, targets = inputs(n, d, k)

        def step():
            features.grad = prototypes.grad = None
            function(features, prototypes, targets).backward()
        return step
    return make


def products(n, d, k):
    "The floor: logits, dz and dW, into memory that is there already."
    features, prototypes = (x.detach() for x in inputs(n, d, k)[:2])
    logits, dz, dw = torch.zeros(n, k), torch.zeros_like(features), torch.zeros_like(prototypes)

    def step():
        torch.mm(features, prototypes.T, out=logits)
        torch.mm(logits, prototypes, out=dz)
        torch.mm(logits.T, features, out=dw)
    return step


def scaled_cosines(features, prototypes): return S * F.linear(F.normalize(features), F.normalize(prototypes))


def usual_arcface(features, prototypes, targets):
    "ArcFace as most repositories write it: the margin on the whole matrix, then a one-hot mask."
    cosines = F.linear(F.normalize(features), F.normalize(prototypes))
    sines = (1 - cosines.square()).clamp(0, 1).sqrt()
    moved = cosines * math.cos(M) - sines * math.sin(M)
    moved = torch.where(cosines > -math.cos(M), moved, cosines - M * math.sin(M))
    hot = torch.zeros_like(cosines).scatter_(1, targets[:, None], 1)
    return F.cross_entropy(S * (hot * moved + (1 - hot) * cosines), targets)


def usual_lm(features, prototypes, targets):
    "LM-Softmax by masking the matrix."
    logits = scaled_cosines(features, prototypes)
    own = torch.zeros_like(logits).scatter_(1, targets[:, None], 1).bool()
    return ((logits.masked_fill(own, -math.inf).logsumexp(1) - logits[own]) / S).mean()


def of_metric_learning(name):
    "A row from pytorch-metric-learning, which keeps its prototypes as [d, k]."
    def make(n, d, k):
        from pytorch_metric_learning import losses as others
        features, _, targets = inputs(n, d, k)
        head = getattr(others, name)(num_classes=k, embedding_size=d)

        def step():
            features.grad = head.W.grad = None
            head(features, targets).backward()
        return step
    return make


@cache
def ones(n, device): return torch.ones(n, device=device), torch.ones(n, device=device)


def numbers(targets): return dict(zip(('alpha1', 'alpha2'), ones(len(targets), targets.device)))


CE, HAND, FLOOR = 'cross-entropy', 'cross-entropy of s·cos', 'three products'
OURS = {
    'NormFace': losses.NormFaceLoss(S), 'CosFace': losses.CosFaceLoss(S), 'ArcFace': losses.ArcFaceLoss(S, M),
    'SphereFace': losses.SphereFaceLoss(S), 'GM-Softmax': losses.GMSoftmaxLoss(S, 1.1, .9, -.1, .1),
    'LM-Softmax': losses.LMSoftmaxLoss(S), 'LM-Softmax, log-sum-exp': losses.LMSoftmaxLoss(S, 'logsumexp'),
    'R_sm': losses.SampleMarginLoss(), 'CosFace + 0.5 R_sm': losses.CosFaceLoss(S, sample_margin=.5)}
LINEAR = {name: loss.linear for name, loss in OURS.items()}
DENSE = {name: lambda z, w, y, loss=loss: loss(cosine_matrix(z, w), y) for name, loss in OURS.items()}
PER_SAMPLE, NARROW, FAST = 'GM-Softmax, per sample', 'CosFace, 64 rows', 'ArcFace, oneDNN'
LINEAR[PER_SAMPLE] = lambda z, w, y: OURS['GM-Softmax'].linear(z, w, y, **numbers(y))
LINEAR[NARROW] = lambda z, w, y: OURS['CosFace'].linear(z, w, y, chunk_size=64)
LINEAR[FAST] = OURS['ArcFace'].linear
OTHERS = {
    CE: lambda z, w, y: F.cross_entropy(F.linear(z, w), y),
    HAND: lambda z, w, y: F.cross_entropy(S * F.normalize(z) @ F.normalize(w).T, y),
    'ArcFace, usual code': usual_arcface, 'LM-Softmax, usual code': usual_lm,
    'torch linear_cross_entropy': lambda z, w, y: F.linear_cross_entropy(
        z, w, y, options=torch.nn.LinearCrossEntropyOptions())}
CHECKED = OTHERS | {f'ours, {name}': function for name, function in LINEAR.items()}
STEPS = {name: lambda z, w, y, loss=loss: loss.of_matrix(z, w, y, None, {}) for name, loss in OURS.items()}
STEPS[PER_SAMPLE] = lambda z, w, y: OURS['GM-Softmax'].of_matrix(z, w, y, None, numbers(y))
STEPS |= {NARROW: STEPS['CosFace'], FAST: STEPS['ArcFace']}
EXACT = OTHERS | {f'ours, {name}': function for name, function in STEPS.items()}
ROWS = {
    FLOOR: products, f'{FLOOR}, oneDNN': products,
    **{name: of_function(function) for name, function in OTHERS.items()},
    **{f'metric-learning {name}': of_metric_learning(name) for name in
       ('ArcFaceLoss', 'CosFaceLoss', 'NormalizedSoftmaxLoss', 'SphereFaceLoss')},
    **{f'ours, {name}': of_function(function) for name, function in LINEAR.items()},
    **{f'dense, {name}': of_function(DENSE[name]) for name in OURS},
    **{f'by hand, {name}': of_function(lambda z, w, y, loss=OURS[name]: loss(F.normalize(z) @ F.normalize(w).T, y))
       for name in ('NormFace', 'ArcFace', 'CosFace', 'LM-Softmax')}}


@contextmanager
def onednn():
    "Float32 products by oneDNN, with whatever precision it finds fit: exact here, bf16 where a machine has AMX."
    settings = torch.backends.mkldnn.matmul
    before, settings.fp32_precision = settings.fp32_precision, 'bf16'
    try: yield
    finally: settings.fp32_precision = before


def made(name, shape):
    "The step of a row; those that ask for oneDNN have its products."
    step = ROWS[name](*shape)
    if 'oneDNN' not in name: return step

    def fast():
        with onednn(): step()
    return fast


class Count(TorchDispatchMode):
    "Counts the operations that are dispatched."
    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        return function(*args, **(kwargs or {}))


def rounds_for(k):
    "Short steps are timed more often."
    return 15 if k <= 1000 else 5 if k <= 10_000 else 2


def profiled(step):
    "How many operations a step is, and the share of matrix products in its time."
    with Count() as count: step()
    with profile(activities=[ProfilerActivity.CPU]) as watch: step()
    events = [e for e in watch.key_averages() if e.key.startswith('aten::')]
    times = [sum(e.self_cpu_time_total for e in some) for some in (
        [e for e in events if e.key in PRODUCTS], events)]
    return {'operations': count.operations, 'share of products': round(times[0] / times[1], 3)}


def unseen(name, shape):
    "How many operations a step is on a device whose values nobody looks at, as a GPU; here there are none to see."
    batch = [x.detach().to('meta').requires_grad_(x.is_floating_point()) for x in inputs(*shape)]
    with Count() as count: CHECKED[name](*batch).backward()
    return count.operations


def memory(name, shape):
    "The peak of a process of its own, less the gradients and in units of N × k floats."
    n, d, k = shape
    most = peak_in_fresh_process(__file__, name, '--shapes', 'x'.join(map(str, shape)))
    return (most - 4 * (n + k) * d) / (4 * n * k)


def error(name, shape, dtype=torch.float32):
    "The largest relative error of loss, dz and dW against dense autograd in float64."
    def run(function, dtype):
        features, prototypes, targets = inputs(*shape, dtype)
        value = function(features, prototypes, targets)
        value.backward()
        return [x.double() for x in (value.detach(), features.grad, prototypes.grad)]
    with onednn() if 'oneDNN' in name else nullcontext(): got = run(CHECKED[name], dtype)
    true = run(EXACT[name], torch.float64)
    return float(f'{max(((g - t).norm() / t.norm()).item() for g, t in zip(got, true, strict=True)):.1e}')


def measured(names, shape, rounds):
    "One row for each name."
    k, steps = shape[2], {name: made(name, shape) for name in names}
    times = medians(steps, rounds or rounds_for(k))
    for name, step in steps.items():
        row = {'shape': list(shape), 'row': name, 'machine': machine()}
        for unit, of in (('CE', CE), ('hand', HAND), ('products', FLOOR)):
            row[f'over {unit}'] = round(times[name] / times[of], 3)
        row |= profiled(step)
        if name in (CE, HAND) or 'ours' in name: row['operations unseen'] = unseen(name, shape)
        if FLOOR not in name and k >= 10_000: row['matrices'] = round(memory(name, shape), 3)
        if name in CHECKED and k <= 10_000: row['error'] = error(name, shape)
        if 'ours' in name and k <= 1000: row['error in float64'] = error(name, shape, torch.float64)
        print(row, flush=True)
        yield row


def keep(rows, path):
    "Store rows in the place of the same ones, beside those of other slices; a broken run leaves the old file."
    old = json.loads(path.read_text()) if path.exists() else {'rows': []}
    known = [{'machine': old['machine']} | row for row in old['rows']] + rows
    by_key = {(*row['shape'], row['row']): row for row in known if row['row'] in ROWS}
    order = {name: i for i, name in enumerate(ROWS)}
    table = sorted(by_key.values(), key=lambda row: (row['shape'][2], *row['shape'], order[row['row']]))
    machines = ' and '.join(dict.fromkeys(row['machine'] for row in table))
    write_file(path, json.dumps({'machine': machines, 'rows': table}, indent=1) + '\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', default=','.join(SHAPES), help='N x d x k, comma-separated')
    parser.add_argument('--rows', help='parts of row names, comma-separated; default: all')
    parser.add_argument('--rounds', type=int, help='steps are timed this many times; default: 15, 5, 2 by size')
    parser.add_argument('--out', type=Path, default=RESULTS/'losses.json', help='where the JSON goes')
    parser.add_argument('--peak', help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [tuple(map(int, shape.split('x'))) for shape in options.shapes.split(',')]
    if options.peak:
        ROWS[options.peak](8, 8, 8)()  # loads what is loaded lazily
        return print(peak(made(options.peak, shapes[0])))
    wanted = options.rows.split(',') if options.rows else ['']
    chosen = [name for name in ROWS if name in (FLOOR, CE, HAND) or any(part in name for part in wanted)]
    for shape in shapes:
        start, names = process_time(), [n for n in chosen if shape[2] <= 1000 or not n.startswith(('dense', 'by hand'))]
        keep([*measured(names, shape, options.rounds)], options.out)
        print(f'{shape}: stored after {process_time() - start:.0f} s of CPU', flush=True)


if __name__ == '__main__': main()
