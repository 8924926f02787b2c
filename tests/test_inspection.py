"Saved classifiers: every format is read, nothing is executed, the numbers are right; fixed prototypes are written."
import argparse
import bz2
import collections
import datetime
import decimal
import enum
import gzip
import io
import json
import lzma
import math
import os
import pickle
import re
import resource
import sys
import tarfile
import types
import uuid
import warnings
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from largest_margins import callbacks
from largest_margins.bounds import class_margin_bound
from largest_margins.certificates import verify
from largest_margins.cli import main
from largest_margins.codes import best_packing
from largest_margins.data import load
from largest_margins.heads import CosineLinear
from largest_margins.inspection import (
    as_prototypes,
    choose_classifier,
    files_of,
    find_classifier,
    inspect_prototypes,
    inspection_page,
    read_classifier,
    read_tensors,
    write_prototypes,
)
from largest_margins.learner import margin_learner
from largest_margins.losses import CosFaceLoss
from largest_margins.margins import class_margin
from largest_margins.study.experiments import Configuration, train
from largest_margins.training.bodies import ConvBody

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
    'head': {'backbone': {'layer1.weight': torch.rand(4, 4)}, 'head': {'weight': W, 'bias': W[:, 0]}},
    'sequential': {'0.0.weight': torch.rand(D, D), '1.2.weight': torch.rand(9, 9), '1.10.weight': W},
    'numbered': {'fc1.weight': torch.rand(9, 9), 'fc2.weight': torch.rand(9, 9), 'fc10.weight': W},
    **{f'convolution {n}d': {'features.3.squeeze.weight': torch.rand(9, 9, *[1] * n),
                             'classifier.1.weight': W.view(K, D, *[1] * n)} for n in (1, 2, 3)}}


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
    kept = {name: getattr(found, name) for name in ('prototypes', 'cosines', 'targets')}
    callbacks.save_file(kept, tmp_path/'run.pt')
    seen = inspect_prototypes(read_classifier(tmp_path/'run.pt'))
    torch.testing.assert_close(read_classifier(tmp_path/'run.pt'), found.prototypes)
    assert math.degrees(seen.class_margin) == pytest.approx(found.class_margin, abs=1e-4)
    assert seen.norm_ratio == pytest.approx(found.norm_ratio, rel=1e-5)
    assert seen.centroid_norm == pytest.approx(found.centroid_norm, rel=1e-4)


class Settings(dict): pass


class Colour(enum.Enum): red = 1


def test_objects_beside_the_weights_do_no_harm(tmp_path):
    "Each of them refused the whole file once."
    objects = [datetime.datetime.now(), collections.defaultdict(list, a=[1]), Settings(lr=.1), Colour.red, {1, 2}, 3j,
               np.arange(6).reshape(2, 3), np.float32(3), np.dtype('f4'), Path('x'), frozenset([1]), torch.Size([2]),
               decimal.Decimal('1.5'), argparse.Namespace(a=1), types.SimpleNamespace(b=2), uuid.uuid4(), 10**30,
               collections.OrderedDict(a=1), collections.Counter('aab'), {(1, 2): 3}, slice(3), range(4),
               partial(int, 1), ValueError('x')]
    for protocol in range(2, 6):
        for zipped in (True, False):
            torch.save({'state_dict': state(), 'objects': objects}, tmp_path/'file.pth', pickle_protocol=protocol,
                       _use_new_zipfile_serialization=zipped)
            torch.testing.assert_close(read_classifier(tmp_path/'file.pth'), W, rtol=0, atol=0)
        (tmp_path/'file.pkl').write_bytes(pickle.dumps({'objects': objects, 'state_dict': state()}, protocol))
        torch.testing.assert_close(read_classifier(tmp_path/'file.pkl'), W, rtol=0, atol=0)


def test_every_layout_and_dtype_of_a_tensor(tmp_path):
    x = torch.rand(6, 8, dtype=torch.float64)
    tensors = {'transposed': x.T, 'part': x[2:5, 3:], 'step': x[::2, ::3], 'empty': x[:0], 'number': x[1, 1],
               'shared': x[0], 'bool': x > .5, **{str(t)[6:]: x.to(t) for t in (
                   torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int16, torch.int32, torch.int64,
                   torch.uint8, torch.complex64)}}
    for zipped in (True, False):
        torch.save(tensors, tmp_path/'file.pth', _use_new_zipfile_serialization=zipped)
        found = read_tensors(tmp_path/'file.pth')
        assert list(found) == list(tensors)
        for name, t in tensors.items(): torch.testing.assert_close(found[name], t, rtol=0, atol=0)
    torch.save({'x': x.to(torch.float8_e4m3fn)}, tmp_path/'file.pth')
    assert read_tensors(tmp_path/'file.pth')['x'].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize('name', ['file.pth', 'model', 'x.bin', 'y.txt'])
