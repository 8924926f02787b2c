"What an argument must be: one error for each kind, what is welcome, and where values are looked at."
import copy
import math
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from largest_margins.callbacks import SampleMarginRegularizer, ZeroCentroidRegularizer
from largest_margins.checks import (
    Choice,
    Flag,
    NotFinite,
    Number,
    check_cosines,
    check_prototypes,
    choice,
    flag,
    integer,
    number,
    per_class,
    plain_tensor,
    values_are_cheap,
)
from largest_margins.data import RandomAffine, digits
from largest_margins.inspection import inspect_prototypes
from largest_margins.losses import CosFaceLoss, GMSoftmaxLoss, NormFaceLoss
from largest_margins.reid import evaluate
from largest_margins.verification import kfold_accuracy


@pytest.mark.parametrize('value', [1, 1.5, Fraction(3, 2), np.float32(1.5), np.int64(1), np.array(1.5),
                                   torch.tensor(1.5),
                                   torch.tensor(1)], ids=repr)
def test_numbers_of_every_kind_are_welcome(value):
    got = number('x', value, above=0, at_most=1.5)
    assert type(got) is float and got == float(value)


@pytest.mark.parametrize('value', [True, np.bool_(1), torch.tensor(True), '1', None, [1], 1j, Decimal(1), torch.ones(1),
                                   np.ones(2), torch.tensor(1j), torch.tensor(1., device='meta')], ids=repr)
def test_what_is_no_number_is_a_type_error(value):
    for check in (number, integer):
        with pytest.raises(TypeError, match='^x must be'): check('x', value)


@pytest.mark.parametrize('value', [torch.tensor(1.5, requires_grad=True), nn.Parameter(torch.tensor(1.))], ids=repr)
def test_what_cannot_be_learned_is_refused(value):
    "It would get no gradient, and stay what it is without a word."
    for make in (lambda: number('x', value), lambda: NormFaceLoss(value), lambda: GMSoftmaxLoss(alpha1=value),
                 lambda: NormFaceLoss(weight=value.expand(3)), lambda: GMSoftmaxLoss(beta1=value.expand(3)),
                 lambda: setattr(CosFaceLoss(), 'margin', value)):
        with pytest.raises(TypeError, match='requires grad'): make()
    assert NormFaceLoss(value.detach()).scale == value


def test_ranges():
    for value, bounds in ((0, dict(above=0)), (-1, dict(at_least=0)), (2, dict(at_most=1)), (1, dict(below=1))):
        with pytest.raises(ValueError, match=f'^x must be .*got {value}'): number('x', value, **bounds)
    assert number('x', 0, at_least=0) == number('x', 0, at_most=0) == 0
    for value in (math.nan, math.inf, -math.inf, 10 ** 400, torch.tensor(math.nan)):
        with pytest.raises(NotFinite, match='^x must be a finite number'): number('x', value)
    assert issubclass(NotFinite, ValueError)
    for value in (1., np.float64(2), torch.tensor(3.)):
        with pytest.raises(TypeError, match='^x must be an int'): integer('x', value)
    for value in (3, np.uint8(3), torch.tensor(3)): assert type(integer('x', value, at_least=3, at_most=3)) is int
    with pytest.raises(ValueError, match='^x must be .*got 2'): integer('x', 2, at_least=3)


def test_flags_and_choices():
    assert flag('x', True) is True and choice('x', 'a', ('a', 'b')) == 'a'
    for value in (1, 0, 'no', None, np.bool_(True), torch.tensor(True)):
        with pytest.raises(TypeError, match='^x must be True or False'): flag('x', value)
    with pytest.raises(ValueError, match="^x must be 'a' or 'b', got 'c'"): choice('x', 'c', ('a', 'b'))
    with pytest.raises(TypeError, match='^x must be a string'): choice('x', None, ('a', 'b'))


class Module(nn.Module):
    number, choice, flag = Number(above=0, below=2), Choice('a', 'b'), Flag()

    def __init__(self):
        super().__init__()
        self.number, self.choice, self.flag = 1, 'a', False


