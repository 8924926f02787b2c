"Options by pairs: every two values of different options meet, far fewer tests than all combinations."
from itertools import combinations

from torch import Tensor


def pairs(*options):
    "Few combinations of options, in which every two values of different options meet."
    values = [(i, n) for i, option in enumerate(options) for n in range(len(option))]
    missing = {frozenset(two) for two in combinations(values, 2) if two[0][0] != two[1][0]}
    rows = []
    while missing:
        row = dict(min(missing, key=sorted))
        for i in set(range(len(options))) - row.keys():
            met = [sum(frozenset([(i, n), other]) in missing for other in row.items()) for n in range(len(options[i]))]
            row[i] = met.index(max(met))
        missing -= {frozenset(two) for two in combinations(row.items(), 2)}
        rows.append(tuple(option[row[i]] for i, option in enumerate(options)))
    return rows


def named(option):
    "A value in the name of a test."
    return 'tensor' if isinstance(option, Tensor) else str(option)
