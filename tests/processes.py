"Several processes on this machine, joined into a gloo process group; and what they return."
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing as mp


def _enter(rank, function, ranks, directory, seconds, args):
    "One process: joins the group, runs the function, leaves what it returns."
    torch.set_num_threads(1)
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    dist.init_process_group('gloo', init_method=f'file://{directory}/store', rank=rank, world_size=ranks,
                            timeout=timedelta(seconds=seconds))
    try: result = 'returned', function(rank, *args)
    except Exception as e: result = 'raised', f'{type(e).__name__}: {e}\n{traceback.format_exc()}'
    torch.save(result, Path(directory)/f'{rank}.pt')
    if result[0] == 'returned': dist.barrier()
    dist.destroy_process_group()


def run_on_ranks(function, ranks, *args, seconds=60):
    "[(kind, value)] of each rank: ('returned', …), ('raised', text) or ('died', exit code)."
    with tempfile.TemporaryDirectory() as directory:
        context = mp.get_context('spawn')
        arguments = function, ranks, directory, seconds, args
        processes = [context.Process(target=_enter, args=(rank, *arguments)) for rank in range(ranks)]
        for p in processes: p.start()
        for p in processes: p.join(2 * seconds)
        hung = [p for p in processes if p.is_alive()]
        for p in hung: p.kill()
        assert not hung, f'{len(hung)} of {ranks} processes hang'
        found = []
        for rank, p in enumerate(processes):
            path = Path(directory)/f'{rank}.pt'
            found.append(torch.load(path, weights_only=False) if path.exists() else ('died', p.exitcode))
        return found


def returned(found):
    "The values, or the first error."
    for rank, (kind, value) in enumerate(found): assert kind == 'returned', f'rank {rank} {kind}: {value}'
    return [value for _, value in found]
