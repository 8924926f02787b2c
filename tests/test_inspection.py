"Saved classifiers: every format is read, nothing is executed, the numbers are right; fixed prototypes are written."
import argparse
import json
import math
import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from largest_margins.bounds import class_margin_bound
from largest_margins.certificates import verify
from largest_margins.cli import main
from largest_margins.codes import best_packing
from largest_margins.data import load
from largest_margins.experiments import Configuration, Result, train
from largest_margins.heads import CosineLinear
from largest_margins.inspection import (
    as_prototypes,
    find_classifier,
    inspect_prototypes,
    inspection_page,
    read_classifier,
    read_tensors,
    write_prototypes,
)
from largest_margins.learner import ConvBody, margin_learner
from largest_margins.losses import CosFaceLoss
from largest_margins.margins import class_margin

K, D = 5, 7
W = torch.randn(K, D, generator=torch.Generator().manual_seed(0))


def state(prefix=''):
    "A small network's weights, with W as its last."
    names = {'conv.weight': torch.rand(3, 1, 3, 3), 'bn.weight': torch.rand(3), 'bn.steps': torch.tensor(4),
             'neck.weight': torch.rand(D, 3), 'fc.weight': W, 'fc.bias': torch.rand(K)}
    return {prefix + name: t for name, t in names.items()}


def run(capsys, *argv):
    "Exit code, output and errors of the command."
    with pytest.raises(SystemExit) as end: main([str(a) for a in argv])
    return end.value.code, *capsys.readouterr()


# Formats

optimiser = {'state': {0: {'exp_avg': torch.rand(K, D)}}, 'param_groups': [{'lr': .1, 'params': [0]}]}
timm_like = {'epoch': 3, 'arch': 'x', 'state_dict': state(), 'optimizer': optimiser, 'metric': np.float64(9),
             'args': argparse.Namespace(lr=.1, path=Path('x'), tuned={'a': [1, None]}), 'torch': torch.__version__}
formats = {
    'tensor': W, 'parameter': nn.Parameter(W), 'state_dict': state(), 'model': {'model': state(), 'opt': optimiser},
    'model_state_dict': {'model_state_dict': state(), 'optimizer_state_dict': optimiser}, 'timm': timm_like,
    'timm ema': {**timm_like, 'state_dict_ema': state(), 'state_dict': {**state(), 'fc.weight': 2 * W}},
    'data parallel': {'state_dict': state('module.')}, 'compiled': state('_orig_mod.'), 'lightning': state('net.'),
    'head': {'backbone': {'layer1.weight': torch.rand(4, 4)}, 'head': {'weight': W, 'bias': W[0]}},
    'sequential': {'0.0.weight': torch.rand(D, D), '1.2.weight': torch.rand(9, 9), '1.10.weight': W},
    'numbered': {'fc1.weight': torch.rand(9, 9), 'fc2.weight': torch.rand(9, 9), 'fc10.weight': W},
    'convolution': {'features.3.squeeze.weight': torch.rand(9, 9, 1, 1), 'classifier.1.weight': W[..., None, None]}}


@pytest.mark.parametrize('name', formats)
def test_torch_formats(tmp_path, name):
    torch.save(formats[name], tmp_path/'file.pth')
    found = read_classifier(tmp_path/'file.pth')
    torch.testing.assert_close(found, W, rtol=0, atol=0)
    assert type(found) is torch.Tensor and not found.requires_grad


def test_old_torch_files(tmp_path):
    torch.save(state(), tmp_path/'old.tar', _use_new_zipfile_serialization=False)
    torch.testing.assert_close(read_classifier(tmp_path/'old.tar'), W)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_safetensors_in_every_precision(tmp_path, dtype):
    save_file({name: t.to(dtype) for name, t in state().items()}, tmp_path/'file.safetensors')
    found = read_classifier(tmp_path/'file.safetensors')
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, W.to(dtype).to(found.dtype), rtol=0, atol=0)


