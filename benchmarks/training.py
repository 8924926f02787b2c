"""How fast a small network trains on one core, and how well: a bare loop, fastai's own pipeline, and ours.

    python benchmarks/training.py                                # the stored table: benchmarks/results/training.json
    python benchmarks/training.py --images 2048 --rounds 3 --recipes '' --out mine.json

Every row trains the same network with the same loss on the same images, one epoch at a time and without validation. The
rows take turns in one process, on one thread; stored is each one's least CPU time per image, in microseconds, since
whatever else the machine does can only add to it, and its ratio to the bare loop's. Then every recipe is trained from
several seeds; stored are accuracy on the test images and CPU seconds, those of building the network and of validation
after each epoch included. Either half can be measured alone; the file keeps the other if it is of this machine.
"""
import argparse
import json
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path
from time import process_time

import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.learner import Learner
from fastai.vision.core import PILImageBW
from fastai.vision.data import ImageDataLoaders
from measure import machine
from PIL import Image
from torch import nn

from largest_margins.data import RandomAffine, load
from largest_margins.files import write_file
from largest_margins.heads import CosineLinear
from largest_margins.learner import margin_learner, margin_neck
from largest_margins.losses import CosFaceLoss
from largest_margins.training.bodies import ConvBody

RESULTS = Path(__file__).parent/'results'/'training.json'
LEARNING_RATE, LOSS = 1e-2, CosFaceLoss(20., .1)
RECIPES = {
    'quick': dict(epochs=4),
    'quick, float32': dict(epochs=4, mixed_precision=False),
    'long': dict(epochs=12, augment=RandomAffine(0, flip=True))}


class NoValidation(Callback):
    "Leaves the validation out."
    run_train = False

    def before_validate(self): raise CancelValidException


def network():
    "What `margin_learner` builds around a `ConvBody`, for 28 × 28 pixels and ten classes."
    neck, d = margin_neck((2, 128, 3, 3))
    return nn.Sequential(ConvBody(), neck, CosineLinear(d, 10))


def bare(data, batch_size, channels_last=False, bfloat16=False):
    "An epoch of a loop as one writes it without a library; it returns how many images it saw."
    model = network()
    if channels_last: model.to(memory_format=torch.channels_last)
    opt = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    images, targets = data.train_images, data.train_targets
    mean, std = images.float().mean(), images.float().std()

    def epoch():
        model.train()
        for rows in torch.randperm(len(images)).split(batch_size):
            x, y = images[rows].float().sub_(mean).div_(std), targets[rows]
            with torch.autocast('cpu', torch.bfloat16) if bfloat16 else nullcontext(): cosines = model(x)
            LOSS(cosines, y).backward()
            opt.step()
            opt.zero_grad()
        return len(images)
    return epoch


def of_learner(learn):
    "An epoch of a fastai Learner."
    learn.add_cb(NoValidation())

    def epoch():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, LEARNING_RATE)
        return len(learn.dls.train) * learn.dls.train.bs
    return epoch


def files(data, folder, batch_size):
    "The images as PNG files, one at a time, as fastai's documentation reads them."
    for i, (image, target) in enumerate(zip(data.train_images, data.train_targets, strict=True)):
        place = Path(folder)/f'class {target}'
        place.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(place/f'{i}.png')
    return ImageDataLoaders.from_folder(folder, valid_pct=.02, seed=0, bs=batch_size, img_cls=PILImageBW,
                                        num_workers=0, device='cpu')


def rows(data, folder, batch_size):
    "Row name -> function that trains one epoch."
    dls, read = data.dataloaders(batch_size, device='cpu'), files(data, folder, batch_size)
    def ours(mixed_precision): return margin_learner(dls, ConvBody(), LOSS, mixed_precision=mixed_precision)
    return {
        'bare loop': bare(data, batch_size, channels_last=True, bfloat16=True),
        'margin_learner': of_learner(ours(True)),
        'bare loop, no bfloat16': bare(data, batch_size, channels_last=True),
        'margin_learner, no bfloat16': of_learner(ours(False)),
        'bare loop, no channels last either': bare(data, batch_size),
        'fastai, images in memory': of_learner(Learner(dls, network(), LOSS)),
        'fastai, PNG files': of_learner(Learner(read, network(), LOSS))}


def times(epochs, rounds):
    "The least CPU seconds per image of each row, over rounds in which all rows take turns."
    least = dict.fromkeys(epochs, float('inf'))
    for epoch in epochs.values(): epoch()
    for _ in range(rounds):
        for name, epoch in epochs.items():
            start = process_time()
            images = epoch()
            least[name] = min(least[name], (process_time() - start) / images)
    return least


def recipe(data, seed, epochs, augment=None, mixed_precision=None):
    "Accuracy in percent and CPU seconds of one training: cross-entropy on 64 features of the last 3 × 3 pixels."
    start = process_time()
    torch.manual_seed(seed)
    dls = data.dataloaders(128, augment, device='cpu', seed=seed)
    learn = margin_learner(dls, nn.Sequential(ConvBody(), nn.Flatten()), nn.CrossEntropyLoss(label_smoothing=.1),
                           embedding=64, mixed_precision=mixed_precision)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, LEARNING_RATE)
    return {'seed': seed, 'accuracy': round(100 * learn.recorder.values[-1][2], 2),
            'seconds': round(process_time() - start, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=4096, help='training images in the speed table')
    parser.add_argument('--batch-size', type=int, default=128, help='images in a batch of the speed table')
    parser.add_argument('--rounds', type=int, default=15, help='epochs that are timed of each row; 0: no speed table')
    parser.add_argument('--recipes', default=';'.join(RECIPES), help='which to train, separated by semicolons')
    parser.add_argument('--epochs', type=int, help='of each recipe, instead of its own')
    parser.add_argument('--seeds', type=int, default=2, help='how many seeds of each recipe')
    parser.add_argument('--dataset', default='fashion_mnist', help='28 × 28 images, one channel, ten classes')
    parser.add_argument('--data', help='the directory that has them')
    parser.add_argument('--out', type=Path, default=RESULTS, help='where the JSON goes')
    options = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, stored = load(options.dataset, options.data), {'machine': machine(), 'rows': [], 'recipes': []}
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    if before.get('machine') == stored['machine']: stored = before
    if options.rounds:
        few = data.subset(range(options.images // options.batch_size * options.batch_size))
        with tempfile.TemporaryDirectory() as folder:
            found = times(rows(few, folder, options.batch_size), options.rounds)
        stored['rows'] = [{'row': name, 'microseconds': round(1e6 * seconds, 1),
                           'over bare': round(seconds / found['bare loop'], 3)} for name, seconds in found.items()]
        for row in stored['rows']: print(row, flush=True)
    if options.recipes:
        stored['recipes'] = []
        for name in options.recipes.split(';'):
            epochs = options.epochs or RECIPES[name]['epochs']
            for seed in range(options.seeds):
                row = {'recipe': name, 'epochs': epochs} | recipe(data, seed, **RECIPES[name] | {'epochs': epochs})
                stored['recipes'].append(row)
                print(row, flush=True)
    write_file(options.out, json.dumps(stored, indent=1) + '\n')


if __name__ == '__main__': main()
