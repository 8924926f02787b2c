"Trainings that are interrupted, killed, resumed: the numbers are those of the unbroken run, bit for bit."
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam, OptimWrapper
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from largest_margins import callbacks
from largest_margins.callbacks import Checkpoint, load_file, save_file
from largest_margins.cli import main
from largest_margins.data import RandomAffine
from largest_margins.study.experiments import Configuration, Result, train
from largest_margins.study.recipes import TABLES, single
from largest_margins.study.tables import make_table, plan, run_one

ONE_CYCLE = Configuration(epochs=4, sample_margin=.5, shift=1, flip=True, embedding=12)
RECIPES = {
    'one-cycle': ONE_CYCLE,
    'steps': Configuration(
        loss='ldam', epochs=4, schedule='steps', learning_rate=.1, weight_decay=5e-4, reweighted=.5, zero_centroid=10.,
        reduction='class-mean', logit_adjustment=1., ratio=10., shift=1, embedding=12),
    'cosine': Configuration(loss='ce', epochs=4, schedule='cosine', learning_rate=.1, weight_decay=1e-4, ratio=5.,
                            sample_margin=.5, embedding=12, seed=3),
    'fixed': replace(ONE_CYCLE, loss='lm-softmax', fixed=True)}


def differences(a, b, at=''):
    "Where two nested values differ, tensors bit for bit; nan is nan."
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)): yield at
    elif isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b): yield at
        else: yield from (d for k in a for d in differences(a[k], b[k], f'{at}.{k}'))
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b): yield at
        else: yield from (d for i, pair in enumerate(zip(a, b)) for d in differences(*pair, f'{at}[{i}]'))
    elif a != b and not (a != a and b != b): yield at


def assert_same(a, b):
    "Results or nested values with the same numbers everywhere; how long it took does not count."
    if isinstance(a, Result): a, b = ({f.name: getattr(x, f.name) for f in fields(Result)} for x in (a, b))
    assert [d for d in differences(a, b) if d != '.seconds'] == []


def seed(n):
    "The generators that all share; `train` itself seeds torch's."
    random.seed(n)
    np.random.seed(n)  # noqa: NPY002


def stop_after(n):
    "A Ctrl-C right after the n-th epoch."
    def stop(epoch, margins):
        if epoch == n: raise KeyboardInterrupt
    return stop


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    "Result and last checkpoint of each recipe, trained in one go."
    folder = tmp_path_factory.mktemp('unbroken')
    def trained(name):
        seed(0)
        return train(RECIPES[name], checkpoint=folder/name), load_file(folder/name)
    return {name: trained(name) for name in RECIPES}


# Bit for bit

@pytest.mark.parametrize('epoch', [1, 2])
@pytest.mark.parametrize('name', RECIPES)
def test_resumed_is_unbroken(name, epoch, unbroken, tmp_path):
    path, seen = tmp_path/'part.pt', []
    seed(0)
    with pytest.raises(KeyboardInterrupt): train(RECIPES[name], progress=stop_after(epoch), checkpoint=path)
    begun = load_file(path)
    assert begun['epoch'] == epoch and begun['seconds'] > 0
    seed(epoch)  # another process stands elsewhere
    resumed = train(RECIPES[name], progress=lambda epoch, margins: seen.append(epoch), checkpoint=path)
    assert seen == list(range(epoch + 1, 5)) and resumed.seconds > begun['seconds']
    assert_same(resumed, unbroken[name][0])
    assert_same(load_file(path), unbroken[name][1])  # optimiser, generators, losses, learning rates: everything


def test_a_checkpoint_changes_no_number(unbroken):
    assert_same(train(ONE_CYCLE), unbroken['one-cycle'][0])
    assert not torch.equal(train(replace(ONE_CYCLE, seed=1)).cosines, unbroken['one-cycle'][0].cosines)


