"What the benchmarks share: interleaved times, the peak memory of a fresh process, and how results are stored."
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from time import process_time

import torch

from largest_margins.files import write_file

RESULTS = Path(__file__).parent/'results'


def medians(steps, rounds, least=.05):
    "Median CPU times in seconds of steps that take turns, in a new order each round; short ones fill `least` seconds."
    repeats, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        step()
        start = process_time()
        step()
        took = process_time() - start
        repeats[name] = max(1, int(least / (took + 1e-6)))
        if repeats[name] == 1: times[name].append(took)  # a long step counts from the first one that is warm
    order, shuffle = list(steps.items()), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)  # what ran before leaves the heap and the caches in some state
        for name, step in order:
            start = process_time()
            for _ in range(repeats[name]): step()
            times[name].append((process_time() - start) / repeats[name])
    return {name: statistics.median(t) for name, t in times.items()}


def resident(key):
    "A number of this process's status, in bytes."
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(key): return int(line.split()[1]) * 1024


def peak(step):
    "Bytes that one step adds to this process at most."
    Path('/proc/self/clear_refs').write_text('5')
    before = resident('VmRSS')
    step()
    return resident('VmHWM') - before


def peak_in_fresh_process(script, name, *arguments):
    "What `script --peak name …` prints: the `peak` of a row that has a process of its own."
    done = subprocess.run([sys.executable, script, '--peak', name, *arguments], capture_output=True, text=True,
                          check=True)
    return int(done.stdout)


def machine():
    "What the numbers were measured on."
    from largest_margins.study.tables import processor  # here, since it imports much
    return f'{processor()}, one thread, torch {torch.__version__}'


def store(rows, path):
    "Write the machine and the rows as JSON; a broken run leaves the old file."
    write_file(path, json.dumps({'machine': machine(), 'rows': rows}, indent=1) + '\n')
