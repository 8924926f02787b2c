"""Digits with the largest margins in several processes: fastai's `distrib_ctx` around a `margin_learner`.

    torchrun --nproc-per-node 2 examples/fastai_distributed.py --epochs 5

Every process has the whole model, classifier included, and takes its share of every epoch's images; the table that
the first one prints is of all test images. On GPUs it is shorter: `with learn.distrib_ctx():` and no line about
loaders. Needs Accelerate: pip install accelerate.
"""
import argparse
import os
from pathlib import Path

import torch
from fastai.distributed import DistributedDL

from largest_margins.callbacks import SampleMarginRegularizer
from largest_margins.data import load
from largest_margins.learner import margin_learner
from largest_margins.losses import LMSoftmaxLoss
from largest_margins.training.bodies import ConvBody


class CPUDistributedDL(DistributedDL):
    "fastai's own sends the order of the images through a GPU."

    def _broadcast(self, t, rank):
        order = torch.tensor(t)
        torch.distributed.broadcast(order, rank)
        return order.tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=5, help='passes through the training images')
    parser.add_argument('--out', type=Path, help='a folder for what each process has in the end')
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dls = load('digits').dataloaders(batch_size=32, seed=0, device='cpu')  # 32 in each process
    learn = margin_learner(dls, ConvBody(), LMSoftmaxLoss(20.), embedding=32, cbs=SampleMarginRegularizer(0.5))
    with learn.distrib_ctx(sync_bn=False, cpu=True):  # batch norms of several processes know GPUs only
        dls.loaders = [CPUDistributedDL(dl) for dl in dls]
        learn.fit_one_cycle(options.epochs, 1e-2)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        end = {'model': learn.model.state_dict(), 'accuracy': learn.recorder.values[-1][2],
               'steps': len(learn.recorder.losses), 'margins': learn.margin_recorder.history[-1]}
        torch.save(end, options.out/f'{os.environ["RANK"]}.pt')
    torch.distributed.destroy_process_group()


if __name__ == '__main__': main()