@pytest.mark.parametrize('with_opt', [True, False])
def test_what_fastai_saves(tmp_path, with_opt):
    dls = load('digits').dataloaders(256, device='cpu', seed=0)
    learn = margin_learner(dls, ConvBody(widths=(4, 8)), CosFaceLoss(scale=20., margin=.1), embedding=6, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    saved = learn.save('run', with_opt=with_opt)
    torch.testing.assert_close(read_classifier(saved), learn.model[-1].weight.detach())


def test_what_experiments_save(tmp_path):
    found = train(Configuration(epochs=1, embedding=6))
    found.save(tmp_path/'run.pt')
    seen = inspect_prototypes(read_classifier(tmp_path/'run.pt'))
    torch.testing.assert_close(read_classifier(tmp_path/'run.pt'), Result.load(tmp_path/'run.pt').prototypes)
    assert math.degrees(seen.class_margin) == pytest.approx(found.class_margin, abs=1e-4)
    assert seen.norm_ratio == pytest.approx(found.norm_ratio, rel=1e-5)
    assert seen.centroid_norm == pytest.approx(found.centroid_norm, rel=1e-4)


# Which tensor

@pytest.mark.parametrize('name', ['alexnet', 'convnext_tiny', 'densenet121', 'efficientnet_b0', 'googlenet',
                                  'inception_v3', 'mnasnet0_5', 'mobilenet_v2', 'mobilenet_v3_small', 'resnet50',
                                  'shufflenet_v2_x0_5', 'squeezenet1_0', 'swin_t', 'vgg11', 'vit_b_16', 'maxvit_t'])
def test_torchvision_classifiers(name):
    options = dict(init_weights=False) if name in ('googlenet', 'inception_v3') else {}
    with torch.device('meta'): model = getattr(torchvision.models, name)(num_classes=321, **options)
    weights = model.state_dict()
    found = [n for n, t in weights.items() if t.ndim > 1 and len(t) == 321 and 'aux' not in n.lower()]
    assert [find_classifier(weights)] == found


@pytest.mark.parametrize('name', ['resnet18', 'vit_tiny_patch16_224', 'convnext_atto', 'efficientnet_b0', 'regnety_002',
                                  'swin_tiny_patch4_window7_224', 'mobilenetv3_small_050', 'mixer_s32_224',
                                  'levit_128s', 'seresnet18', 'coat_tiny', 'nf_resnet26', 'eva02_tiny_patch14_224',
                                  'cspresnet50'])
def test_timm_classifiers(name):
    with torch.device('meta'): model = timm.create_model(name, num_classes=321)
    weights, classifier = model.state_dict(keep_vars=True), model.get_classifier()
    if isinstance(classifier, tuple): classifier = classifier[0]  # the other one is distilled
    wanted = next(p for p in classifier.parameters() if p.ndim == 2)
    assert weights[find_classifier(weights)] is wanted


def test_ambiguous_keys():
    towers = {'a.fc.weight': W, 'b.fc.weight': W, 'a.conv.weight': torch.rand(3, 3, 1, 1)}
    with pytest.raises(ValueError, match=r'--key\): a\.fc\.weight \[5, 7\], b\.fc\.weight \[5, 7\]$'):
        find_classifier(towers)
    with pytest.raises(ValueError, match=r"got 'fc\.weight'; it has a\.fc\.weight \[5, 7\], b\.fc\.weight \[5, 7\]$"):
        find_classifier(towers, 'fc.weight')
    with pytest.raises(ValueError, match="got 'c'; it has b.fc.weight"): find_classifier(towers, 'c')
    assert find_classifier(towers, 'b.fc.weight') == 'b.fc.weight'
    assert find_classifier({'model.b.fc.weight': W, **towers}, 'b.fc.weight') == 'b.fc.weight'
    with pytest.raises(ValueError, match='and 88 more'): find_classifier({f'{i}x.weight': W for i in range(100)})
    with pytest.raises(ValueError, match='must hold a classifier'):
        find_classifier({'bias': W[0], 'n': torch.ones(2, 2).int()})


# What is refused

class Bad:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('how', ['torch', 'old torch', 'pickle', 'namespace'])
def test_nothing_is_executed(tmp_path, how, capsys):
    file, proof = tmp_path/'file.pth', tmp_path/'executed'
    content = {'fc.weight': W, 'x': Bad(proof)}
    if how == 'pickle': file.write_bytes(pickle.dumps(content, protocol=2))
    elif how == 'namespace': torch.save({'fc.weight': W, 'args': argparse.Namespace(x=Bad(proof))}, file)
    else: torch.save(content, file, _use_new_zipfile_serialization=how == 'torch')
    with pytest.raises(ValueError, match='was not opened|is damaged'): read_tensors(file)
    code, out, err = run(capsys, 'inspect', file)
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Bad(proof)))
    assert proof.exists(), 'the file does harm when it is opened carelessly'


