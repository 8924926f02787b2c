"""Everything that needs a GPU, in one command of at most eight minutes: `make gpu-check`.

    python benchmarks/gpu.py                                     # writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --minutes 3 --out gpu.json

1. Correctness: value and gradients of every loss against float64 on the CPU, from float32, bfloat16 and float16
   features, in chunks, dense and lazy, with and without autocast; then margins, predictions and heads.
2. No host sync: forward and backward of each under `torch.cuda.set_sync_debug_mode('error')`.
3. A few batches of training with `margin_learner`, in mixed precision.
4. ResNet-18 on Fashion-MNIST in bfloat16: CE and margin losses with and without R_sm, as many seeds as fit.
5. Time of a step (CUDA events, rows interleaved, medians) and peak memory over the gradients, with TF32 off and on.

Without a GPU it says so, claims nothing and writes nothing. What did not fit into time or memory is listed as left out.
The exit status is 1 if a result is wrong.
"""
import argparse
import json
import math
import platform
import signal
import statistics
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import torch
from losses import OURS, scaled_cosines, usual_arcface, usual_lm
from torch import distributed as dist
from torch.nn import functional as F

from largest_margins import losses, margins
from largest_margins.engine.cosines import cosine_matrix
from largest_margins.files import write_file
from largest_margins.heads import MarginHead, ShardedMarginHead
from largest_margins.regularizers import zero_centroid
from largest_margins.study.tables import processor

RESULTS = Path(__file__).parent/'results'/'gpu.json'
SHAPES = (512, 512, 10_000), (512, 512, 100_000), (1024, 512, 1_000_000)
SMALL = 96, 64, 1000  # where results are compared; 16 is the scale at which float32 can be asked for 2e-6
S, TOLERANCE = 16., 2e-6
EDITS = {
    'NormFace': losses.NormFaceLoss, 'CosFace': partial(losses.CosFaceLoss, margin=.35),
    'ArcFace': partial(losses.ArcFaceLoss, margin=.5), 'SphereFace': partial(losses.SphereFaceLoss, margin=1.5),
    'combined': partial(losses.CombinedMarginLoss, m1=1.3, m2=.4, m3=.2)}
OTHERS = {
    'GM-Softmax': partial(losses.GMSoftmaxLoss, alpha1=1.2, alpha2=.8, beta1=-.1, beta2=.1),
    'LM-Softmax': losses.LMSoftmaxLoss,
    'LM-Softmax, log-sum-exp': partial(losses.LMSoftmaxLoss, aggregation='logsumexp')}


class Report:
    "What was measured, what was wrong, what was left out, and how much time there is."

    def __init__(self, seconds):
        self.start, self.seconds, self.longest = perf_counter(), seconds, 0.
        self.rows, self.left_out = {}, []

    def spent(self): return perf_counter() - self.start

    def left(self): return self.seconds - self.spent()

    def allows(self, name, needs=0.):
        "Whether there is time for a row; if not, it is left out."
        if self.left() > max(needs, 2 * self.longest): return True
        self.leave_out(name, 'no time')
        return False

    def leave_out(self, name, why):
        self.left_out.append(f'{name}: {why}')
        print(f'left out  {self.left_out[-1]}', flush=True)

    def add(self, part, **row):
        self.rows.setdefault(part, []).append(row)
        print(f'{part:12}', ', '.join(f'{k} {v}' for k, v in row.items()), flush=True)

    @contextmanager
    def timed(self):
        start = perf_counter()
        yield
        self.longest = max(self.longest, perf_counter() - start)

    def wrong(self): return [row for rows in self.rows.values() for row in rows if row.get('right') is False]


# --- the same numbers ---

def variants(k):
    "Every loss, plain and with each option that it has."
    weight = torch.linspace(.2, 2, k)
    everywhere = {'class weights': {'weight': weight}, 'class-mean': {'reduction': 'class-mean'}}
    term, smoothing = {'sample margin': {'sample_margin': .5}}, {'label smoothing': {'label_smoothing': .1}}
    counts = [5 + 7 * j % 50 for j in range(k)]
    edits = EDITS | {'LDAM': partial(losses.LDAMLoss, counts)}
    others = OTHERS | {'GM-Softmax, per class': partial(losses.GMSoftmaxLoss, alpha1=.8 + weight / 4, beta2=weight / 9)}
    for family, options in ((edits, everywhere | term | smoothing), (others, everywhere | term)):
        for name, make in family.items():
            yield name, make(scale=S)
            for option, given in options.items(): yield f'{name}, {option}', make(scale=S, **given)
    yield 'R_sm', losses.SampleMarginLoss()
    for option, given in everywhere.items(): yield f'R_sm, {option}', losses.SampleMarginLoss(**given)