def test_interrupted_after_each_epoch(unbroken, tmp_path):
    for epoch in (1, 2, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            train(ONE_CYCLE, progress=stop_after(epoch), checkpoint=tmp_path/'part.pt')
    heard = []
    result = train(ONE_CYCLE, progress=lambda *told: heard.append(told), checkpoint=tmp_path/'part.pt')
    assert_same(result, unbroken['one-cycle'][0])
    assert not heard  # all epochs were there already


@pytest.mark.parametrize('batch,kept', [(5, None), (30, 1), (63, 2), (83, 3)])
def test_ctrl_c_inside_an_epoch_costs_that_epoch(batch, kept, unbroken, tmp_path, monkeypatch):
    "Of 21 batches each; the batch is interrupted while its images move."
    path, moved, seen, move = tmp_path/'part.pt', [], [], RandomAffine.__call__

    def interrupted(self, *args):
        moved.append(1)
        if len(moved) == batch: raise KeyboardInterrupt
        return move(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(RandomAffine, '__call__', interrupted)
        with pytest.raises(KeyboardInterrupt): train(ONE_CYCLE, checkpoint=path)
    assert (load_file(path)['epoch'] if path.exists() else None) == kept
    assert_same(train(ONE_CYCLE, progress=lambda epoch, _: seen.append(epoch), checkpoint=path),
                unbroken['one-cycle'][0])
    assert seen == list(range((kept or 0) + 1, 5))


# kill -9

def in_a_process(function, *args):
    "The exit code of a process of its own; torch is imported once, by the server that starts it."
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['largest_margins.study.experiments', 'largest_margins.study.tables', 'pytest'])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def killed(process):
    process.join(120)
    return process.exitcode == -signal.SIGKILL


def _die(): os.kill(os.getpid(), signal.SIGKILL)


def _die_inside_an_epoch(path):
    torch.set_num_threads(1)
    moved, move = [], RandomAffine.__call__

    def deadly(self, *args):
        moved.append(1)
        if len(moved) == 50: _die()
        return move(self, *args)
    RandomAffine.__call__ = deadly
    train(ONE_CYCLE, checkpoint=path)


def _die_while_writing(path):
    "After two epochs, with half of the third checkpoint on the disk."
    torch.set_num_threads(1)
    synced, sync = [], os.fsync

    def deadly(descriptor):
        sync(descriptor)
        synced.append(os.fstat(descriptor).st_size)
        if len(synced) < 5: return  # two for each file, which are its own and its folder's
        os.ftruncate(descriptor, synced[-1] // 2)
        _die()
    os.fsync = deadly
    train(ONE_CYCLE, checkpoint=path)


@pytest.mark.parametrize('die', [_die_inside_an_epoch, _die_while_writing])
def test_killed_and_resumed(die, unbroken, tmp_path):
    path = tmp_path/'part.pt'
    assert killed(in_a_process(die, path))
    assert load_file(path)['epoch'] == 2
    left = [p for p in tmp_path.iterdir() if p != path]
    assert len(left) == (die is _die_while_writing) and all(p.name.startswith('.part.pt.') for p in left)
    assert_same(train(ONE_CYCLE, checkpoint=path), unbroken['one-cycle'][0])
    assert list(tmp_path.iterdir()) == [path]  # what was left is gone
    Checkpoint(path).remove()
    assert not list(tmp_path.iterdir())


# What is not the checkpoint of this training

class Malice:
    def __reduce__(self): return (exec, ('raise SystemExit("harmed")',))


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    path = tmp_path_factory.mktemp('begun')/'part.pt'
    with pytest.raises(KeyboardInterrupt): train(ONE_CYCLE, progress=stop_after(1), checkpoint=path)
    return path.read_bytes()


@pytest.mark.parametrize('content', [b'', b'nonsense', pickle.dumps(Malice()), pickle.dumps([1])],
                         ids=['empty', 'nonsense', 'malice', 'a list'])
def test_what_we_did_not_write_is_refused(content, tmp_path):
    path = tmp_path/'part.pt'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'part\.pt is not a checkpoint \(remove it to start anew\)'):
        train(ONE_CYCLE, checkpoint=path)
    assert path.read_bytes() == content


def test_other_files_of_ours_are_refused(unbroken, tmp_path):
    save_file({'prototypes': torch.ones(2, 3)}, tmp_path/'result.pt')
    torch.save([1, 2], tmp_path/'list.pt')
    for name in ('result.pt', 'list.pt'):
        with pytest.raises(ValueError, match=f'{name} is not a checkpoint'):
            train(RECIPES['fixed'], checkpoint=tmp_path/name)


def test_a_truncated_file_is_refused(begun, tmp_path):
    path = tmp_path/'part.pt'
    for size in [*range(1, len(begun), len(begun) // 60), len(begun) - 1]:
        path.write_bytes(begun[:size])
        with pytest.raises(ValueError, match='part.pt is not a checkpoint'): Checkpoint(path).read()
    with pytest.raises(ValueError, match='part.pt is not a checkpoint'): train(ONE_CYCLE, checkpoint=path)


@pytest.mark.parametrize('change,message', [
    (dict(seed=1), 'seed was 0, is now 1'), (dict(epochs=5), 'epochs was 4, is now 5'),
    (dict(loss='normface'), "loss was 'cosface', is now 'normface'"), (dict(ratio=5.), 'counts was'),
    (dict(embedding=16), 'embedding was 12, is now 16')])
def test_another_configuration_is_refused(change, message, begun, tmp_path):
    path = tmp_path/'part.pt'
    path.write_bytes(begun)
    with pytest.raises(ValueError, match='part.pt is of another training.*remove it') as said:
        train(replace(ONE_CYCLE, **change), checkpoint=path)
    assert message in str(said.value) and path.read_bytes() == begun


def test_where_the_data_lie_does_not_matter(begun, unbroken, tmp_path):
    (tmp_path/'part.pt').write_bytes(begun)
    moved = train(replace(ONE_CYCLE, data='elsewhere'), checkpoint=tmp_path/'part.pt')
    assert torch.equal(moved.cosines, unbroken['one-cycle'][0].cosines)


# Any Learner

class Noise(Callback):
    "Draws from the generators of Python and NumPy that all share, and remembers what it drew."
    checkpointed = ('drawn',)

    def before_epoch(self):
        if not hasattr(self, 'drawn'): self.drawn = []
        self.drawn.append(random.random() + np.random.rand())  # noqa: NPY002

    def before_batch(self): self.learn.xb = (self.xb[0] + self.drawn[-1] * torch.randn(1),)


class Stop(Callback):
    order = 70

    def __init__(self, epoch): self.after = epoch

    def after_epoch(self):
        if self.learn.epoch + 1 == self.after: raise KeyboardInterrupt


POINTS, CLASSES = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 4


def fastai_loaders():
    random.seed(1)
    return DataLoaders(*(DataLoader([*zip(POINTS, CLASSES)], bs=16, shuffle=shuffle) for shuffle in (True, False)))


def torch_loaders():
    loader = partial(torch.utils.data.DataLoader, TensorDataset(POINTS, CLASSES), batch_size=16)
    return DataLoaders(loader(shuffle=True, generator=torch.Generator().manual_seed(1)), loader())


class Sometimes(nn.Module):
    "A layer that is used in the first two epochs only; then its gradient is zero, and momentum moves it on."

    def __init__(self):
        super().__init__()
        self.always, self.rarely, self.norm = nn.Linear(6, 4), nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.register_buffer('batches', torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training: self.batches += 1
        return self.norm(self.always(x) + (self.rarely(x) if self.batches < 26 else 0))


OPTIMISERS = dict(sgd=partial(SGD, mom=.9), adam=Adam, torch=partial(OptimWrapper, opt=torch.optim.AdamW))


def learner(loaders=fastai_loaders, optimiser='adam', cbs=()):
    torch.manual_seed(0)
    learn = Learner(loaders(), Sometimes(), F.cross_entropy, opt_func=OPTIMISERS[optimiser], cbs=[*cbs, Noise()])
    seed(5)
    return learn


def fit(learn, *cbs, epochs=5, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2, cbs=cbs, **kwargs)
    return learn


def patient(): return [EarlyStoppingCallback(patience=9), ReduceLROnPlateau(patience=1), GradientAccumulation(56)]


@pytest.mark.parametrize('loaders,optimiser,cbs', [
    (fastai_loaders, 'sgd', patient), (fastai_loaders, 'torch', list), (torch_loaders, 'adam', patient),
    (torch_loaders, 'torch', patient)])
def test_any_learner(loaders, optimiser, cbs, tmp_path):
    whole, path = fit(learner(loaders, optimiser, cbs()), Checkpoint(tmp_path/'whole.pt')), tmp_path/'part.pt'
    for n in (1, 3):
        with pytest.raises(KeyboardInterrupt): fit(learner(loaders, optimiser, cbs()), Checkpoint(path), Stop(n))
    again = fit(learner(loaders, optimiser, cbs()), Checkpoint(path))
    assert_same(load_file(path), load_file(tmp_path/'whole.pt'))
    assert_same(again.model.state_dict(), whole.model.state_dict())
    assert again.noise.drawn == whole.noise.drawn and len(set(again.noise.drawn)) == 5
    for name in ('lrs', 'iters', 'losses', 'hps'): assert_same(*(getattr(x.recorder, name) for x in (again, whole)))
    assert_same(*([*map(list, x.recorder.values)] for x in (again, whole)))


class Scaled(Callback):
    "A loss scale as float16 has it, on a CPU and doubled at every step."

    def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.)

    def before_backward(self): self.learn.loss_grad = self.learn.scaler.scale(self.loss_grad)

    def after_step(self): self.learn.scaler.update(2 * self.learn.scaler.get_scale())


def test_the_scale_of_float16_goes_on(tmp_path):
    path = tmp_path/'c.pt'
    with pytest.raises(KeyboardInterrupt): fit(learner(cbs=[Scaled()]), Checkpoint(path), Stop(2))
    again, whole = fit(learner(cbs=[Scaled()]), Checkpoint(path)), fit(learner(cbs=[Scaled()]))
    assert again.scaler.get_scale() == whole.scaler.get_scale() == 2.**(5 * 13 + 1)
    assert_same(again.model.state_dict(), whole.model.state_dict())


def test_early_stopping_stops_where_it_would_have(tmp_path):
    def stopping(): return [EarlyStoppingCallback(min_delta=1e9, patience=3)]
    whole = fit(learner(cbs=stopping()), epochs=9)
    with pytest.raises(KeyboardInterrupt): fit(learner(cbs=stopping()), Checkpoint(tmp_path/'c.pt'), Stop(2), epochs=9)
    again = fit(learner(cbs=stopping()), Checkpoint(tmp_path/'c.pt'), epochs=9)
    assert len(whole.recorder.values) == len(again.recorder.values) == 4
    assert_same(*([*map(list, x.recorder.values)] for x in (again, whole)))


def test_every_other_epoch(tmp_path):
    path = tmp_path/'c.pt'
    with pytest.raises(KeyboardInterrupt): fit(learner(), Checkpoint(path, every=2), Stop(3))
    assert load_file(path)['epoch'] == 2
    again = fit(learner(), Checkpoint(path, every=2))
    assert load_file(path)['epoch'] == 5
    assert_same(again.model.state_dict(), fit(learner()).model.state_dict())
    with pytest.raises(ValueError, match='every must be ≥ 1, got 0'): Checkpoint(path, every=0)


def test_validation_and_prediction_leave_the_file_alone(tmp_path):
    path = tmp_path/'c.pt'
    with pytest.raises(KeyboardInterrupt): fit(learner(), Checkpoint(path), Stop(2))
    before, learn = path.read_bytes(), learner(cbs=[Checkpoint(path)])
    weight = learn.model.always.weight.clone()
    with learn.no_bar():
        learn.validate(), learn.get_preds(), learn.lr_find(num_it=20, show_plot=False)
    assert path.read_bytes() == before and torch.equal(learn.model.always.weight, weight)
    assert fit(learn).checkpoint.seconds > 0
    after = path.read_bytes()
    with learn.no_bar(): learn.validate(), learn.get_preds()
    assert path.read_bytes() == after != before


def test_the_same_learner_goes_on(tmp_path):
    "In a notebook, the cell that was interrupted is run again."
    learn = learner(cbs=[Checkpoint(tmp_path/'c.pt')])
    with pytest.raises(KeyboardInterrupt): fit(learn, Stop(2))
    with learn.no_bar(): learn.validate()
    fit(learn)
    assert_same(learn.model.state_dict(), fit(learner()).model.state_dict())
    assert all(cb.run for cb in learn.cbs) and learn.checkpoint.order == Checkpoint.order


def test_one_fit_one_file(tmp_path):
    learn = fit(learner(cbs=[Checkpoint(tmp_path/'c.pt')]), epochs=1)
    with pytest.raises(ValueError, match='c.pt is of a fit that has ended: remove it'): fit(learn, epochs=1)
    learn.checkpoint.remove()
    fit(learn, epochs=1)
    with pytest.raises(ValueError, match='start_epoch must be 0'):
        fit(learner(), Checkpoint(tmp_path/'d.pt'), start_epoch=2)


def test_another_learner_is_refused(tmp_path):
    path = tmp_path/'c.pt'
    with pytest.raises(KeyboardInterrupt): fit(learner(), Checkpoint(path), Stop(2))
    wider = learner()
    wider.model.always = nn.Linear(6, 4, bias=False)
    for other in (wider, learner(cbs=patient()), learner(optimiser='torch'), learner(torch_loaders)):
        with pytest.raises(ValueError, match='c.pt does not fit this Learner'): fit(other, Checkpoint(path))
    with pytest.raises(TypeError, match="must hold tensors, numbers, text, .* got (Posix|Windows)Path"):
        Checkpoint(path, dict(path=path))


# Tables

CHOICE = dict(rows=['ce'], epochs=4)


def command(*argv):
    tool = Path(sys.executable).with_name('largest-margins')
    return subprocess.Popen([tool, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def numbers(record): return {k: v for k, v in record.items() if k not in ('seconds', 'git')}


def test_a_table_goes_on_after_the_last_epoch(tmp_path, monkeypatch):
    run, = plan(TABLES['1'], **CHOICE)
    _, alone = run_one(run, tmp_path/'alone')
    with pytest.raises(KeyboardInterrupt):
        train(run.configuration, progress=stop_after(3), checkpoint=tmp_path/run.checkpoint)
    heard, saved = [], []
    with pytest.raises(ValueError, match='has 1 of these runs, finished or begun'):
        make_table(TABLES['1'], out=tmp_path, **CHOICE, tell=heard.append)
    assert not (tmp_path/run.path).exists() and (tmp_path/run.checkpoint).exists()
    monkeypatch.setattr(callbacks, 'save_file', lambda content, path: saved.append(path) or save_file(content, path))
    assert make_table(TABLES['1'], out=tmp_path, **CHOICE, tell=heard.append, resume=True)
    assert '1 of 1 runs have begun' in heard and len(saved) == 1
    assert numbers(json.loads((tmp_path/run.path).read_text())) == numbers(alone)
    (tmp_path/run.checkpoint).write_text('killed between the record and the removal of the checkpoint')
    assert make_table(TABLES['1'], out=tmp_path, **CHOICE, tell=heard.append, resume=True)
    assert {p.suffix for p in (tmp_path/run.path).parent.iterdir()} == {'.json'}


def _run(run, out, barrier):
    torch.set_num_threads(1)
    barrier.wait()
    run_one(run, out)


def test_two_at_the_same_run_do_no_harm(tmp_path):
    "As when a study is resumed while a process of the killed one is still at it."
    run, = plan(TABLES['1'], **CHOICE)
    _, alone = run_one(run, tmp_path/'alone')
    barrier = multiprocessing.get_context('forkserver').Barrier(2)
    processes = [in_a_process(_run, run, tmp_path, barrier) for _ in range(2)]
    for p in processes: p.join(180)
    assert [p.exitcode for p in processes] == [0, 0]
    assert numbers(json.loads((tmp_path/run.path).read_text())) == numbers(alone)
    assert {p.name for p in (tmp_path/run.path).parent.iterdir()} == {'seed-0.json'}


def children(pid):
    lists = [p.read_text() for p in Path(f'/proc/{pid}/task').glob('*/children')]
    return ' '.join(lists).split()


@pytest.mark.parametrize('training', [False, True])
def test_workers_end_when_the_process_that_started_them_is_killed(training, tmp_path):
    "Their runs would take hours; they hold the pipes open as long as they live."
    process = command('table', '1', '--rows', 'ce', 'normface*', '--epochs', 100_000, '--jobs', 2, '--out', tmp_path)
    def begun(): return list(tmp_path.rglob('seed-0.part.pt')) if training else children(process.pid)[2:]  # [:2] track
    try:
        while len(begun()) < 2 and process.poll() is None: time.sleep(.05)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)  # this one only, not its group
        process.communicate(timeout=120)  # ends when the last of them has let go of the pipes
    finally:
        with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
    parts = list(tmp_path.rglob('seed-0.part.pt'))
    assert len(parts) == 2 * training and all(load_file(part)['epoch'] >= 1 for part in parts)


# The command

def run_command(*argv):
    with pytest.raises(SystemExit) as end: main([str(a) for a in argv])
    return end.value.code


def test_train_resumes(tmp_path, capsys):
    argv = ('train', '--epochs', 4, '--sample-margin', .5, '--shift', 1, '--flip', '--embedding', 12, '--out', tmp_path)
    run, = plan(single(ONE_CYCLE))
    with pytest.raises(KeyboardInterrupt):
        train(ONE_CYCLE, progress=stop_after(2), checkpoint=tmp_path/run.checkpoint)
    assert run_command(*argv) == 2 and 'finished or begun' in capsys.readouterr().err
    assert run_command(*argv, '--resume', '--scale', 10) == 2
    err = capsys.readouterr().err
    assert 'scale was None, is now 10.0' in err and len(err.splitlines()) == 1
    assert run_command(*argv, '--resume') == 0
    assert {p.name for p in (tmp_path/run.path).parent.iterdir()} == {'seed-0.json', 'seed-0.pt'}
    assert torch.equal(load_file(tmp_path/run.tensors)['cosines'], train(ONE_CYCLE).cosines)
