"""The best packings found at many sizes, for the margin calculator: `python benchmarks/packings.py`.

Up to 40 classes have 40 random starts of `best_packing`, more classes have 4 to 1, all from seed 0. A size that
`benchmarks/results/packings.json` has is not searched again, so that a broken run goes on; `--fresh` begins anew.
"""
import argparse
import json
import math
from time import process_time

import torch
from measure import RESULTS, store

from largest_margins.codes import best_packing

FILE = RESULTS/'packings.json'
DIMENSIONS = (*range(3, 9), 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MANY = (48, 56, 64, 100, 120, 128, 200, 240, 256, 500, 1000)


def sizes():
    "Classes and dimensions, without those whose best packing is a formula."
    few = [(k, d) for d in range(3, 9) for k in range(2 * d + 1, 41)]
    many = [(k, d) for k in MANY for d in DIMENSIONS if k > 2 * d]
    return few + many


def search(k, d):
    "What was found at a size, and the bound beside it, in degrees."
    start, starts = process_time(), 40 if k <= 40 else min(4, max(1, 2000 // (k * d) + 1))
    packing = best_packing(k, d, starts=starts)
    return {'k': k, 'd': d, 'starts': starts, 'class_margin': math.degrees(packing.class_margin),
            'bound': math.degrees(packing.bound), 'seconds': round(process_time() - start, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--fresh', action='store_true', help='search every size again')
    fresh = parser.parse_args().fresh
    torch.set_num_threads(1)
    rows = [] if fresh or not FILE.exists() else json.loads(FILE.read_text())['rows']
    done = {(row['k'], row['d']) for row in rows}
    waiting = [size for size in sizes() if size not in done]
    for n, (k, d) in enumerate(waiting, 1):
        rows.append(search(k, d))
        store(sorted(rows, key=lambda row: (row['d'], row['k'])), FILE)
        print(f'{n} of {len(waiting)}: k={k} d={d} {rows[-1]["class_margin"]:.6f}° '
              f'of at most {rows[-1]["bound"]:.3f}°, {rows[-1]["seconds"]} s', flush=True)


if __name__ == '__main__':
    main()
