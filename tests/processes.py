"Several processes on this machine, joined into a gloo process group; and what they return."
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

PRELOADED = ['torch', 'torch.distributed.checkpoint.state_dict', 'torch.distributed.tensor', 'largest_margins.heads',
             'largest_margins.losses', 'largest_margins.regularizers', 'pytest']


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
    context = multiprocessing.get_context('forkserver')  # torch is imported once, by the server
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as directory:
        arguments = function, ranks, directory, seconds, args
        processes = [context.Process(target=_enter, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
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