def test_a_file_is_what_it_holds(tmp_path, name):
    "Whatever its name says, and whatever the folder around it holds."
    path = tmp_path/name
    def read():
        torch.testing.assert_close(read_classifier(path), W, rtol=0, atol=0)
    save_file(state(), path)
    read()
    torch.save(state(), path)
    read()
    with open(path, 'wb') as file: np.savez(file, **{k: t.numpy() for k, t in state().items()})
    read()
    with open(path, 'wb') as file: np.savez_compressed(file, **{k: t.numpy() for k, t in state().items()})
    read()
    with open(path, 'wb') as file: np.save(file, W.numpy())
    read()
    with open(path, 'wb') as file: np.save(file, W.numpy().astype('>f8'))
    torch.testing.assert_close(read_classifier(path), W.double())
    path.write_bytes(pickle.dumps({k: t.numpy() for k, t in state().items()}, 4))
    read()


@pytest.mark.parametrize('protocol', [2, 4])
def test_what_paddle_saves(tmp_path, protocol):
    content = {k: t.numpy() for k, t in state().items()} | {'StructuredToParameterName@@': {'fc.weight': 'w_0'}}
    (tmp_path/'net.pdparams').write_bytes(pickle.dumps(content, protocol))
    for path in (tmp_path, tmp_path/'net.pdparams'):
        torch.testing.assert_close(read_classifier(path), W, rtol=0, atol=0)


def test_one_file_that_holds_several(tmp_path):
    "The first array, the last archive, or the last of a name would be read, and the others passed over in silence."
    path = tmp_path/'file'
    torch.save({'weight': W}, path)
    path.write_bytes(2 * path.read_bytes())  # as a shard of a distributed checkpoint is
    with pytest.raises(ValueError, match='several archives.*take them apart'): read_tensors(path)
    path.rename(tmp_path/'__0_0.distcp')
    with pytest.raises(ValueError, match='distributed checkpoint.*dcp_to_torch_save'):
        read_tensors(tmp_path/'__0_0.distcp')
    with open(path, 'wb') as file:
        for _ in range(2): np.save(file, W.numpy())
    with pytest.raises(ValueError, match=r'more follows.*numpy\.savez'): read_tensors(path)
    array = io.BytesIO()
    np.save(array, W.numpy())
    with warnings.catch_warnings(), zipfile.ZipFile(path, 'w') as file:
        warnings.simplefilter('ignore')
        for _ in range(2): file.writestr('fc.weight.npy', array.getvalue())
    with pytest.raises(ValueError, match='one name'): read_tensors(path)


def test_arrays_that_are_no_numbers_are_left_out(tmp_path):
    np.savez(tmp_path/'a.npz', w=W.numpy(), names=np.array(['a', 'b']), when=np.array(['2020'], 'datetime64'))
    assert list(read_tensors(tmp_path/'a.npz')) == ['w']
    np.savez(tmp_path/'b.npz', w=W.numpy(), objects=np.array([Bad('x')], dtype=object))
    with pytest.raises(ValueError, match='damaged, or no file of numbers'): read_tensors(tmp_path/'b.npz')


def test_onnx(tmp_path):
    "Its matrices lie as the nodes use them, by rows or by columns."
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    inner = torch.rand(D, 3)
    def model(*nodes, **arrays):
        ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ('x', 'y')]
        graph = helper.make_graph(list(nodes), 'g', ends[:1], ends[1:],
                                  [numpy_helper.from_array(a.numpy(), n) for n, a in arrays.items()])
        onnx.save(helper.make_model(graph), tmp_path/'net.bin')
    node = helper.make_node
    held = node('Constant', [], ['fc.weight'], value=numpy_helper.from_array(W.T.contiguous().numpy()))
    model(held, node('MatMul', ['x', 'fc.weight'], ['y']))
    torch.testing.assert_close(read_classifier(tmp_path/'net.bin'), W, rtol=0, atol=0)
    for columns in (True, False):
        last = (node('MatMul', ['h', 'fc.weight'], ['y']) if columns else
                node('Gemm', ['h', 'fc.weight', 'fc.bias'], ['y'], transB=1))
        model(node('Gemm', ['x', 'neck.weight'], ['h'], transB=1), last, **{
            'fc.bias': W[:, 0], 'fc.weight': W.T.contiguous() if columns else W, 'neck.weight': inner})
        found = read_tensors(tmp_path/'net.bin')
        assert list(found)[:2] == ['neck.weight', 'fc.weight']
        torch.testing.assert_close(read_classifier(tmp_path/'net.bin'), W, rtol=0, atol=0)
    onnx.save(onnx.load(tmp_path/'net.bin'), tmp_path/'net.onnx', save_as_external_data=True, location='numbers',
              size_threshold=0)
    assert {path.name for path in files_of(tmp_path/'net.onnx')} == {'net.onnx', 'numbers'}
    torch.testing.assert_close(read_classifier(tmp_path/'net.onnx'), W, rtol=0, atol=0)


