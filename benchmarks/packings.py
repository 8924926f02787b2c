"""The best packings known at many sizes, for the margin calculator: `python benchmarks/packings.py`.

Up to 50 classes have 400 starts of `best_packing` in space and 40 beyond; more have 4 to 1, in space those that
`best_packing` takes by itself; all from seed 0. A size that `benchmarks/results/packings.json` has is not searched
again, so that a broken run goes on; `--fresh` begins anew. `85,3 38,7 --seeds 1 2` searches these sizes again, as
`best_packing` does by itself, and keeps what is no worse, so that `how` says how to repeat it; each row names the
machine of its search, and the newer ones what it reached.
Then each size gets the best of four: what its search found, the code that the package stores with its certificate, the
best construction that contains it, and the best entry for more points or fewer dimensions. Each construction is a size
of its own, with at most 1000 of its points.
"""
import argparse
import json
import math
from fractions import Fraction
from time import process_time

import torch
from measure import RESULTS, machine

from largest_margins.bounds import class_margin_bound, stored_certificates
from largest_margins.codes import best_packing
from largest_margins.files import write_file
from largest_margins.margins import class_margin
from largest_margins.theory.constructions import constructions, known_packing

FILE = RESULTS/'packings.json'
DIMENSIONS = (*range(3, 9), 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SPACE = (41, 42, 43, *range(70, 131, 5))  # more in three dimensions, to compare with Sloane's tables
MANY = (48, 56, 64, 100, 120, 128, 200, 240, 256, 500, 1000)


def sizes():
    "Classes and dimensions that are searched, without those whose best packing is a formula."
    few = [(k, d) for d in range(3, 9) for k in range(2 * d + 1, 41)]
    many = [(k, d) for k in MANY for d in DIMENSIONS if k > 2 * d]
    return few + sorted({*many, *((k, 3) for k in SPACE)})


def built_sizes():
    "Classes and dimensions of the constructions."
    return {(min(code.k, 1000), code.d) for code in constructions() if min(code.k, 1000) > 2 * code.d}


def planned(k, d):
    "How many starts a size has."
    if d == 3: return 400 if k <= 50 else None
    return 40 if k <= 50 else min(4, max(1, 2000 // (k * d) + 1))


def search(k, d, starts, seed=0):
    "What was found at a size, and the bound beside it, in degrees."
    start, done = process_time(), []
    packing = best_packing(k, d, seed=seed, starts=starts, progress=lambda *told: done.append(told))
    return {'k': k, 'd': d, 'starts': starts or len(done), 'class_margin': math.degrees(packing.class_margin),
            'how': packing.how, 'bound': math.degrees(packing.bound), 'seconds': round(process_time() - start, 2),
            'optimum': packing.optimum, 'machine': machine()}


def built(k, d):
    "A size that only a construction has."
    return {'k': k, 'd': d, 'class_margin': 0., 'how': '',
            'bound': math.degrees(class_margin_bound(k, d, 'levenshtein').radians)}


def keep(rows):
    "Store the rows, and the machines that searched; a broken run leaves the old file."
    machines = ' and '.join(dict.fromkeys(row['machine'] for row in rows if 'machine' in row))
    write_file(FILE, json.dumps({'machine': machines, 'rows': rows}, indent=1) + '\n')


def completed(rows):
    "The rows, each with the best of its search, the constructions, all rows that contain it, and what is certified."
    best = []

    def improve(row, margin, how):
        "Rounding apart, a row is never below what it could have instead."
        if margin > row['class_margin'] + 1e-9:
            row.update(class_margin=margin, how=how)
            row.pop('optimum', None)  # of the search

    codes, bounds = ({(c['k'], c['d']): math.degrees(Fraction(c['radians']))
                      for c in stored_certificates() if c['kind'] == kind} for kind in ('code', 'three-point'))
    for row in sorted(rows, key=lambda row: (row['d'], -row['k'])):  # what contains a row comes before it
        improve(row, codes.get((row['k'], row['d']), 0), 'search, other seeds')
        row['bound'] = min(row['bound'], bounds.get((row['k'], row['d']), 180.))
        if known := known_packing(row['k'], row['d']):
            improve(row, math.degrees(class_margin(known[0]).item()), known[1])
        for other in best:
            if other['k'] >= row['k']:
                improve(row, other['class_margin'], f'of {other["k"]} points in {other["d"]} dimensions')
        best.append(row)
    return sorted(best, key=lambda row: (row['d'], row['k']))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--fresh', action='store_true', help='search every size again')
    parser.add_argument('sizes', nargs='*', metavar='K,D', help='only these sizes, and again')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='of the searches of these sizes')
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = {'rows': []} if args.fresh or not FILE.exists() else json.loads(FILE.read_text())
    rows = {(row['k'], row['d']): row for row in table['rows']}
    for row in rows.values():
        if 'seconds' in row: row.setdefault('machine', table['machine'])
    again = [(*map(int, size.split(',')), None, seed) for size in args.sizes for seed in args.seeds]
    waiting = again or [(k, d, planned(k, d), 0) for k, d in sizes() if (k, d) not in rows]
    for n, (k, d, starts, seed) in enumerate(waiting, 1):
        row, known = search(k, d, starts, seed), rows.get((k, d))
        if not known or row['class_margin'] > known['class_margin'] - 1e-9: rows[k, d] = row
        keep(sorted(rows.values(), key=lambda row: (row['d'], row['k'])))
        print(f'{n} of {len(waiting)}: k={k} d={d} seed {seed} {row["class_margin"]:.7f}° '
              f'of at most {row["bound"]:.3f}°, {row["seconds"]} s', flush=True)
    rows |= {(k, d): built(k, d) for k, d in sorted(built_sizes() - rows.keys())}
    keep(completed(rows.values()))


if __name__ == '__main__':
    main()
