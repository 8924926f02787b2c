"""Finds the certificates that the package stores: `nice -n 15 python benchmarks/certificates.py`, hours on one core.

For each size a `code`, from the best packing that some seeds find, and a `three-point` bound, if it beats the other
bounds by more than a hundredth of a degree. What is stored is replaced only by something better, so a broken run goes
on where it was; `8,3 24,4 --degree 8` looks at these sizes again. Needs the extra `bounds`.
"""
import argparse
import json
import math
from fractions import Fraction
from pathlib import Path
from time import process_time

import torch

import largest_margins
from largest_margins.bounds import class_margin_bound, code_certificate
from largest_margins.codes import best_packing
from largest_margins.theory.three_point import three_point_certificate

FILE = Path(largest_margins.__file__).parent/'certificates.json'
DEGREES = {3: 8, 4: 7, 5: 6, 6: 5, 7: 5, 8: 5}
HUNDREDTH = math.radians(.01)


def sizes():
    "More than 2d classes, up to 32, in 3 to 8 dimensions."
    return [(k, d) for d in DEGREES for k in range(2 * d + 1, 33)]


def other_bounds(k, d):
    "The least bound by other methods, radians."
    methods = ['delsarte', 'levenshtein', *['fejes-toth'] * (d == 3)]
    return min(class_margin_bound(k, d, method).radians for method in methods)


def angle(certificate):
    return Fraction(certificate['radians'])


def stored():
    "(kind, k, d) -> certificate."
    if not FILE.exists(): return {}
    return {(c['kind'], c['k'], c['d']): c for c in json.loads(FILE.read_text())}


def store(certificate):
    "Write a certificate into the file, one to a line, if it says more than the one there."
    known, key = stored(), tuple(certificate[name] for name in ('kind', 'k', 'd'))
    if key in known:
        sharper = angle(certificate) > angle(known[key])
        if sharper != (certificate['kind'] == 'code'): return
    known[key] = certificate
    by_dimension = sorted(known, key=lambda key: (key[0], key[2], key[1]))
    lines = [json.dumps(known[key], separators=(',', ':')) for key in by_dimension]
    FILE.write_text('[\n' + ',\n'.join(lines) + '\n]\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('sizes', nargs='*', metavar='K,D', help='only these sizes, and again')
    parser.add_argument('--degree', type=int, help='of the polynomials; higher is sharper and slower')
    parser.add_argument('--room', type=float, default=1e-4, help='below zero; less is sharper, and slower to verify')
    parser.add_argument('--kind', choices=['code', 'three-point'], help='only one of the two')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='of the searches for a code')
    args = parser.parse_args()
    torch.set_num_threads(1)
    for k, d in [tuple(map(int, size.split(','))) for size in args.sizes] or sizes():
        done = set() if args.sizes else set(stored())
        if ('code', k, d) not in done and args.kind != 'three-point':
            start = process_time()
            packings = [best_packing(k, d, seed=seed) for seed in args.seeds]
            best = max(packings, key=lambda packing: packing.class_margin)
            store(code := code_certificate(best.points))
            print(f'k={k} d={d} code {math.degrees(angle(code)):.6f}°, {process_time() - start:.1f} s', flush=True)
        if ('three-point', k, d) not in done and args.kind != 'code':
            start, others, degree = process_time(), other_bounds(k, d), args.degree or DEGREES[d]
            found = three_point_certificate(k, d, degree, radians=others, room=args.room)
            if found and angle(found) < others - HUNDREDTH: store(found)
            line = f'{math.degrees(angle(found)):.4f}°' if found else 'no better'
            print(f'k={k} d={d} three-point of degree {degree} {line}, others {math.degrees(others):.4f}°, '
                  f'{process_time() - start:.1f} s', flush=True)


if __name__ == '__main__':
    main()
