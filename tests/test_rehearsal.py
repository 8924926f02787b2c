"Tables 1 and 2 from the command to the printed table, on a few images in CIFAR's own format."
import pickle

import numpy as np
import pytest
from torchvision import datasets

from largest_margins.cli import main

pytestmark = pytest.mark.filterwarnings('ignore:.*is not the published file')


@pytest.fixture(scope='module', params=[(datasets.CIFAR10, 10), (datasets.CIFAR100, 100)], ids=['cifar10', 'cifar100'])
def folder(request, tmp_path_factory):
    "A hundred or ten training images of each class, a few for test; bright where the class says."
    (kind, k), rng = request.param, np.random.default_rng(0)
    root, labels_of = tmp_path_factory.mktemp('data'), b'labels' if k == 10 else b'fine_labels'
    (root/kind.base_folder).mkdir()

    def batch(n):
        labels = [i % k for i in range(n)]
        images = rng.integers(0, 100, (n, 3, 32, 32)).astype(np.uint8)
        for image, c in zip(images, labels, strict=True): image[:, 3 * (c % 10):3 * (c % 10) + 3] += 150
        return {b'data': images.reshape(n, 3072), labels_of: labels}
    parts = [(name, batch(1000 // len(kind.train_list))) for name, _ in kind.train_list]
    parts += [(name, batch(5 * k)) for name, _ in kind.test_list]
    parts.append((kind.meta['filename'], {kind.meta['key'].encode(): [f'class {i}'.encode() for i in range(k)]}))
    for name, content in parts: (root/kind.base_folder/name).write_bytes(pickle.dumps(content, protocol=2))
    return kind.__name__.lower(), root


SMALL = ['--body', 'conv2-narrow', '--epochs', '1', '--batch-size', '64']  # the table's ResNets take hours
TABLES = {'cifar10': [('1', ['ce', 'normface-20'], 2), ('1', ['printed-arcface-10'], 1), ('2', ['normface+prior'], 4),
                      ('2', ['printed-normface'], 4)],
          'cifar100': [('1', ['printed-normface-20+rsm'], 1), ('2', ['ce', '--settings', 'long-tailed-10'], 1)]}


def test_the_tables_of_the_paper_end_to_end(folder, tmp_path, capsys):
    dataset, data = folder
    for i, (table, rows, runs) in enumerate(TABLES[dataset]):
        out = tmp_path/str(i)
        command = ['table', table, '--dataset', dataset, '--data', str(data), '--out', str(out), *SMALL]
        command += ['--rows', *rows]
        with pytest.raises(SystemExit) as done: main([*command, '--dry-run'])
        said = capsys.readouterr().out
        assert done.value.code == 0 and f'{runs} to train' in said and 'one epoch of' in said
        with pytest.raises(SystemExit) as done: main(command)
        assert done.value.code == 0 and len([*out.rglob('seed-0.json')]) == runs
        assert f'paper, {dataset.upper().replace("CIFAR", "CIFAR-")}' in (out/'table.md').read_text()
        capsys.readouterr()
        with pytest.raises(SystemExit) as done: main([*command, '--resume'])
        assert done.value.code == 0 and f'{runs} of {runs} runs are there already' in capsys.readouterr().out


def test_strict_refuses_other_files(folder, tmp_path, capsys):
    dataset, data = folder
    command = ['table', '1', '--dataset', dataset, '--data', str(data), '--rows', 'ce', '--out', str(tmp_path/'x')]
    with pytest.raises(SystemExit) as done: main([*command, '--strict'])
    assert done.value.code == 2 and 'is not the published file' in capsys.readouterr().err