def test_harmless_objects_stay_empty(tmp_path):
    "The names that are let through are never the real classes."
    class Posing:
        def __reduce__(self): return argparse.Namespace, (), {'tensor': W}
    torch.save({'fc.weight': W, 'args': Posing()}, tmp_path/'file.pth')
    assert list(read_tensors(tmp_path/'file.pth')) == ['fc.weight']
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path/'file.pth', weights_only=True)


def test_modules_and_programs_are_refused(tmp_path):
    torch.save(nn.Linear(D, K), tmp_path/'module.pth')
    with pytest.raises(ValueError, match=r'holds torch\.nn\.modules\.linear\.Linear, which is no tensor .*state_dict'):
        read_tensors(tmp_path/'module.pth')
    torch.jit.trace(nn.Linear(D, K), torch.rand(2, D)).save(tmp_path/'program.pt')
    with pytest.raises(ValueError, match='holds TorchScript, which is no tensor'): read_tensors(tmp_path/'program.pt')


@pytest.mark.parametrize('name', ['file.pth', 'old.pth', 'file.safetensors'])
def test_damaged_files(tmp_path, name):
    path = tmp_path/name
    if name == 'file.safetensors': save_file(state(), path)
    else: torch.save(state(), path, _use_new_zipfile_serialization=name == 'file.pth')
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for size in [0, 1, 7, 8, 9, *range(20, len(whole) - 1, len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match='is damaged|was not opened'): read_tensors(path)
    for _ in range(100):  # some of these files can be read, the others must be refused in the same way
        flipped = bytearray(whole)
        for at in rng.integers(0, len(whole), 3): flipped[at] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try: read_tensors(path)
        except ValueError as e: assert str(path) in str(e)


def test_empty_and_missing_files(tmp_path, capsys):
    torch.save({'epoch': 3, 'loss': [1.]}, tmp_path/'empty.pth')
    with pytest.raises(ValueError, match='holds no named tensors'): read_tensors(tmp_path/'empty.pth')
    for name in ('none.pth', 'none.safetensors', '.'):
        code, out, err = run(capsys, 'inspect', tmp_path/name)
        assert (code, out, err.count('\n')) == (2, '', 1)
        assert 'Errno' in err or 'No such file' in err


def test_weights_that_cannot_be_prototypes():
    broken = W.clone()
    broken[3, 2] = math.nan
    with pytest.raises(ValueError, match='fc.weight must be finite, row 3 is not'): as_prototypes(broken, 'fc.weight')
    with pytest.raises(ValueError, match='must have a direction, row 2 is zero'):
        as_prototypes(W * torch.arange(K).ne(2)[:, None])
    for shape in ((1, D), (D,), (2, 3, 3, 3)):
        with pytest.raises(ValueError, match=r'must be \[k, d\]'): as_prototypes(torch.ones(shape))
    with pytest.raises(TypeError, match='floating-point'): as_prototypes(torch.ones(3, 3).int())
    torch.testing.assert_close(as_prototypes(W.T, transposed=True), W)


def test_without_safetensors(tmp_path, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.split('.')[0] == 'safetensors']: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    torch.save(state(), tmp_path/'file.pth')
    assert run(capsys, 'inspect', tmp_path/'file.pth')[0] == 0
    for argv in (['inspect', tmp_path/'file.safetensors'], ['prototypes', 3, 3, '--out', tmp_path/'p.safetensors']):
        assert run(capsys, *argv) == (
            2, '', 'largest-margins: safetensors files need safetensors: pip install safetensors\n')


# The numbers

@pytest.mark.parametrize('k,d', [(2, 1), (2, 3), (3, 2), (40, 5), (1100, 6)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_numbers_of_every_pair(k, d, dtype):
    weight = torch.randn(k, d, generator=torch.Generator().manual_seed(k)).to(dtype) * torch.linspace(1, 9, k)[:, None]
    weight = weight.to(dtype)
    if d == 1: weight = torch.tensor([[1.], [-2.]], dtype=dtype)
    unit = nn.functional.normalize(weight.double())
    cosines = (unit @ unit.T).clamp(-1, 1)
    i, j = torch.triu_indices(k, k, 1)
    every = cosines[i, j].acos()
    order = every.argsort()[:7]
    found = inspect_prototypes(weight, pairs=7)
    assert [(a, b) for a, b, _ in found.pairs] == list(zip(i[order].tolist(), j[order].tolist()))
    torch.testing.assert_close(torch.tensor([r for *_, r in found.pairs]).double(), every[order], rtol=0, atol=1e-7)
    assert found.class_margin == pytest.approx(class_margin(weight).item(), abs=2e-7)
    torch.testing.assert_close(found.nearest, cosines.fill_diagonal_(-1).amax(1).acos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.angles.sort()[0], every.sort()[0], rtol=0, atol=1e-7)
    assert (found.k, found.d, found.sampled) == (k, d, k)
    assert found.centroid_norm == pytest.approx(unit.mean(0).norm().item(), abs=1e-12)
    norms = weight.double().norm(dim=1)
    assert found.norm_ratio == pytest.approx((norms.max() / norms.min()).item(), rel=1e-6)
    assert found.bound == class_margin_bound(k, d)
    assert found.gap == max(0, found.bound.radians - found.class_margin)


def test_twenty_thousand_classes_in_seconds():
    weight = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    weight[19_999] = 3 * weight[7] + 1e-5 * weight[8]
    weight[513] = weight[512] + .01 * weight[8]
    told, start = [], time.perf_counter()
    found = inspect_prototypes(weight, pairs=2, progress=lambda done, total: told.append((done, total)))
    assert time.perf_counter() - start < 30
    assert [p[:2] for p in found.pairs] == [(7, 19_999), (512, 513)]
    assert found.class_margin == pytest.approx(class_margin(weight).item(), rel=1e-4)
    assert found.nearest[7] == pytest.approx(found.class_margin, abs=1e-7)
    assert found.sampled == 1500 and len(found.angles) == 1500 * 1499 // 2
    assert found.angles.mean() == pytest.approx(math.pi / 2, abs=.01)
    assert told[-1][0] == told[-1][1] == len(told)
    assert '1500 of the 20000 classes, drawn at random' in inspection_page(found, 'many')


def test_memory_does_not_hold_all_pairs():
    "All cosines would be 7.2 GB in float64; what is kept is a few numbers a class."
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inspect_prototypes(torch.randn(30_000, 8, generator=torch.Generator().manual_seed(0)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize('weight,classes,verdict', [
    (best_packing(10, 12).points, None,
     'All classes are 96.38° apart or more, as far as 10 prototypes in 12 dimensions can be.'),
    (torch.tensor([[1., 0.], [2., 0.], [0., 1.]]), ['cat', 'feline', 'dog'],
     'The closest classes, cat and feline, have the same direction: no feature is nearer to one than to the other.'),
    (torch.tensor([[1., 0.], [1., 1.], [0., -1.]]), None,
     'The closest classes, 0 and 1, are 45.00° apart; 3 prototypes in 2 dimensions can all be 120.00° apart.'),
    (best_packing(10, 3, starts=8).points.flip(0), None, None)])
def test_verdicts(weight, classes, verdict):
    found = inspect_prototypes(weight, classes=classes)
    if verdict is None:  # the bound is not attained, and says so
        assert 'are 66.15° apart; 10 prototypes in 3 dimensions cannot all be more than 68.62° apart.' in found.verdict
        assert 'at most 68.62° (delsarte)' in str(found)
    else: assert found.verdict == verdict
    assert ' '.join(str(found).split()).endswith(found.verdict)
    assert max(map(len, str(found).splitlines())) <= 80


def test_bad_arguments():
    with pytest.raises(ValueError, match='pairs must be an int ≥ 1, got 0'): inspect_prototypes(W, pairs=0)
    with pytest.raises(ValueError, match='classes must be 5 names, got 2'): inspect_prototypes(W, classes=['a', 'b'])
    with pytest.raises(ValueError, match='weight must be finite'): inspect_prototypes(W / 0)
    assert len(inspect_prototypes(W, pairs=1000).pairs) == K * (K - 1) // 2


# The command

def test_inspect_command(tmp_path, capsys):
    torch.save({'model': state()}, tmp_path/'file.pth')
    (tmp_path/'names.txt').write_text('ant\nbee\n<cat>\ndög\neel\n', encoding='utf-8')
    code, out, err = run(capsys, 'inspect', tmp_path/'file.pth', '--pairs', 3, '--classes', tmp_path/'names.txt',
                         '--json', tmp_path/'new/a.json', '--html', tmp_path/'a.html')
    found = inspect_prototypes(W, pairs=3, classes=['ant', 'bee', '<cat>', 'dög', 'eel'])
    assert (code, err) == (0, '') and out == f'{tmp_path}/file.pth, model.fc.weight\n{found}\n'
    written = json.loads((tmp_path/'new/a.json').read_text(encoding='utf-8'))
    assert written == {'file': f'{tmp_path}/file.pth', 'tensor': 'model.fc.weight', **found.record()}
    assert written['class_margin_degrees'] == math.degrees(found.class_margin)
    assert [p['degrees'] for p in written['closest_pairs']] == [math.degrees(r) for *_, r in found.pairs]
    assert written['gap_degrees'] == pytest.approx(written['bound_degrees'] - written['class_margin_degrees'])
    page = (tmp_path/'a.html').read_text(encoding='utf-8')
    assert page.count('<img') == 1 and 'data:image/png;base64' in page and 'http' not in page and '<script' not in page
    assert 'color-scheme: light dark' in page and 'all pairs of all classes' in page
    assert '<cat>' not in page and '&lt;cat&gt;' in page
    for text in [*found.numbers(), *found.numbers().values()]: assert text in page


def test_key_and_transposed(tmp_path, capsys):
    torch.save({'a.kernel': W.T, 'b.kernel': W}, tmp_path/'file.pth')
    code, out, err = run(capsys, 'inspect', tmp_path/'file.pth')
    assert (code, out, err.count('\n')) == (2, '', 1) and 'a.kernel [7, 5], b.kernel [5, 7]' in err
    for how in [], ['--transposed']:
        code, out, _ = run(capsys, 'inspect', tmp_path/'file.pth', '--key', 'a.kernel', *how)
        assert code == 0 and str(inspect_prototypes(W)) in out
    code, out, _ = run(capsys, 'inspect', tmp_path/'file.pth', '--key', 'b.kernel', '--no-transposed')
    assert code == 0 and str(inspect_prototypes(W)) in out


def test_a_wrong_key_is_told_of_the_matrices_first():
    tensors = {f'bn{i}.running_mean': torch.zeros(3) for i in range(30)} | {'fc.weight': W, 'fc.bias': W[0]}
    with pytest.raises(ValueError, match=r'it has fc\.weight \[5, 7\]'): find_classifier(tensors, 'nope')


@pytest.mark.parametrize('argv', [
    ['inspect'], ['inspect', 'FILE', '--pairs', '0'], ['inspect', 'FILE', '--pairs', 'x'],
    ['inspect', 'FILE', '--key', 'no'], ['inspect', 'FILE', '--classes', 'FILE.txt'],
    ['inspect', 'FILE', '--classes', 'nowhere.txt'],
    ['prototypes', '3'], ['prototypes', '3', '3'], ['prototypes', '1', '3', '--out', 'OUT.safetensors'],
    ['prototypes', '3', '1', '--out', 'OUT.safetensors'], ['prototypes', 'x', '3', '--out', 'OUT.safetensors'],
    ['prototypes', '3', '3', '--out', 'OUT.pth'],
    ['prototypes', '9', '3', '--seconds', '-1', '--out', 'OUT.safetensors']])
def test_usage_errors(tmp_path, capsys, argv):
    torch.save(state(), tmp_path/'FILE')
    (tmp_path/'FILE.txt').write_text('one\ntwo\n')
    argv = [str(tmp_path/a) if a.startswith(('FILE', 'OUT')) else a for a in argv]
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, '') and 'Traceback' not in err
    assert len([line for line in err.splitlines() if line.startswith('largest-margins')]) == 1
    assert not list(tmp_path.glob('*OUT*'))


# Fixed prototypes

@pytest.mark.parametrize('k,d,how,certified', [(4, 9, 'regular simplex', False), (5, 2, 'regular polygon', False),
                                               (7, 4, 'orthogonal axes', False), (8, 3, 'search, seed 1', True)])
def test_prototypes_command(tmp_path, capsys, k, d, how, certified):
    path = tmp_path/'new/p.safetensors'
    code, out, err = run(capsys, 'prototypes', k, d, '--out', path, '--seed', 1)
    assert (code, err) == (0, '')
    packing, points = best_packing(k, d, seed=1), load_file(path)['weight']
    torch.testing.assert_close(points, packing.points, rtol=0, atol=0)
    for line, radians in zip(out.splitlines()[1:], (packing.class_margin, packing.bound, packing.gap), strict=True):
        assert f'{math.degrees(radians):.6f}°' in line
    with safe_open(path, 'pt') as file: header = file.metadata()
    assert (header['k'], header['d'], header['how']) == (str(k), str(d), how)
    assert float(header['class_margin']) == class_margin(points).item()
    assert float(header['gap']) == max(0., float(header['bound']) - float(header['class_margin']))
    bound = class_margin_bound(k, d)
    assert float(header['bound']) == bound.radians and bound.verify() and header['bound_method'] == bound.method
    assert path.with_suffix('.json').exists() == certified
    if certified: assert verify(path.with_suffix('.json').read_text())
    assert sorted(p.name for p in path.parent.iterdir()) == ['p.json', 'p.safetensors'][not certified:]
    head = CosineLinear(d, k).fix(points)
    assert not list(head.parameters()) and head.weight.dtype == torch.float32
    assert class_margin(head.weight).item() == pytest.approx(packing.class_margin, abs=1e-6)


def test_nothing_is_overwritten_unasked(tmp_path, capsys):
    path = tmp_path/'p.safetensors'
    write_prototypes(path, 8, 3)
    before = (tmp_path/'p.json').read_bytes(), path.stat().st_size, load_file(path)['weight'].tolist()
    code, out, err = run(capsys, 'prototypes', 4, 3, '--out', path)
    assert (code, out, err.count('\n')) == (2, '', 1) and 'p.safetensors and' in err and '--force' in err
    assert before == ((tmp_path/'p.json').read_bytes(), path.stat().st_size, load_file(path)['weight'].tolist())
    path.unlink()
    with pytest.raises(FileExistsError, match=r'p\.json exist already'): write_prototypes(path, 8, 3)
    write_prototypes(path, 8, 3, force=True)
    assert before == ((tmp_path/'p.json').read_bytes(), path.stat().st_size, load_file(path)['weight'].tolist())
    assert run(capsys, 'prototypes', 4, 3, '--out', path, '--force')[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ['p.safetensors'], 'the certificate of other prototypes is gone'
    assert load_file(path)['weight'].shape == (4, 3)


def test_a_stopped_search_leaves_nothing(tmp_path):
    def stop(*told): raise KeyboardInterrupt
    write_prototypes(tmp_path/'p.safetensors', 4, 3)
    before = (tmp_path/'p.safetensors').read_bytes()
    with pytest.raises(KeyboardInterrupt): write_prototypes(tmp_path/'p.safetensors', 9, 4, force=True, progress=stop)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]