def test_attributes_are_checked_whenever_they_are_set():
    "What is wrong leaves what was there; copies and pickles keep it, each its own."
    module = Module()
    for name, wrong, error in (('number', 2, ValueError), ('number', '1', TypeError), ('choice', 'c', ValueError),
                               ('choice', 1, TypeError), ('flag', 1, TypeError)):
        with pytest.raises(error, match=f'^{name} must'): setattr(module, name, wrong)
    assert (module.number, module.choice, module.flag) == (1., 'a', False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.number = 1.5
        assert (other.number, module.number) == (1.5, 1.)
        with pytest.raises(ValueError, match='^number must'): other.number = 5
    with pytest.raises(AttributeError): getattr(Module.__new__(Module), 'number')  # noqa: B009


def test_numbers_of_each_class():
    expected = torch.tensor([1., 2, 3])
    for values in ([1, 2, 3], (1., 2., 3.), range(1, 4), np.array([1, 2, 3]), expected, expected.double(),
                   expected.half(),
                   expected.int(), [np.float32(1), torch.tensor(2.), 3], (x for x in (1, 2, 3)),
                   {1: 0, 2: 0, 3: 0}.keys()):
        got = per_class('x', values, above=0)
        assert type(got) is torch.Tensor and got.tolist() == [1, 2, 3] and got.dtype in (torch.float32, torch.float64)
    for values in ('123', b'123', {1: 2, 2: 3}, {1, 2}, None, 5, [True, False], ['a', 'b'], [[1], [1, 2]],
                   torch.ones(3, dtype=torch.bool), torch.ones(3) * 1j, [2., True, 3.]):
        with pytest.raises(TypeError, match='^x must be'): per_class('x', values)
    for values, error in (([1.], ValueError), ([], ValueError), ([[1, 2]], ValueError), ([1, 0], ValueError),
                          ([1, math.nan], NotFinite), ([1, math.inf], NotFinite), ([1, 1e31], ValueError)):
        with pytest.raises(error, match='^x must be'): per_class('x', values, above=0, below=1e30)


@pytest.mark.parametrize('values', [
    [1., 1e-320], torch.tensor([1., 1e-320], dtype=torch.float64), np.array([1e-40, 1])],
    ids=['list', 'tensor', 'array'])
def test_a_weight_that_float32_takes_for_0_is_refused(values):
    with pytest.raises(ValueError, match='^x must be 0 or at least 1e-37'): per_class('x', values, at_least=0)


class Subclass(torch.Tensor): pass


def test_subclasses_are_looked_through():
    "The values of a subclass, such as fastai's, are checked like any others."
    x = torch.eye(3).as_subclass(Subclass)
    assert type(plain_tensor(x)) is torch.Tensor and torch.equal(plain_tensor(x), torch.eye(3))
    for wrong, error in ((x * 30, ValueError), (x * math.nan, NotFinite)):
        with pytest.raises(error, match='^cosines must'): check_cosines(wrong, torch.arange(3))
    cosines, targets = check_cosines(x, torch.arange(3).as_subclass(Subclass))
    assert type(cosines) is type(targets) is torch.Tensor


def test_values_are_looked_at_on_an_eager_cpu_only():
    x, seen = torch.ones(2), []
    assert values_are_cheap(x) and values_are_cheap(nn.Parameter(x))
    assert not values_are_cheap(x.to('meta')) and not values_are_cheap(x.as_subclass(Subclass))
    def look(x):
        seen.append(values_are_cheap(x))
        return x * 1
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.func.vmap(look)(x[None])
    make_fx(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    with FakeTensorMode(allow_non_fake_inputs=True): look(x)  # what is formed of it has no values
    assert len(seen) == 5 and not any(seen)
    with torch.no_grad(): assert values_are_cheap(x)


def test_prototypes():
    good = torch.eye(3)
    check_prototypes(good)
    for row, error in ((math.nan, NotFinite), (math.inf, NotFinite), (0., ValueError)):
        bad = good.clone()
        bad[1] = row
        with pytest.raises(error, match='^points must .*row 1'): check_prototypes(bad, 'points')
    check_prototypes(good[:1], least=1)
    with pytest.raises(ValueError, match='k ≥ 2'): check_prototypes(good[:1])


@pytest.mark.parametrize('make', [np.int64, np.uint8, torch.tensor])
def test_whole_numbers_of_every_kind_are_welcome(make):
    "In evaluation, too; a bool is none."
    distances = torch.tensor([[.1, .5, .9], [.7, .2, .8]])
    def calls(n):
        yield lambda: evaluate(distances, [0, 1], [0, 0], [0, 1, 2], [1, 1, 1], max_rank=n).cmc
        yield lambda: kfold_accuracy([.1, .2, 1.5, 1.6], [1, 1, 0, 0], folds=n).accuracies
        yield lambda: inspect_prototypes(torch.eye(4), pairs=n).pairs
        yield lambda: vars(RandomAffine(n))['shift']
        yield lambda: digits().dataloaders(64, seed=n).train.one_batch()[1].tolist()
    for given, usual in zip(calls(make(2)), calls(2), strict=True): assert str(given()) == str(usual())
    for call in calls(True):
        with pytest.raises(TypeError, match='must be an int'): call()


@pytest.mark.parametrize('kind', [SampleMarginRegularizer, ZeroCentroidRegularizer])
def test_a_weight_whose_product_is_infinite_is_refused(kind):
    with pytest.raises(ValueError, match='weight must be ≥ 0'): kind(1e308)
