"""Time and memory of what is measured on prototypes and features, against what any code must do.

    python benchmarks/margins.py                                 # the stored table: benchmarks/results/margins.json
    python benchmarks/margins.py --rows 'class margin' --rounds 3 --out mine.json

Every row is one function at one size, beside a unit of the same size: half the product of the prototypes with
themselves (each pair once), one pass over them (their sum), or the product of features and prototypes. Rows of a size
take turns with their unit in one process, on one thread, and the ratio of median CPU times is stored. Memory is the
peak resident size of a fresh process during one call, less the size before it and less the gradient.
"""
import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import RESULTS, medians, peak, peak_in_fresh_process, store
from torch.nn import functional as F

from largest_margins.losses import SampleMarginLoss
from largest_margins.margins import class_margin, norm_ratio
from largest_margins.regularizers import zero_centroid


@dataclass(frozen=True)
class Row:
    "A function at one size."
    name: str
    make: Callable  # from the size to a step, a function of nothing
    shape: tuple[int, ...]
    unit: str  # what its time is divided by
    gradients: int = 0  # numbers that a step leaves behind


def random_prototypes(k, d):
    "The same for every row."
    return .05 * torch.randn(k, d, generator=torch.Generator().manual_seed(0))


def of_function(function):
    "A step from a function of prototypes."
    def make(k, d):
        prototypes = random_prototypes(k, d)
        return lambda: function(prototypes)
    return make


def of_gradient(function):
    "A step with the gradient."
    def make(k, d):
        prototypes = random_prototypes(k, d).requires_grad_()

        def step():
            prototypes.grad = None
            function(prototypes).backward()
        return step
    return make


def half_product(k, d, size=1024):
    "The inner products of half the prototypes with all, a tile at a time, into memory that is there already."
    prototypes, buffer = random_prototypes(k, d), torch.zeros(size * size)

    def step():
        for left in prototypes[:k // 2].split(size):
            for right in prototypes.split(size):
                torch.mm(right, left.T, out=buffer[:len(left) * len(right)].view(len(right), len(left)))
    return step


def random_features(n, d, k):
    "Features, prototypes and targets."
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, d, generator=generator), random_prototypes(k, d), torch.randint(k, (n,), generator=generator)


def of_features(function):
    "A step from a function of features, prototypes and targets."
    def make(n, d, k):
        batch = random_features(n, d, k)
        return lambda: function(*batch)
    return make


def whole_product(n, d, k, size=1024):
    "The inner products of features and prototypes, some rows at a time, into memory that is there already."
    features, prototypes, _ = random_features(n, d, k)
    buffer = torch.zeros(size, k)

    def step():
        for part in features.split(size): torch.mm(part, prototypes.T, out=buffer[:len(part)])
    return step


def our_sample_margins(features, prototypes, targets):
    return -SampleMarginLoss(reduction='none').linear(features, prototypes, targets)


def usual_sample_margins(features, prototypes, targets):
    "The whole matrix of cosines, and the two largest of each row."
    cosines = F.normalize(features) @ F.normalize(prototypes).T
    own, (values, where) = cosines.gather(1, targets[:, None])[:, 0], cosines.topk(2)
    return own - torch.where(where[:, 0] == targets, values[:, 1], values[:, 0])


def usual_class_margin(prototypes):
    "The whole matrix of cosines."
    unit = F.normalize(prototypes)
    return (unit @ unit.T).fill_diagonal_(-1).max().acos()


def usual_norm_ratio(prototypes):
    norms = prototypes.norm(dim=1)
    return norms.max() / norms.min()


def usual_zero_centroid(prototypes): return F.normalize(prototypes).mean(0).square().sum()


PRODUCT, PASS, WHOLE = 'half a product', 'one pass', 'the product'
UNITS = {PRODUCT: half_product, PASS: of_function(torch.sum), WHOLE: whole_product}
LARGE, MIDDLE, LONG, MANY = (50_000, 512), (10_000, 128), (1_000_000, 64), (20_000, 512, 10_000)
ROWS = [
    Row('class margin', of_function(class_margin), LARGE, PRODUCT),
    Row('class margin', of_function(class_margin), MIDDLE, PRODUCT),
    Row('class margin, usual code', of_function(usual_class_margin), MIDDLE, PRODUCT),
    Row('sample margins', of_features(our_sample_margins), MANY, WHOLE),
    Row('sample margins, usual code', of_features(usual_sample_margins), MANY, WHOLE),
    Row('norm ratio', of_function(norm_ratio), LONG, PASS),
    Row('norm ratio, usual code', of_function(usual_norm_ratio), LONG, PASS),
    Row('zero centroid', of_gradient(zero_centroid), LONG, PASS, 64_000_000),
    Row('zero centroid, usual code', of_gradient(usual_zero_centroid), LONG, PASS, 64_000_000)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', help='parts of row names, comma-separated; default: all')
    parser.add_argument('--rounds', type=int, default=5, help='steps are timed this many times')
    parser.add_argument('--out', type=Path, default=RESULTS/'margins.json', help='where the JSON goes')
    parser.add_argument('--peak', help=argparse.SUPPRESS)
    parser.add_argument('--shape', help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        row, shape = next(r for r in ROWS if r.name == options.peak), list(map(int, options.shape.split('x')))
        row.make(*(min(n, 600) for n in shape))()  # loads what is loaded lazily
        return print(peak(row.make(*shape)))
    wanted = options.rows.split(',') if options.rows else ['']
    chosen = [row for row in ROWS if any(part in row.name for part in wanted)]
    table = []
    for shape, unit in dict.fromkeys((row.shape, row.unit) for row in chosen):
        rows = [row for row in chosen if (row.shape, row.unit) == (shape, unit)]
        times = medians({unit: UNITS[unit](*shape)} | {row.name: row.make(*shape) for row in rows}, options.rounds)
        for row in rows:
            most = peak_in_fresh_process(__file__, row.name, '--shape', 'x'.join(map(str, shape))) - 4 * row.gradients
            table.append({'shape': list(shape), 'row': row.name, 'unit': unit,
                          'time': round(times[row.name] / times[unit], 3), 'MiB': round(most / 2**20, 1)})
            print(table[-1], flush=True)
    store(table, options.out)


if __name__ == '__main__': main()