def test_parts_with_an_index_and_folders(tmp_path, capsys):
    tensors = list(state().items())
    for i, part in enumerate((tensors[:3], tensors[3:]), 1):
        save_file(dict(part), tmp_path/f'model-{i:05}-of-00002.safetensors')
    places = {name: f'model-{1 + (i > 2):05}-of-00002.safetensors' for i, (name, _) in enumerate(tensors)}
    index = tmp_path/'model.safetensors.index.json'
    index.write_text(json.dumps({'metadata': {}, 'weight_map': places}), encoding='utf-8-sig')  # with a BOM
    part = tmp_path/'model-00001-of-00002.safetensors'
    for path in (index, tmp_path):
        torch.testing.assert_close(read_classifier(path), W, rtol=0, atol=0)
        assert run(capsys, 'inspect', path, '--json', part)[0] == 2 and load_file(part)
    for wrong in ('{}', '[]', '{"weight_map": 3}', '{"a":' * 9999,
                  *(f'{{"weight_map": {{"a": "{part}"}}}}' for part in ('../x', '..', '.', '', '/x', r'x\0'))):
        index.write_text(wrong)
        with pytest.raises(ValueError, match='index'): read_tensors(index)
    index.write_text(json.dumps({'weight_map': {'fc.weight': index.name}}))
    with pytest.raises(ValueError, match='is an index, and no part of one'): read_tensors(index)
    index.write_text(json.dumps({'weight_map': {'fc.weight': 'nowhere.safetensors'}}))
    code, out, err = run(capsys, 'inspect', index)
    assert (code, out, err.count('\n')) == (2, '', 1) and 'nowhere.safetensors' in err
    index.unlink()
    with pytest.raises(ValueError, match='name one of its files, model-00001'): read_tensors(tmp_path)
    (tmp_path/'new').mkdir()
    with pytest.raises(ValueError, match='a folder without a file of tensors'): read_tensors(tmp_path/'new')
    torch.save({'weight': W}, tmp_path/'new/pytorch_model.bin')
    assert read_tensors(tmp_path/'new')['weight'].shape == (K, D)
    for name in ('optimizer.bin', 'random_states_0.pkl'): torch.save({}, tmp_path/'new'/name)  # of accelerate
    torch.testing.assert_close(read_classifier(tmp_path/'new'), W, rtol=0, atol=0)
    save_file({'weight': 2 * W}, tmp_path/'new/model.safetensors')
    torch.testing.assert_close(read_classifier(tmp_path/'new'), 2 * W)


@pytest.mark.parametrize('content,said', [
    (b'\x89HDF\r\n\x1a\n' + bytes(99), 'HDF5 .*keras'), (b'GGUF\3' + bytes(99), 'GGUF .*gguf'),
    (b'version https://git-lfs.github.com/spec/v1\noid', 'git lfs pull'), (b'\n<!DOCTYPE html><html>', 'web page'),
    (b'<html>404', 'web page'), (b'<?xml version="1.0"?><Error>', 'web page'),
    (b'\xef\xbb\xbf<!-- 404 -->', 'web page'), (b'MATLAB 7.3 MAT-file' + bytes(99), 'h5py'),
    (b'# x\n', 'none of the files that are read'), (b'1.5, -2\n', r'numpy\.loadtxt'), (b'1e-5 2\n', r'numpy\.loadtxt'),
    (b'PAR1' + bytes(9), 'a table'), (b'\x80\x04\x95\0\0\0\0\0\0\0\0\x8c\x13joblib.numpy_pickle', r'joblib\.load'),
    (zlib.compress(b'x'), 'unpack it'), (b'\x04\x22\x4d\x18' + bytes(9), 'unpack it'), (b'PK\5\6' + bytes(18), 'zip'),
    (gzip.compress(b'x', mtime=0), 'unpack it'),
    (bz2.compress(b'x'), 'unpack it'), (lzma.compress(b'x'), 'unpack it'), (b'\x1c\0\0\0TFL3' + bytes(9), 'TensorFlow'),
    (b'X\n\0\0\0\3', r'rdata\.read_rds'), (b'RDX3\nX\n', r'rdata\.read_rds'),
    (b'%PDF-1.4', 'document'), (b'\x89PNG\r\n', 'image'), (b'', 'is damaged'), (b'just some text', 'is damaged')])
