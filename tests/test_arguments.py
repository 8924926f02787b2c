"""What an argument may be and what it may not, of every name of the losses, heads, margins, regularizers and callbacks.

The signatures say which kind each parameter has. So a new loss, or a new option, is tested from its first day.
"""
import copy
import inspect
import math
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from largest_margins import callbacks, heads, losses, margins, regularizers
from largest_margins.checks import Checked

ROOMS = losses, heads, margins, regularizers, callbacks
NO_ARGUMENTS = {'NeuralCollapse', 'save_file', 'load_file', 'Checkpoint'}  # a result; files have tests of their own
GOOD = dict(
    prototypes=torch.eye(4), features=torch.eye(4), cosines=torch.eye(4), targets=torch.arange(4), num_classes=10,
    class_counts=[4., 3, 2, 1], in_features=4, out_features=4, loss=losses.NormFaceLoss(), start_epoch=1,
    model=nn.Linear(4, 4), margin=.5, tilt=2., chunk_size=2, most_classes=5, weight=.5, n=2)
NAN = torch.full((4, 4), math.nan)
NO_NUMBER = ['a', True, np.bool_(True), 1j, {}, object(), nn.Parameter(torch.tensor(1.)), torch.tensor(True)]
WRONG = {  # the kind of a parameter: what is a TypeError, and what a ValueError
    float: (NO_NUMBER, [math.nan, math.inf, -math.inf, 10 ** 400, np.float32('nan'), torch.tensor(math.nan)]),
    int: ([*NO_NUMBER, 1.5, np.float64(2), torch.tensor(2.), [1]], []),
    bool: ([1, 0, 'no', np.bool_(True), torch.tensor(True), None], []),
    Iterable: (['abcd', b'abcd', 5, True, [True] * 4, {0: 1.}, [1j] * 4, nn.Parameter(torch.ones(4))],
               [[1., math.nan, 1, 1], [1., math.inf, 1, 1], [[1., 2, 3, 4]], []]),
    Tensor: (['a', 5, None, [[1., 0], [0, 1]], np.eye(4)], []),
    nn.Module: (['a', 5, [nn.Linear(4, 4)]], []),
    losses.CosineLoss: (['a', None, nn.Linear(4, 4), losses.NormFaceLoss], []),
    str: ([1, True, ['mean']], ['nonsense'])}


def functions():
    "(name, what is called, its kind) of all public names, and of methods that take more than tensors."
    for room in ROOMS:
        for name in sorted({*room.__all__} - NO_ARGUMENTS): yield name, getattr(room, name)
    head = heads.MarginHead(4, 4, losses.NormFaceLoss())
    yield 'top', head.top
    yield 'linear', head.loss.linear


def parameters():
    "(what is called, the parameter's name, its kind) for all whose kind is known."
    for name, function in functions():
        for p in inspect.signature(function).parameters.values():
            of = {getattr(t, '__origin__', t) for t in (p.annotation, *get_args(p.annotation))}
            kind = next((k for k in WRONG if k in of or (k is Iterable and list in of)), None)
            if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or kind is None or torch.device in of: continue
            yield pytest.param(function, p, kind, id=f'{name}-{p.name}')


@pytest.fixture(autouse=True, scope='module')
def one_rank():
    "A sharded head needs a process group."
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group('gloo', store=dist.FileStore(str(Path(folder)/'store'), 1), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def call(function, p, value):
    "The function with this argument, and with the others that it needs."
    needed = {q.name: copy.deepcopy(GOOD[q.name]) for q in inspect.signature(function).parameters.values()
              if q.default is q.empty and q.kind not in (q.VAR_KEYWORD, q.VAR_POSITIONAL)}
    if p.name == 'tilt': needed['aggregation'] = 'logsumexp'  # the only one that it sharpens
    return function(**needed | {p.name: value})


def checked_later(function, p):
    "Whether the argument stays an attribute that is checked when it is set."
    return isinstance(function, type) and isinstance(inspect.getattr_static(function, p.name, None), Checked)


@pytest.mark.parametrize('function, p, kind', [*parameters()])
def test_what_is_wrong_is_refused_by_name(function, p, kind):
    "When given, and when set later, which leaves what was there."
    one_or_many = Tensor in get_args(p.annotation) and kind is float
    for error, values in zip((TypeError, ValueError), WRONG[kind], strict=True):
        for value in values:
            if value is None and p.default is None: continue
            if one_or_many and value == {}: continue  # it has no number, as no list has
            with pytest.raises(error, match=rf'^{p.name} must'): call(function, p, value)
            if not checked_later(function, p): continue
            module = call(function, p, GOOD.get(p.name) if p.default in (p.empty, None) and kind is not Iterable
                          else p.default if p.default is not p.empty else GOOD[p.name])
            before = getattr(module, p.name)
            with pytest.raises(error, match=rf'^{p.name} must'): setattr(module, p.name, value)
            assert getattr(module, p.name) is before or torch.equal(getattr(module, p.name), before)


@pytest.mark.parametrize('function, p, kind', [x for x in parameters() if x.values[2] in (float, int)])
def test_numbers_of_every_kind_are_welcome(function, p, kind):
    "NumPy's, fractions, and tensors and arrays without dimensions."
    value = GOOD[p.name] if p.default in (p.empty, None) or isinstance(p.default, str) else p.default
    kinds = [np.array(value), torch.tensor(value)]
    if kind is float: kinds += [np.float64(value), np.float32(value), Fraction(value)]
    if value == int(value): kinds += [int(value), np.int64(value), np.int32(value)]
    for same in kinds:
        for made in (call(function, p, same), call(function, p, value)):
            if not checked_later(function, p): continue
            setattr(made, p.name, same)
            assert type(getattr(made, p.name)) in (int, float)
            assert getattr(made, p.name) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize('function, p', [x.values[:2] for x in parameters() if x.values[2] is Tensor and x.values[
    1].name in ('prototypes', 'features', 'cosines')], ids=lambda x: getattr(x, '__name__', getattr(x, 'name', '')))
def test_tensors_that_are_not_finite_are_refused_by_name(function, p):
    with pytest.raises(ValueError, match=rf'^{p.name} must be finite'): call(function, p, NAN)


def test_the_signatures_say_what_kind_their_parameters_have():
    "So that the tests above look at (nearly) all of them."
    found = {x.id for x in parameters()}
    rest = {f'{name}-{p}' for name, function in functions() for p in inspect.signature(function).parameters} - found
    assert {name.split('-')[1] for name in rest} <= {'device', 'dtype', 'group', 'generator', 'numbers'}, rest
    assert len(found) > 150
