"""The classes shared out among processes, the batch too, on scikit-learn's digits:

    torchrun --nproc-per-node 2 examples/train_sharded.py

Each process holds some rows of the prototypes and trains on its part of every batch. The loss, its gradients and the
predictions are those of one process with everything. `python examples/train_sharded.py` is that one process.
On GPUs take 'nccl' for 'gloo', and move model and data to the device of the process, `LOCAL_RANK`.
"""
import argparse
import os

import torch
from safetensors.torch import save as to_bytes
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from largest_margins.files import write_file
from largest_margins.heads import ShardedMarginHead
from largest_margins.losses import ArcFaceLoss
from largest_margins.margins import class_margin
from largest_margins.regularizers import zero_centroid


def digits():
    "Images and classes, for training and for testing."
    x, y = load_digits(return_X_y=True)
    data = train_test_split(x / 16, y, test_size=.25, random_state=0, stratify=y)
    x, x_test, y, y_test = (torch.tensor(v, dtype=torch.float32 if v.ndim == 2 else torch.int64) for v in data)
    return TensorDataset(x, y), x_test, y_test


def save(weight, path):
    "Nobody ever sees half a file."
    write_file(path, to_bytes({'weight': weight.contiguous()}))


def train(epochs, batch_size, path):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    data, x_test, y_test = digits()
    sampler = DistributedSampler(data, drop_last=True)  # every rank must bring batches of the same size
    loader = DataLoader(data, batch_size // ranks, sampler=sampler, drop_last=True)

    body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
    body = DistributedDataParallel(body)
    head = ShardedMarginHead(32, 10, ArcFaceLoss(scale=16., margin=.3))  # this rank's classes: it stays outside of DDP
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=2e-3)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, targets in loader:
            loss = head(body(images), targets)  # the mean over the samples of all ranks, the same everywhere
            optimizer.zero_grad()
            (loss + zero_centroid(head.weight, head.shards.group)).backward()
            optimizer.step()
        with torch.no_grad(): _, predicted = head.top(body(x_test))
        accuracy, weight = (predicted[:, 0] == y_test).float().mean(), head.full_weight()
        if rank == 0:
            print(f'epoch {epoch}: loss {loss.item():.3f}, accuracy {accuracy:.3f}, '
                  f'class margin {class_margin(weight).rad2deg().item():.1f} degrees', flush=True)
    if rank == 0: save(weight, path)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--batch-size', type=int, default=64, help='of all processes together')
    parser.add_argument('--path', default='prototypes.safetensors', help='where rank 0 saves the [k, d] prototypes')
    options = parser.parse_args()
    if 'RANK' in os.environ: dist.init_process_group('gloo')
    else: dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    train(options.epochs, options.batch_size, options.path)
    dist.destroy_process_group()
