"`import largest_margins as lm` gives every name, at once, and type checkers see what it gives."
import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import largest_margins as lm

PACKAGE = Path(lm.__file__).parent
STUB = ast.parse((PACKAGE/'__init__.pyi').read_text(encoding='utf-8'))
HOMES = {name.name: node.module for node in STUB.body if isinstance(node, ast.ImportFrom) for name in node.names}
CONTRACT = '''class_margin sample_margins class_sample_margins min_sample_margin norm_ratio neural_collapse simplex
    riesz_energy log_riesz_energy best_packing largest_sample_margins class_margin_bound min_sample_margin_bound verify
    claims prove
    NormFaceLoss CosFaceLoss ArcFaceLoss SphereFaceLoss CombinedMarginLoss LDAMLoss GMSoftmaxLoss LMSoftmaxLoss
    SampleMarginLoss FocalLoss ElasticFaceLoss AdaFaceLoss zero_centroid CosineLinear MarginHead ShardedMarginHead
    imbalanced_counts imbalanced_indices SampleMarginRegularizer ZeroCentroidRegularizer MarginRecorder
    DeferredReweighting margin_learner evaluate parse_market_name kfold_accuracy tar_at_far read_pairs
    NotFinite'''.split()


def run(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout


def test_every_name_of_the_contract_is_there():
    assert set(CONTRACT) <= HOMES.keys()
    assert set(HOMES) <= set(dir(lm))


def test_a_name_is_what_its_module_has():
    for name, home in HOMES.items():
        if name != 'claims': assert getattr(lm, name) is getattr(import_module(f'largest_margins.{home}'), name)


def test_the_import_is_free_of_torch_and_modules_stay_importable():
    assert run('import sys, largest_margins; print("torch" in sys.modules)') == 'False\n'
    assert run('import largest_margins as lm, largest_margins.losses; '
               'print(lm.losses.CosFaceLoss is lm.CosFaceLoss)') == 'True\n'
    with pytest.raises(AttributeError, match='CosFace'): _ = lm.CosFace


def test_claims_is_a_function_and_a_module():
    assert run('import largest_margins as lm; print(len(lm.claims()) > 10); import largest_margins.claims as c; '
               'print(c.prove is lm.prove, len(lm.claims()) == len(c.claims()))') == 'True\nTrue True\n'


RIGHT = '''
import largest_margins as lm
loss = lm.CosFaceLoss(scale=30., margin=.2, reduction='class-mean')
loss.margin = .3
head = lm.MarginHead(512, 10, loss)
cosines, classes = head.top(lm.simplex(3, 4), n=2)
margin: float = lm.class_margin(lm.simplex(3, 4)).item()
bound: float = lm.class_margin_bound(8, 3).radians
'''
WRONG = ("lm.CosFaceLoss(scal=30.)", "lm.CosFaceLoss(margin='a')", "lm.MarginHead(512, 10)", "lm.ArcFaceLos()",
         "lm.class_margin_bound('8', 3)", "lm.LMSoftmaxLoss(tilt='x')")


STAND_IN = {'torch/__init__.pyi': """from typing import Any
from . import nn as nn
class Tensor:
    def item(self) -> float: ...
    def __getattr__(self, name: str) -> Any: ...
def __getattr__(name: str) -> Any: ...
""", 'torch/nn/__init__.pyi': """from typing import Any
class Module:
    def __getattr__(self, name: str) -> Any: ...
def __getattr__(name: str) -> Any: ...
"""}


def test_mypy_knows_right_calls_from_wrong_ones(tmp_path):
    """As in a user's project, where a Tensor and a Module are classes: the rest of torch is left out, for time's sake.

    Were `nn.Module` unknown, mypy would take any argument of a dataclass that inherits from it."""
    for name, text in STAND_IN.items():
        (tmp_path/'stubs'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'stubs'/name).write_text(text)
    (tmp_path/'right.py').write_text(RIGHT)
    (tmp_path/'wrong.py').write_text('import largest_margins as lm\n' + '\n'.join(WRONG) + '\n')
    left_out = 'torch torchvision fastai fastcore numpy scipy matplotlib PIL sklearn'.split()
    (tmp_path/'mypy.ini').write_text('[mypy]\nfollow_imports = silent\nignore_missing_imports = True\n' + ''.join(
        f'[mypy-{name}.*]\nfollow_imports = skip\nfollow_imports_for_stubs = True\n' for name in left_out) + ''.join(
        f'[mypy-{name}]\nfollow_imports = silent\n' for name in ('torch', 'torch.nn')))

    command = [sys.executable, '-m', 'mypy', '--config-file', 'mypy.ini', '--no-error-summary', 'right.py', 'wrong.py']
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                           env=os.environ | {'MYPYPATH': f'{tmp_path/"stubs"}{os.pathsep}{PACKAGE.parent}'}).stdout
    lines = [line.split(':')[:2] for line in found.splitlines() if ': error:' in line]
    assert {int(line) for name, line in lines if name == 'wrong.py'} == set(range(2, 2 + len(WRONG))), found
    assert {name for name, _ in lines} == {'wrong.py'}, found