def test_what_is_not_read_is_called_by_its_name(tmp_path, capsys, content, said):
    (tmp_path/'file.pth').write_bytes(content)
    code, out, err = run(capsys, 'inspect', tmp_path/'file.pth')
    assert (code, out, err.count('\n')) == (2, '', 1) and re.search(said, err)


@pytest.mark.parametrize('name,said', [
    ('a.joblib', r'joblib\.load'), ('a.rds', r'rdata\.read_rds'), ('a.csv', 'skiprows=1'), ('a.mlmodel', 'Core ML'),
    ('saved_model.pb', r'saved_model\.load'), ('a.tar.gz', 'unpack it')])
def test_what_its_beginning_does_not_tell_its_name_does(tmp_path, name, said):
    (tmp_path/name).write_bytes(b'class,f0\ncat,1\n' if name == 'a.csv' else gzip.compress(b'x'))
    with pytest.raises(ValueError, match=said): read_tensors(tmp_path/name)


def test_archives_of_other_kinds(tmp_path):
    class Net(nn.Module):
        def forward(self, x): return 2 * x
    torch.export.save(torch.export.export(Net(), (torch.rand(2),)), tmp_path/'net.pt2')
    with pytest.raises(ValueError, match=r'torch\.export'): read_tensors(tmp_path/'net.pt2')
    torch.save(state(), tmp_path/'a.pth')
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as file: file.write(tmp_path/'a.pth', 'a.pth')
    with pytest.raises(ValueError, match=r'zip archive of a\.pth …: unpack it'): read_tensors(tmp_path/'a.zip')
    with tarfile.open(tmp_path/'a.tar', 'w') as file: file.add(tmp_path/'a.pth', 'a.pth')
    with pytest.raises(ValueError, match='unpack it'): read_tensors(tmp_path/'a.tar')
    with zipfile.ZipFile(tmp_path/'a.pth') as old, zipfile.ZipFile(tmp_path/'b.pth', 'w', 8) as new:
        for name in old.namelist(): new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match='holds a packed member'): read_tensors(tmp_path/'b.pth')
    for folder in ('', 'a/b/'):  # unpacked, and zipped again from inside or from above
        with zipfile.ZipFile(tmp_path/'a.pth') as old, zipfile.ZipFile(tmp_path/'b.pth', 'w') as new:
            for name in old.namelist(): new.writestr(folder + name.split('/', 1)[1], old.read(name))
        torch.testing.assert_close(read_classifier(tmp_path/'b.pth'), W, rtol=0, atol=0)


def test_a_flipped_bit_is_found_out(tmp_path):
    "In the numbers of whatever keeps a checksum."
    torch.save(state(), tmp_path/'file.pth')
    np.savez(tmp_path/'file.npz', **{name: t.numpy() for name, t in state().items()})
    for name in ('file.pth', 'file.npz'):
        flipped = bytearray((tmp_path/name).read_bytes())
        flipped[flipped.find(W.numpy().tobytes())] ^= 1
        (tmp_path/name).write_bytes(flipped)
        with pytest.raises(ValueError, match='checksum|CRC'): read_tensors(tmp_path/name)


def test_every_flipped_bit_in_our_prototypes_is_refused_or_without_effect(tmp_path):
    path = tmp_path/'p.safetensors'
    whole, refused = write_prototypes(path, 5, 2).points, 0
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try: assert next(iter(read_tensors(path).values())).equal(whole)
        except ValueError as e: refused += str(path) in str(e)
    assert refused > len(content) // 2
    facts = {'checksum': 'somebody else’s'}
    save_file({'weight': W}, path, facts)
    assert torch.equal(read_classifier(path), W)


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