def inputs(n, d, k, dtype=torch.float32):
    "Features of a dtype, float32 prototypes and targets, on the CPU; the same on every machine."
    generator = torch.Generator().manual_seed(0)
    features, prototypes = (torch.randn(rows, d, generator=generator) for rows in (n, k))
    return features.to(dtype), prototypes, torch.randint(k, (n,), generator=generator)


def engines(loss, n):
    "The ways from features and prototypes to a loss; smoothed labels need the matrix."
    ways = {'dense': lambda z, w, y: loss(cosine_matrix(z, w), y)}
    if getattr(loss, 'label_smoothing', 0): return ways
    return ways | {'chunks': partial(loss.linear, chunk_size=max(1, n // 4)), 'auto': loss.linear}


def value_and_gradients(function, features, prototypes, targets, context=None):
    "Loss and both gradients; as is usual, only forward runs under autocast."
    leaves = [x.detach().clone().requires_grad_() for x in (features, prototypes)]
    with context or nullcontext(): value = function(*leaves, targets)
    value.backward()
    return [value.detach(), *(x.grad for x in leaves)]


def worst_error(got, true):
    "The relative error that comes closest to what is allowed, and that: 2e-6, or two roundings to half precision."
    def error(g, t):
        distance = ((g.cpu().double() - t).norm() / t.norm()).item()
        allowed = TOLERANCE if g.dtype == torch.float32 else 2 * torch.finfo(g.dtype).eps
        return math.inf if math.isnan(distance) else distance, allowed
    return max((error(g, t) for g, t in zip(got, true, strict=True)), key=lambda e: e[0] / e[1])


def compared(report, name, error, allowed, right=True, **further):
    report.add('correctness', row=name, **further, error=float(f'{error:.2g}'), allowed=float(f'{allowed:.2g}'),
               right=right and error < allowed)


def check_losses(report, device, shape, chosen):
    "Losses on every engine, against float64 on the CPU."
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        batch = inputs(*shape, dtype)
        wide, here = (batch[0].double(), batch[1].double(), batch[2]), [x.to(device) for x in batch]
        for name, loss in chosen:
            row = f'{name}, {str(dtype)[6:]}'
            if not report.allows(row): continue
            with report.timed():
                loss, worst = loss.to('cpu'), {}
                true = value_and_gradients(engines(loss, shape[0])['dense'], *wide)
                for engine, function in engines(loss.to(device), shape[0]).items():
                    worst[engine] = worst_error(value_and_gradients(function, *here), true)
                    half = torch.autocast(device, torch.bfloat16)
                    worst[f'{engine}, autocast'] = worst_error(value_and_gradients(function, *here, half), true)
            where = max(worst, key=lambda e: worst[e][0] / worst[e][1])
            compared(report, row, *worst[where], worst=where)


def check_margins(report, device, shape):
    "Margins, predictions and heads."
    features, prototypes, targets = inputs(*shape)
    wide = cosine_matrix(features.double(), prototypes.double())
    true = margins.sample_margins(wide, targets)
    z, w, y = (x.to(device) for x in (features, prototypes, targets))
    head = MarginHead(shape[1], shape[2], losses.NormFaceLoss(), device=device)
    with torch.no_grad(): head.weight.copy_(w)
    numbers = {
        'class_margin': (margins.class_margin(w), margins.class_margin(prototypes.double())),
        'norm_ratio': (margins.norm_ratio(w), margins.norm_ratio(prototypes.double())),
        'zero_centroid': (zero_centroid(w), zero_centroid(prototypes.double())),
        'CosineLinear': (head(z).detach(), wide),
        'sample_margins': (margins.sample_margins(head(z), y).detach(), true),
        'MarginHead.sample_margins': (head.sample_margins(z, y), true),
        'MarginHead.top': (head.top(z)[0][:, 0], wide.amax(1)),
        'min_sample_margin': (margins.min_sample_margin(head(z), y).detach(), true.amin())}
    for name, (got, exact) in numbers.items():
        compared(report, name, *worst_error([got], [exact]), right=got.device.type == device)
    report.add('correctness', row='classes of MarginHead.top',
               right=torch.equal(head.top(z)[1][:, 0].cpu(), wide.argmax(1)))


@contextmanager
def own_group(device):
    "A process group of this process alone."
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo', store=dist.HashStore(), rank=0, world_size=1)
    try: yield
    finally: dist.destroy_process_group()


# --- no host sync ---

@contextmanager
def no_sync(device):
    "Any wait of the CPU for the GPU raises."
    if device != 'cuda': return (yield)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try: yield
    finally: torch.cuda.set_sync_debug_mode('default')


def watched(report, device, name, step):
    "Whether a step runs without a wait, after two that warm up."
    if not report.allows(name): return
    with report.timed():
        for _ in range(2): step()
        waits = ''
        try:
            with no_sync(device): step()
        except RuntimeError as e: waits = str(e).splitlines()[0]
    if device == 'cuda': report.add('no sync', row=name, right=not waits, **({'waits': waits} if waits else {}))


def check_syncs(report, device, shape, chosen):
    "Forward and backward of each loss, on each engine, and of a head whose classes are shared out."
    batch = [x.to(device) for x in inputs(*shape)]
    for name, loss in chosen:
        for engine, function in engines(loss.to(device), shape[0]).items():
            watched(report, device, f'{name}, {engine}', partial(value_and_gradients, function, *batch))
    with own_group(device):
        z, _, y = batch
        for name, loss in chosen:
            if getattr(loss, 'label_smoothing', 0): continue
            head = ShardedMarginHead(shape[1], shape[2], loss, device=device)
            def step(head=head): head(z.requires_grad_(), y).backward()
            watched(report, device, f'{name}, shared out', step)


# --- training ---

def train(report, device):
    "Some batches of random images with `margin_learner`; in mixed precision on a GPU."
    from fastai.callback.fp16 import MixedPrecision
    from fastai.data.core import DataLoaders

    from largest_margins.callbacks import DeferredReweighting, SampleMarginRegularizer
    from largest_margins.learner import margin_learner
    from largest_margins.training.bodies import ConvBody
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(1, 16, 16, generator=generator), torch.tensor(i % 10)) for i in range(64)]
    for name, loss in (('ArcFace', losses.ArcFaceLoss(16.)), ('LM-Softmax', losses.LMSoftmaxLoss()),
                       ('LDAM', losses.LDAMLoss([5] * 10))):
        if not report.allows(f'training, {name}', 20 if device == 'cuda' else 0): continue
        dls = DataLoaders.from_dsets(data, data, bs=16, num_workers=0, device=torch.device(device))
        dls.c = 10
        further = [MixedPrecision()] if device == 'cuda' else []
        learn = margin_learner(dls, ConvBody(1, (8, 16)), loss, cbs=[
            *further, SampleMarginRegularizer(), DeferredReweighting([5] * 10, 1)])
        with report.timed(), learn.no_bar(), learn.no_logging(): learn.fit(2)
        values = [float(v) for v in learn.recorder.losses]
        where = next(learn.model.parameters()).device.type
        report.add('training', row=name, losses=[round(v, 3) for v in values],
                   right=all(map(math.isfinite, values)) and where == device)


STUDY = dict(dataset='fashion_mnist', body='resnet18', embedding=None, epochs=5, batch_size=256, schedule='cosine',
             learning_rate=.1, weight_decay=1e-4, shift=2, flip=True, bf16=True)
QUICK = dict(STUDY, dataset='digits', body='conv2-narrow', epochs=1, shift=0)


def study(report, settings, seconds, most_seeds):
    "Trainings of five rows, seed by seed, until the time for them is over."
    from largest_margins.study.experiments import Configuration, train
    end = report.spent() + min(seconds, report.left() / 2)
    rows = [('CE', dict(loss='ce')), ('CE + 0.5 R_sm', dict(loss='ce', sample_margin=.5)),
            ('NormFace s=20', dict(loss='normface')),
            ('NormFace s=20 + 0.5 R_sm', dict(loss='normface', sample_margin=.5)),
            ('LM-Softmax s=20', dict(loss='lm-softmax'))]
    for seed in range(most_seeds):
        for name, changes in rows:
            if report.spent() > end: return report.leave_out(f'study, {name}, seed {seed}', 'no time')
            try: found = train(Configuration(**settings, **changes, seed=seed))
            except FileNotFoundError as e: return report.leave_out('study', str(e))
            report.add('study', row=name, seed=seed, epochs=settings['epochs'], body=settings['body'],
                       accuracy=round(found.accuracy, 2), class_margin=round(found.class_margin, 2),
                       mean_sample_margin=round(found.mean_sample_margin, 3), seconds=round(found.seconds, 1),
                       right=not found.diverged)


# --- time and memory ---

def of_function(function, features, prototypes, targets):
    "A step from (features, prototypes, targets) → loss."
    def step():
        features.grad = prototypes.grad = None
        function(features, prototypes, targets).backward()
    return step, [features, prototypes]


def of_metric_learning(features, prototypes, targets):
    "ArcFace of pytorch-metric-learning, which keeps its prototypes as [d, k]."
    from pytorch_metric_learning import losses as theirs
    head = theirs.ArcFaceLoss(num_classes=len(prototypes), embedding_size=features.shape[1]).to(features.device)

    def step():
        features.grad = head.W.grad = None
        head(features, targets).backward()
    return step, [features, head.W]


def rows():
    "What is timed: the others, and ours in chunks and with all rows at once."
    def whole(loss): return lambda z, w, y: loss.linear(z, w, y, chunk_size=len(z))
    others = {'cross-entropy': lambda z, w, y: F.cross_entropy(F.linear(z, w), y),
              'cross-entropy of s·cos': lambda z, w, y: F.cross_entropy(scaled_cosines(z, w), y),
              'ArcFace, usual code': usual_arcface, 'LM-Softmax, usual code': usual_lm}
    if hasattr(F, 'linear_cross_entropy'):
        others['torch linear_cross_entropy'] = lambda z, w, y: F.linear_cross_entropy(
            z, w, y, options=torch.nn.LinearCrossEntropyOptions())
    ours = {f'ours, {name}': loss.linear for name, loss in OURS.items()}
    ours |= {f'ours, {name}, all rows': whole(OURS[name]) for name in ('CosFace', 'ArcFace')}
    steps = {name: partial(of_function, function) for name, function in (others | ours).items()}
    if find_spec('pytorch_metric_learning'): steps['metric-learning ArcFace'] = of_metric_learning
    return steps


def seconds(step, device):
    "Time of one step: by CUDA events, or by the clock on a CPU."
    if device != 'cuda':
        start = perf_counter()
        step()
        return perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def peak(step, leaves):
    "Bytes that one step allocates at most, less the gradients that it leaves."
    for x in leaves: x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.grad.nbytes for x in leaves)


