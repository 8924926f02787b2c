"Tables 1 and 2 from the command to the printed table, on a few images in CIFAR's own format."
import pickle

import numpy as np
import pytest
from torchvision import datasets

from largest_margins.cli import main

pytestmark = pytest.mark.filterwarnings('ignore:.*is not the published file')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A hundred training and five test images of each class; bright where the class says."
    root, kind, rng = tmp_path_factory.mktemp('data'), datasets.CIFAR10, np.random.default_rng(0)
    (root/kind.base_folder).mkdir()

    def batch(n):
        labels = [i % 10 for i in range(n)]
        images = rng.integers(0, 100, (n, 3, 32, 32)).astype(np.uint8)
        for image, c in zip(images, labels, strict=True): image[:, 3 * c:3 * c + 3] += 150
        return {b'data': images.reshape(n, 3072), b'labels': labels}
    parts = [(name, batch(200)) for name, _ in kind.train_list] + [(name, batch(50)) for name, _ in kind.test_list]
    parts.append((kind.meta['filename'], {b'label_names': [f'class {i}'.encode() for i in range(10)]}))
    for name, content in parts: (root/kind.base_folder/name).write_bytes(pickle.dumps(content, protocol=2))
    return root


@pytest.mark.parametrize('table, rows, runs', [('1', ['ce', 'normface-20'], 2), ('2', ['normface+prior'], 4),
                                               ('2', ['printed-normface'], 4)])
def test_a_table_of_the_paper_end_to_end(table, rows, runs, folder, tmp_path, capsys, monkeypatch):
    from largest_margins.study import recipes
    small = dict(body='conv2-narrow', embedding=16, epochs=1, batch_size=64, learning_rate=1e-2)
    monkeypatch.setitem(recipes.TABLES['1'].training, 'cifar10', small)  # the table's ResNets take hours
    monkeypatch.setitem(recipes.TABLES['2'].training, 'cifar10', small)
    monkeypatch.setitem(recipes.TABLES['2'].paper, 'cifar10', dict(small, neck='none'))
    command = ['table', table, '--dataset', 'cifar10', '--data', str(folder), '--out', str(tmp_path/'out'), '--rows',
               *rows]
    with pytest.raises(SystemExit) as done: main([*command, '--dry-run'])
    assert done.value.code == 0 and f'{runs} to train' in capsys.readouterr().out
    with pytest.raises(SystemExit) as done: main(command)
    assert done.value.code == 0 and len([*(tmp_path/'out').rglob('seed-0.json')]) == runs
    assert 'paper, CIFAR-10' in (tmp_path/'out'/'table.md').read_text()
    with pytest.raises(SystemExit) as done: main([*command, '--resume'])
    assert done.value.code == 0 and f'{runs} of {runs} runs are there already' in capsys.readouterr().out


def test_strict_refuses_other_files(folder, tmp_path, capsys):
    command = ['table', '1', '--dataset', 'cifar10', '--data', str(folder), '--rows', 'ce', '--out', str(tmp_path/'x')]
    with pytest.raises(SystemExit) as done: main([*command, '--strict'])
    assert done.value.code == 2 and 'is not the published file' in capsys.readouterr().err