def matrices(**shapes): return {name.replace('__', '.'): torch.rand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize('tensors,said', [
    (matrices(conv__weight=(9, 3, 3, 3), fc__scale=(11, 1), fc__weight=(11, 7)) | {
        'fc.weight': torch.zeros(11, 7).char()}, 'quantized, int8'),
    ({'fc.weight': torch.zeros(11 * 7, 1).byte(), 'fc.absmax': torch.rand(11), 'neck.weight': torch.rand(7, 3)},
     'quantized, uint8'),
    ({'lm_head.qweight': torch.zeros(4, 9).int(), 'lm_head.scales': torch.rand(2, 9).half()}, 'lm_head.scales'),
    ({'fc.weight': torch.rand(9, 4).to(torch.float8_e4m3fn), 'fc.weight_scale': torch.rand(())}, 'quantized'),
    (matrices(model__layers__30__self_attn__k_proj__weight=(8, 64)), 'inside the network'),
    (matrices(model__layers__30__self_attn__out_proj__weight=(8, 64)), 'inside the network'),
    (matrices(model__embed_tokens__weight=(320, 64)), 'inside the network'),
    (matrices(encoder__layer__3__output__dense__weight=(64, 64)), 'inside the network'),
    (matrices(blocks__0__mlp__fc1__weight=(64, 16), blocks__0__mlp__fc2__weight=(16, 64)), 'inside the network'),
    (matrices(bn2__running_mean=(64,), fc__weight=(64, 784), fc__bias=(64,), features__running_mean=(64,)),
     'makes 64 features for'),
    (matrices(conv__weight=(4, 3), head__fc1__weight=(30, 12), head__fc1__bias=(30,), head__norm__weight=(30,)),
     'makes 30 features for head.norm'),
    (matrices(conv__weight=(4, 3), pre_classifier__weight=(30, 12)), 'pre_classifier.weight'),
    (matrices(heads__0__weight=(5, 7), heads__1__weight=(9, 7)), 'heads.0.weight'),
    (matrices(head1__weight=(5, 8), head2__weight=(5, 8), head3__weight=(9, 8)), 'head1.weight'),
    (matrices(fc_age__weight=(5, 8), fc_sex__weight=(2, 8)), 'fc_age.weight'),
    (matrices(conv__bias=(64,), linear__weight=(64, 10)), 'conv.bias gives 64 features'),
    (matrices(fc__weight=(30, 48), fc__bias=(30,), margin__weight=(100, 30)), 'and margin.weight takes as many'),
    (matrices(weight=(512, 10575)), '512 is a usual number'),
    (matrices(weight=(64, 100)), '64 is a usual number'),
    ({'fc/weights:0': torch.rand(5, 7), 'fc/biases:0': torch.rand(7)}, 'its bias has 7'),
    (matrices(fc__weight=(5, 7), fc__bias=(7,)), 'its bias has 7')])
@pytest.mark.parametrize('kind', ['pth', 'safetensors'])
def test_a_doubt_is_a_question(tmp_path, capsys, tensors, said, kind):
    path = tmp_path/f'file.{kind}'
    if kind == 'pth': torch.save(tensors, path)
    else:
        save_file(tensors, path)  # which keeps no order
    code, out, err = run(capsys, 'inspect', path)
    assert (code, out, err.count('\n')) == (2, '', 1) and said in err and ('--key' in err or 'transposed' in err
                                                                         or 'quantized' in err)


@pytest.mark.parametrize('tensors,name,notes', [
    (matrices(weight=(5, 7)), 'weight', ['which side']), (matrices(weight=(10, 64)), 'weight', []),
    (matrices(fc__weight=(64, 10), fc__bias=(64,)), 'fc.weight', ['a usual number of features']),
    (matrices(bn__bias=(10,), fc__weight=(48, 10)), 'fc.weight', []),
    (matrices(net__0__weight=(64, 784), net__0__bias=(64,), net__2__weight=(10, 64), net__2__bias=(10,)),
     'net.2.weight', []),
    (matrices(layers__0__weight=(64, 784), layers__2__weight=(10, 64), layers__2__bias=(10,)), 'layers.2.weight', []),
    (matrices(encoder__layers__0__attn__qkv__weight=(9, 3), classifier__dense__weight=(7, 7),
              classifier__out_proj__weight=(5, 7), classifier__out_proj__bias=(5,)), 'classifier.out_proj.weight', []),
    (matrices(head__weight=(9, 64), head__bias=(9,), head_dist__weight=(9, 64)), 'head.weight', ['another head']),
    (matrices(fc__weight=(9, 64), fc__bias=(9,), fc2__weight=(5, 64), fc2__bias=(5,)), 'fc.weight', ['another head']),
    (matrices(model__fc__weight=(9, 64), model__fc__bias=(9,), ema__fc__weight=(9, 64)), 'model.fc.weight', ['a copy']),
    (matrices(head__fc1__weight=(64, 64), head__fc2__weight=(9, 64), head__fc2__bias=(9,)), 'head.fc2.weight', []),
    (matrices(fc__weight=(5, 7), fc__bias=(5,)) | {'mask': torch.ones(5, 7).bool()}, 'fc.weight', []),
    (matrices(last_linear__weight=(512, 64), last_bn__running_mean=(512,), logits__weight=(900, 512),
              logits__bias=(900,)) | {'last_linear.weight': torch.rand(512, 64, 1, 1)}, None, None)])
def test_no_doubt_is_no_question(tensors, name, notes):
    if name is None:
        with pytest.raises(ValueError, match='logits'): choose_classifier(tensors)
        return
    found = choose_classifier(tensors)
    assert found.name == name and torch.equal(found.weight, tensors[name])
    assert len(found.notes) == len(notes) and all(a in b for a, b in zip(notes, found.notes))


@pytest.mark.parametrize('tensors,said', [
    (matrices(fc__parametrizations__weight__original1=(10, 64)), 'original1 is a part of what'),
    (matrices(fc__weight_v=(10, 64), fc__weight_g=(9, 1)), 'fc.weight_v is a part of what'),
    (matrices(fc__base_layer__weight=(10, 64)), 'fc.base_layer.weight is a part of what'),
    ({'stages.3.attn.fc.weight': torch.rand(8, 8, 1, 1), 'stem.weight': torch.rand(8, 3, 4, 4)}, 'hold a classifier')])
def test_parts_of_a_weight_and_squeezes_are_no_classifier(tensors, said):
    with pytest.raises(ValueError, match=said): choose_classifier(tensors)


def test_the_class_list_says_which_side(tmp_path, capsys):
    torch.save(W, tmp_path/'file.pth')
    names = tmp_path/'names.txt'
    for n, code, said in ((K, 0, ''), (D, 2, 'there are 7 names: --transposed'),
                          (6, 2, 'classes must be 5 names, got 6')):
        names.write_text('\ufeff' + '\n'.join('abcdefg'[:n]) + '\n\n', encoding='utf-8')
        got, out, err = run(capsys, 'inspect', tmp_path/'file.pth', '--classes', names)
        assert got == code and said in err and ('Note' not in out)
    assert run(capsys, 'inspect', tmp_path/'file.pth', '--classes', names, '--transposed')[0] == 2
    for content, said in ((b'a\n\nb\nc\nd\n', 'line 2, which is blank'), (b'\xe4\nb\nc\nd\ne', 'UTF-8')):
        names.write_bytes(content)
        code, out, err = run(capsys, 'inspect', tmp_path/'file.pth', '--classes', names)
        assert (code, out, err.count('\n')) == (2, '', 1) and said in err and 'names.txt' in err


def test_weight_norm_and_pruning(tmp_path):
    "Measured is the weight that the layer multiplies with."
    from torch.nn.utils import prune
    made = [parametrizations.weight_norm(nn.Linear(D, K)), weight_norm(nn.Linear(D, K)), nn.Linear(D, K),
            parametrizations.weight_norm(nn.Linear(D, K), dim=1)]
    prune.l1_unstructured(made[2], 'weight', .3)
    for layer in made:
        for p in layer.parameters(): p.data *= torch.rand(p.shape)
        for prefix in ('fc.', ''):
            torch.save({prefix + k: t for k, t in layer.state_dict().items()}, tmp_path/'file.pth')
            layer(torch.rand(1, D))  # an old hook computes the weight then
            torch.testing.assert_close(read_classifier(tmp_path/'file.pth'), layer.weight.detach())


def test_parts_of_one_classifier(tmp_path, capsys):
    "Partial FC: each rank has saved the rows of its classes, and rank 10 comes after rank 2."
    rows = torch.rand(33, 8)
    for rank, part in enumerate(rows.chunk(11)):
        torch.save({'backbone': {'a.weight': torch.rand(8, 3)}, 'softmax_fc': {'weight': part}, 'rank': rank},
                   tmp_path/f'checkpoint_gpu_{rank}.pt')
    files = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, 'inspect', *files, '--key', 'softmax_fc.weight', '--json', tmp_path/'a.json')
    assert code == 0 and str(inspect_prototypes(rows)).split('\n\n')[0] in out
    assert len(json.loads((tmp_path/'a.json').read_text())['file']) == 11
    assert '11 files were read as parts' in out and 'lies beside it' not in ' '.join(out.split())
    for some in (1, 2):
        code, out, err = run(capsys, 'inspect', *files[:some], '--key', 'softmax_fc.weight')
        assert code == 0 and 'if these are parts of one classifier' in ' '.join(out.split())
    code, out, err = run(capsys, 'inspect', files[0], files[0], '--key', 'softmax_fc.weight')
    assert code == 2 and 'no parts' in err
    torch.save({'softmax_fc': {'weight': torch.rand(3, 9)}}, files[0])
    code, out, err = run(capsys, 'inspect', *files[:2], '--key', 'softmax_fc.weight')
    assert code == 2 and 'must fit together' in err


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