def batch_on(device, n, d, k):
    "Features and prototypes that want gradients, and targets, made where they are needed."
    generator = torch.Generator(device).manual_seed(0)
    features, prototypes = (torch.randn(rows, d, generator=generator, device=device) for rows in (n, k))
    return (features.requires_grad_(), prototypes.mul_(.05).requires_grad_(),
            torch.randint(k, (n,), generator=generator, device=device))


def ready(report, device, name, make, batch):
    "A step that has run twice, its leaves and the time it takes; None if it cannot run here."
    try:
        step, leaves = make(*batch)
        step()
        return step, leaves, seconds(step, device)
    except (torch.OutOfMemoryError, NotImplementedError) as e: why = f'{type(e).__name__}'
    except RuntimeError as e:
        if name.startswith('ours'): raise
        why = str(e).splitlines()[0]
    report.leave_out(name, why)


def measure(report, device, shape, budget, rounds):
    "Medians of interleaved steps, and the memory of one, with TF32 off and on."
    end, batch, steps, times, memory = perf_counter() + budget, batch_on(device, *shape), {}, {}, {}
    for precision in ('highest', 'high'):
        if precision == 'high' and device != 'cuda': continue
        for name, make in rows().items():
            row = f'{"x".join(map(str, shape))} {name}{", TF32" * (precision == "high")}'
            if perf_counter() > end: report.leave_out(row, 'no time')
            elif report.allows(row):
                torch.set_float32_matmul_precision(precision)
                with report.timed(): found = ready(report, device, row, make, batch)
                if found is None: continue
                step, leaves, _ = found
                if device == 'cuda': memory[row] = peak(step, leaves)
                for x in leaves: x.grad = None
                steps[row], times[row] = (precision, name, step, leaves), []
    for _ in range(rounds):
        if perf_counter() > end: break
        for row, (precision, _, step, leaves) in steps.items():
            if not report.left() > 2 * report.longest: break
            torch.set_float32_matmul_precision(precision)
            times[row].append(seconds(step, device))
            for x in leaves: x.grad = None
    torch.set_float32_matmul_precision('highest')
    medians = {row: statistics.median(t) for row, t in times.items() if t}
    plain = {p: medians.get(row) for row, (p, name, *_) in steps.items() if name == 'cross-entropy'}
    for row, (precision, name, *_) in steps.items():
        if row not in medians: report.leave_out(row, 'no time')
        else: report.add(
            'time', shape=list(shape), row=name, tf32=precision == 'high', milliseconds=round(1e3 * medians[row], 4),
            rounds=len(times[row]), over_ce=round(medians[row] / plain[precision], 3) if plain.get(precision) else None,
            mebibytes=round(memory[row] / 2**20, 1) if row in memory else None)


