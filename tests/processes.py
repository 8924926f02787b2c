"""Processes that start in no time: forks of one that has loaded the libraries, which takes others seconds.

One alone, or several on this machine that are joined into a gloo process group; and what they return.
"""
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

PRELOADED = ['fastai.vision.all', 'torch.distributed.checkpoint.state_dict', 'torch.distributed.tensor', 'torchvision',
             'matplotlib.pyplot', 'sklearn.datasets', 'nbdev.test', 'pytest']


def context():
    "What starts processes."
    found = multiprocessing.get_context('forkserver')
    found.set_forkserver_preload(PRELOADED)
    return found


def _alone(function, args, folder, printed, environment):
    out = os.open(printed, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2): os.dup2(out, stream)
    torch.set_num_threads(1)
    os.environ.update(environment)
    tempfile.tempdir = None  # which the environment names
    os.chdir(folder)
    function(*args)


@contextmanager
def alone(function, *args, folder='.', **environment):
    "A process that calls the function in the folder, and the file for what it prints."
    with tempfile.NamedTemporaryFile() as printed:
        process = context().Process(target=_alone, args=(function, args, folder, printed.name, environment))
        process.start()
        yield process, Path(printed.name)


def run_alone(*args, **options):
    "(exit code, what it printed) of such a process."
    with alone(*args, **options) as (process, printed):
        process.join()
        return process.exitcode, printed.read_text(encoding='utf-8')


def interpret(path, *argv):
    "In a process of its own, what `python path argv` does; that a name is about to go is an error."
    warnings.simplefilter('error', FutureWarning)
    sys.argv = [str(arg) for arg in (path, *argv)]
    sys.path[0] = str(Path(path).parent)
    runpy.run_path(str(path), run_name='__main__')


def torchrun(ranks, path, *argv):
    "What each of several processes prints, which find each other by what `torchrun` tells them."
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    shared = dict(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR='localhost', MASTER_PORT=port,
                  CUDA_VISIBLE_DEVICES='', GLOO_SOCKET_IFNAME='lo')
    with ExitStack() as stack:
        started = [stack.enter_context(alone(interpret, path, *argv, RANK=str(rank), LOCAL_RANK=str(rank), **shared))
                   for rank in range(ranks)]
        for process, printed in started:
            process.join()
            assert process.exitcode == 0, printed.read_text()
        return [printed.read_text() for _, printed in started]


def _enter(rank, function, ranks, directory, seconds, args):
    "One process: joins the group, runs the function, leaves what it returns."
    warnings.simplefilter('error', FutureWarning)  # no name that torch.distributed is about to drop
    torch.set_num_threads(1)
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    dist.init_process_group('gloo', init_method=f'file://{directory}/store', rank=rank, world_size=ranks,
                            timeout=timedelta(seconds=seconds))
    dist.barrier()  # nobody leaves while another is still joining
    try: result = 'returned', function(rank, *args)
    except Exception as e: result = 'raised', f'{type(e).__name__}: {e}\n{traceback.format_exc()}'
    torch.save(result, Path(directory)/f'{rank}.pt')
    if result[0] == 'returned': dist.barrier()
    dist.destroy_process_group()


def run_on_ranks(function, ranks, *args, seconds=120):
    "[(kind, value)] of each rank: ('returned', …), ('raised', text) or ('died', exit code)."
    with tempfile.TemporaryDirectory() as directory:
        arguments = function, ranks, directory, seconds, args
        processes = [context().Process(target=_enter, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
        for p in processes: p.start()
        end = time.monotonic() + 900 + seconds
        for p in processes: p.join(max(0, end - time.monotonic()))
        hung = [p for p in processes if p.is_alive()]
        for p in hung: p.kill()
        for p in hung: p.join()
        assert not hung, f'{len(hung)} of {ranks} processes hang'
        found = []
        for rank, p in enumerate(processes):
            path = Path(directory)/f'{rank}.pt'
            found.append(torch.load(path, weights_only=True) if path.exists() else ('died', p.exitcode))
        return found


def returned(found):
    "The values, or the first error."
    for rank, (kind, value) in enumerate(found): assert kind == 'returned', f'rank {rank} {kind}: {value}'
    return [value for _, value in found]