def test_tensors_without_values(tmp_path, capsys):
    "Sparse, on meta, quantized, nested, and larger than the file: a sentence each."
    zeros = torch.zeros(1).as_strided((10**6, 10**6), (0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        tensors = [W.to_sparse(), W.to_sparse_csr(), torch.empty(K, D, device='meta'), zeros,
                   torch.quantize_per_tensor(W, .1, 0, torch.qint8), torch.nested.nested_tensor([W[0], W[1][:3]])]
    for t in tensors:
        torch.save({'fc.weight': t, 'name': 'x'}, tmp_path/'file.pth')
        code, out, err = run(capsys, 'inspect', tmp_path/'file.pth')
        assert (code, out, err.count('\n')) == (2, '', 1)
        assert re.search('no values that can be read|quantized|no named tensors', err)
    torch.save({'fc.weight': W, 'big': zeros}, tmp_path/'file.pth')
    assert run(capsys, 'inspect', tmp_path/'file.pth')[0] == 0
    packed = torch.zeros(K, D, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(ValueError, match='which is packed'): as_prototypes(packed, 'fc.weight')


def bombs():
    "Small files that keep a careless reader busy, or make it fill the memory."
    yield 'dicts in dicts, with 2^60 ways through', b'\x80\x04}\x94' + b''.join(
        b'}\x94(\x8c\x01ah%c\x8c\x01bh%cu' % (i, i) for i in range(60)) + b'.'
    yield 'a key whose hash takes 2^60 steps', b'\x80\x04})' + b'2\x86' * 60 + b'K\x01s.'
    yield 'a memo of 4 billion places', b'\x80\x04Nr\xff\xff\xff\xff.'
    yield 'bytes without end', b'\x80\x04\x8e' + b'\xff' * 7 + b'\x7fabc.'
    again = b'c_codecs\nencode\nh\x00Vlatin1\n\x86R' * 4000
    text = b'X' + (99_999).to_bytes(4, 'little') + b'a' * 99_999
    yield 'bytes made 4000 times', b'\x80\x04' + text + b'q\x00(' + again + b'l.'
    yield 'a number without end', b'\x80\x04\x8b\xff\xff\xff\x7fabc.'
    yield 'lists in lists', b'\x80\x04' + b']' * 9000 + b'a' * 8999 + b'.'
    yield 'dicts as deep as the file is long', b'\x80\x04' + b'}\x8c\x01a' * 9000 + b'}' + b's' * 9000 + b'.'
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    yield 'an array that is larger than its file', file.getvalue().replace(b'(3,), ', b'(9999999999999,), ')
    buffer = io.BytesIO()
    torch.save({'9' * 200_000 + 'x.weight': W, '8x': W}, buffer)
    yield 'a name on which a regular expression never ends', buffer.getvalue()
    yield 'a header of 4 GB', (2**32 - 1).to_bytes(8, 'little') + b'{'
    yield 'JSON in JSON', b'{"weight_map":' + b'{"a":' * 9000


@pytest.mark.parametrize('content', [pytest.param(content, id=name) for name, content in bombs()])
def test_small_bombs_do_nothing(tmp_path, content, ends):
    (tmp_path/'file.pth').write_bytes(content)
    def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    before = most()
    with pytest.raises(ValueError, match='file.pth'): read_tensors(tmp_path/'file.pth')
    assert most() - before < 200_000


def test_archives_that_claim_too_much(tmp_path):
    "One member a thousand times over, two of one name, and a storage that is smaller than its tensor."
    torch.save(state(), tmp_path/'a.pth')
    content = (tmp_path/'a.pth').read_bytes()
    with zipfile.ZipFile(tmp_path/'a.pth') as file: infos = file.infolist()
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path/'b.pth', 'w') as file:
        warnings.simplefilter('ignore')
        for info in [*infos, infos[-1]]: file.writestr(info.filename, b'x')
    with pytest.raises(ValueError, match='not whole'): read_tensors(tmp_path/'b.pth')
    large = next(i for i in infos if i.filename.endswith('data.pkl'))
    start = content.find(b'PK\1\2')
    entries = content[start:content.rfind(b'PK\5\6')]
    first = entries[:46 + len(large.filename)]
    (tmp_path/'c.pth').write_bytes(content[:start] + first * 2 + content[start:])
    with pytest.raises(ValueError): read_tensors(tmp_path/'c.pth')


@pytest.mark.parametrize('kind', ['.npz', 'packed.npz', '.npy', '.onnx', '.json', '.pkl', '.pth', '.safetensors'])
def test_every_mutant_is_read_or_refused(tmp_path, kind):
    "No error but ValueError, and that of a tensor that cannot be measured."
    import onnx
    arrays, file = {name: t.numpy() for name, t in state().items()}, io.BytesIO()
    if kind == '.npz': np.savez(file, **arrays)
    elif kind == 'packed.npz': np.savez_compressed(file, **arrays)
    elif kind == '.npy': np.save(file, arrays['fc.weight'])
    elif kind == '.json': file.write(json.dumps({'weight_map': {'fc.weight': 'file'}}).encode())
    elif kind == '.pkl': pickle.dump({'x': state(), 'y': [datetime.date(2020, 1, 1), {1, 2}]}, file, 4)
    elif kind == '.pth': torch.save({'x': state(), 'y': [datetime.date(2020, 1, 1), {1, 2}]}, file)
    elif kind == '.safetensors': file.write(save(state()))
    else: file.write(onnx.helper.make_model(onnx.helper.make_graph([], 'g', [], [], [
        onnx.numpy_helper.from_array(a, name) for name, a in arrays.items()])).SerializeToString())
    rng, whole, read = np.random.default_rng(0), file.getvalue(), 0
    for _ in range(150):
        mutant = bytearray(whole)
        for at in rng.integers(0, len(whole), rng.integers(1, 5)): mutant[at] = rng.integers(256)
        del mutant[rng.integers(len(mutant) + 500):]
        (tmp_path/'x').write_bytes(mutant)
        with suppress(ValueError, FileNotFoundError): read += bool(read_tensors(tmp_path/'x'))  # the index’s part
    assert read < 150


def test_empty_and_missing_files(tmp_path, capsys):
    torch.save({'epoch': 3, 'loss': [1.]}, tmp_path/'empty.pth')
    with pytest.raises(ValueError, match='holds no named tensors'): read_tensors(tmp_path/'empty.pth')
    for name, said in ((tmp_path/'none.pth', 'No such file'), (tmp_path/'none.safetensors', 'No such file'),
                       ('', 'file must not be empty'), ('/dev/null', '/dev/null is damaged: it is empty')):
        code, out, err = run(capsys, 'inspect', name)
        assert (code, out, err.count('\n')) == (2, '', 1) and said in err


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
    (tmp_path/'file.safetensors').write_bytes(b'x')
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


def test_twenty_thousand_classes():
    weight = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    weight[19_999] = 3 * weight[7] + 1e-5 * weight[8]
    weight[513] = weight[512] + .01 * weight[8]
    told = []
    found = inspect_prototypes(weight, pairs=2, progress=lambda done, total: told.append((done, total)))
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
        best = f'{math.degrees(found.bound.radians):.2f}°'
        assert f'are 66.15° apart; 10 prototypes in 3 dimensions cannot all be more than {best} apart.' in found.verdict
        assert f'at most {best} ({found.bound.method})' in str(found)
    else: assert found.verdict == verdict
    assert ' '.join(str(found).split()).endswith(found.verdict)
    assert max(map(len, str(found).splitlines())) <= 80


def test_bad_arguments():
    with pytest.raises(ValueError, match='pairs must be ≥ 1 and'): inspect_prototypes(W, pairs=0)
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
    assert written == {'file': f'{tmp_path}/file.pth', 'tensor': 'model.fc.weight', **found.to_dict()}
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


@pytest.mark.parametrize('names,what', [
    (('checkpoint', 'model.ckpt-7.index', 'model.ckpt-7.meta'), r'TensorFlow.*tensorflow\.train\.load_variable'),
    (('_METADATA', 'manifest.ocdbt'), 'Orbax'), (('latest', 'zero_to_fp32.py'), 'DeepSpeed.*zero_to_fp32'),
    (('Manifest.json',), 'Core ML'),
    (('model.gguf',), 'GGUF'), (('a.txt', 'b.txt'), 'without a file of tensors')])
def test_folders_of_others_are_named(tmp_path, names, what):
    for name in names: (tmp_path/name).write_bytes(b'GGUF')
    with pytest.raises(ValueError, match=what): read_tensors(tmp_path)


def test_a_key_of_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r'fc\.bias must be a matrix \[k, d\], got shape \[5\]'):
        choose_classifier({'fc.weight': W, 'fc.bias': W[:, 0]}, 'fc.bias')


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
                                               (7, 4, 'orthogonal axes', False),
                                               (8, 3, 'search, seed 1, starts 11', True)])
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