def measure_all(report, device, shapes, rounds):
    "Each shape gets its part of the time that is left."
    for i, shape in enumerate(shapes):
        name = 'x'.join(map(str, shape))
        if not report.allows(name): continue
        try: measure(report, device, shape, report.left() / (len(shapes) - i), rounds)
        except torch.OutOfMemoryError as e: report.leave_out(name, type(e).__name__)
        if device == 'cuda': torch.cuda.empty_cache()


# --- one command ---

def machine(device):
    "What the numbers were measured on."
    found = {'device': processor(), 'python': platform.python_version(),
             'torch': torch.__version__, 'largest_margins': version('largest_margins')}
    if device != 'cuda': return found
    properties = torch.cuda.get_device_properties(0)
    return found | {'device': properties.name, 'capability': f'{properties.major}.{properties.minor}',
                    'memory': properties.total_memory, 'cuda': torch.version.cuda,
                    'cudnn': torch.backends.cudnn.version()}


def store(report, device, path):
    "The machine and the rows as JSON."
    write_file(path, json.dumps(machine(device) | {
        'seconds': round(report.spent(), 1), 'right': not report.wrong(), **report.rows, 'left out': report.left_out},
        indent=1, ensure_ascii=False) + '\n')


def time_is_up(*_): raise TimeoutError('the time is up')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, help='where the JSON goes, default: benchmarks/results/gpu.json')
    parser.add_argument('--minutes', type=float, default=8, help='the most it may take, default %(default)s')
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda', help=argparse.SUPPRESS)
    parser.add_argument('--quick', action='store_true', help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, out = options.device, options.out or (RESULTS if options.device == 'cuda' else None)
    if device == 'cuda' and not torch.cuda.is_available():
        return print('No GPU is present: nothing was run, and nothing is claimed.')
    report = Report(60 * options.minutes - 15)
    small, shapes, every, rounds = ((16, 8, 20), [(16, 8, 20)], 8, 2) if options.quick else (SMALL, SHAPES, 1, 25)
    chosen = list(variants(small[2]))[::every]
    torch.set_float32_matmul_precision('highest')
    signal.signal(signal.SIGALRM, time_is_up)
    signal.setitimer(signal.ITIMER_REAL, max(report.seconds, 1e-3))
    try:
        check_losses(report, device, small, chosen)
        check_margins(report, device, small)
        check_syncs(report, device, small, chosen)
        train(report, device)
        study(report, *((QUICK, 60, 1) if options.quick else (STUDY, 180, 10)))
        measure_all(report, device, shapes, rounds)
    except TimeoutError as e: report.leave_out('everything after the last row', str(e))
    signal.setitimer(signal.ITIMER_REAL, 0)
    if out: store(report, device, out)
    wrong = report.wrong()
    print(f'{sum(map(len, report.rows.values()))} rows in {report.spent():.0f} s, {len(wrong)} wrong, '
          f'{len(report.left_out)} left out')
    return 1 if wrong else 0


if __name__ == '__main__': raise SystemExit(main())
