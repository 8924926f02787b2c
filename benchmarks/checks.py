"""What the value checks of a loss cost: `python benchmarks/checks.py [--pairs 40] [--loss ArcFaceLoss]`.

One step is features 512 × 512 → CosineLinear of 10 000 classes → loss → backward, on one thread. Steps with the checks
and without them alternate in one process, and the medians of their CPU times are compared, so that whatever else the
machine does falls on both. The checks are also timed alone, which is less noisy than the difference of two long steps.
"""
import argparse
import statistics
from contextlib import contextmanager
from time import process_time

import torch

from largest_margins import losses, margins
from largest_margins.heads import CosineLinear


@contextmanager
def unchecked():
    "No value is looked at, as on a GPU; shapes and dtypes still are."
    kept = margins.values_are_cheap
    for module in (margins, losses): module.values_are_cheap = lambda x: False
    try: yield
    finally:
        for module in (margins, losses): module.values_are_cheap = kept


def seconds(work):
    "CPU time of one call."
    start = process_time()
    work()
    return process_time() - start


def measure(loss, pairs, samples=512, dimension=512, classes=10_000):
    "Medians in seconds: a step with the checks, a step without them, the checks alone with and without their values."
    torch.manual_seed(0)
    head = CosineLinear(dimension, classes)
    features = torch.randn(samples, dimension, requires_grad=True)
    targets = torch.randint(classes, (samples,))
    cosines = head(features).detach()

    def step():
        head.weight.grad = features.grad = None
        loss(head(features), targets).backward()

    def check(): margins.check_cosines(cosines, targets)

    times = {(work, bare): [] for work in (step, check) for bare in (False, True)}
    for i in range(pairs + 3):
        for work, bare in times:
            if bare:
                with unchecked(): spent = seconds(work)
            else: spent = seconds(work)
            if i >= 3: times[work, bare].append(spent)  # the first ones warm up
    return [statistics.median(values) for values in times.values()]


def main():
    parser = argparse.ArgumentParser(description='The share of a training step that goes into checking values.')
    parser.add_argument('--pairs', type=int, default=40, help='how many steps of each kind, default %(default)s')
    parser.add_argument('--loss', default='ArcFaceLoss', help='a loss of largest_margins.losses, default %(default)s')
    given = parser.parse_args()
    torch.set_num_threads(1)
    checked, bare, check, shapes = measure(getattr(losses, given.loss)(), given.pairs)
    print(f'step {1000 * checked:.1f} ms, without looking at values {1000 * bare:.1f} ms: '
          f'{checked / bare - 1:+.1%} (goal ≤ 3 %)')
    print(f'the checks alone {1000 * check:.2f} ms, without values {1000 * shapes:.2f} ms: '
          f'{(check - shapes) / bare:.1%} of a step')


if __name__ == '__main__': main()
