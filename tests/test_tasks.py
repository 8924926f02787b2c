"Tables of other tasks: re-identification, verification, free features. Dry runs, real runs, printed numbers."
import json
import math
import pickle
import subprocess
import sys
import unicodedata
import warnings
from dataclasses import asdict, replace

import pytest
import torch

from largest_margins.cli import main
from largest_margins.codes import best_packing
from largest_margins.margins import class_margin, min_sample_margin
from largest_margins.reid import market_folder
from largest_margins.study.free_features import FreeFeatures
from largest_margins.study.glyphs import write_glyph_market, write_glyph_pairs
from largest_margins.study.identities import (
    IdentityConfiguration,
    ReIDConfiguration,
    pairs_task,
    reid_folder,
    train_identities,
)
from largest_margins.study.recipes import TABLES, choose, printed, printed_numbers
from largest_margins.study.tables import make_table, plan, read_record, read_records, summarise
from largest_margins.training.measures import MEASURES
from largest_margins.verification import read_pairs

SMALL = dict(body='conv3-narrow', embedding=16, height=28, width=28, channels=1, shift=0, flip=False, batch_size=16,
             schedule='one-cycle', learning_rate=.01)


def run(*argv):
    with pytest.raises(SystemExit) as end: main([str(a) for a in argv])
    return end.value.code


@pytest.fixture(scope='module')
def market(tmp_path_factory):
    return write_glyph_market(tmp_path_factory.mktemp('m')/'market', identities=24, distractors=5, junk=6)


@pytest.fixture(scope='module')
def faces(tmp_path_factory):
    "A folder for verification: train with an image folder of half of the glyphs, test with pairs of the others."
    root = tmp_path_factory.mktemp('faces')
    write_glyph_pairs(root/'test', identities=40, folds=10, pairs=3)
    write_glyph_pairs(root/'train', seed=1, identities=40, folds=10, pairs=3)
    for name in {p.name for p in (root/'test').iterdir()} | {'pairs.txt', 'glyphs.json'}:
        for path in (root/'train').glob(name):
            if path.is_dir():
                for image in path.iterdir(): image.unlink()
                path.rmdir()
            else: path.unlink()
    return root


# The command knows the tables before PyTorch does

def test_the_command_lists_every_table_without_pytorch():
    assert list(printed_numbers()['titles']) == ['1', '2', '3', 'scale', 'verification', 'sphere', 'tails']
    assert set(TABLES) | {'tails'} == set(printed_numbers()['titles'])  # a recipe for each data set
    for name in (*TABLES, 'none'):
        done = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'largest_margins', 'table', name, '--help'],
                              capture_output=True, text=True)
        assert done.returncode == (2 if name == 'none' else 0)
        loaded = {line.split('|')[-1].strip() for line in done.stderr.splitlines()}
        assert 'largest_margins' in loaded and 'torch' not in loaded


@pytest.mark.parametrize('table,wanted', [
    ('3', ['gallery         251    1,860', 'arcface-64', 'NormFace s=10', 'conv3-narrow', '39 runs, 39 to train']),
    ('verification', ['6000 pairs of 250 others', 'lm-softmax-20', '39 runs, 39 to train']),
    ('sphere', ['8 classes in 3 dimensions: best packing 74.86°', 'LM-Softmax s=64 rising', '375 runs, 375 to train']),
    ('scale', ['Step, ratio 100: 674 training images', '48 runs, 48 to train'])])
def test_dry_runs(table, wanted, tmp_path, capsys):
    assert run('table', table, '--seeds', 3, '--dry-run', '--out', tmp_path/'x') == 0
    said = capsys.readouterr().out
    assert not [text for text in wanted if text not in said] and not list(tmp_path.iterdir())


def test_table_3_as_printed_is_all_shown():
    three = TABLES['3']
    cells = [cell for cell in printed_numbers()['cells'] if cell['table'] == '3']
    shown = {(d, row.label): printed(three, name, three.settings[0], row) for row in three.rows(2)
             for name, d in (('glyphs', 'market1501'), ('market1501', 'market1501'), ('dukemtmc', 'dukemtmc'))}
    assert len(cells) == len(shown) == 26 and [row.label for row in three.rows(2)] == [c['row'] for c in cells[::2]]
    for cell in cells:
        assert shown[cell['dataset'], cell['row']] == {k: cell[k] for k in ('mAP', 'rank1', 'rank5')}


def test_columns_are_measured(tmp_path):
    for recipe in TABLES.values(): assert set(recipe.columns) <= set(MEASURES)
    persons = TABLES['3'].configuration('some/folder', TABLES['3'].settings[0], TABLES['3'].rows(2)[0])
    assert (persons.body, persons.size, persons.epochs, persons.schedule) == ('resnet50', (256, 128), 120, 'warm-up')
    assert (persons.learning_rate, persons.weight_decay, persons.embedding) == (3.5e-4, 5e-4, None)


# Real runs, small

@pytest.mark.parametrize('table,given', [
    ('3', dict(rows=['lm-softmax-20', 'ce'], epochs=1)), ('verification', dict(rows=['lm-softmax-20', 'ce'], epochs=1)),
    ('sphere', dict(rows=['normface-20', 'lm-softmax-5']))])
def test_a_table_is_made_and_resumed(table, given, market, faces, tmp_path):
    recipe, heard = TABLES[table], []
    if recipe.dataset: given = given | SMALL | dict(dataset=str(market if table == '3' else faces))
    assert make_table(recipe, out=tmp_path, tell=heard.append, **given)
    settings, written = len(recipe.settings), {p.name: p.read_text() for p in tmp_path.glob('table.*')}
    assert set(written) == {'table.md', 'table.csv', 'table.tex', 'table.html'}
    assert len(written['table.csv'].splitlines()) == 1 + 2 * settings
    for row in choose(recipe.rows(2), given['rows']): assert f'| {row.label} |' in written['table.md']
    if table == '3': assert 'paper, Market-1501 |' in written['table.md'] and '| 82.8 |' in written['table.md']
    gone = sorted(tmp_path.rglob('seed-0.json'))[0]
    before = json.loads(gone.read_text())
    gone.unlink()
    assert make_table(recipe, out=tmp_path, tell=(again := []).append, resume=True, **given)
    assert again[0] == f'{2 * settings - 1} of {2 * settings} runs are there already'
    after = json.loads(gone.read_text())
    assert after['measured'] == before['measured'] and after['asked'] == before['asked']
    assert {p.name: p.read_text() for p in tmp_path.glob('table.*')} == written


@pytest.mark.parametrize('table', TABLES)
def test_runs_travel_to_other_processes(table):
    one = plan(TABLES[table])[0]
    assert pickle.loads(pickle.dumps(one)) == one and type(one.configuration) is TABLES[table].configurations


def test_the_command_says_what_glyphs_are(tmp_path, capsys):
    assert run('table', '3', '--rows', 'lm-softmax-20', '--epochs', 1, '--out', tmp_path) == 0
    said = capsys.readouterr().out
    assert 'a check of the machinery, not a result about people' in said and '| 84.7 |' in said
    assert 'Table 3: person re-identification, glyphs' in said and 'No identity is in training and test' in said


def test_a_diverged_training_is_recorded(market, tmp_path):
    given = dict(dataset=str(market), rows=['lm-softmax-20'], epochs=1, **SMALL | dict(learning_rate=1e30))
    assert make_table(TABLES['3'], out=tmp_path, tell=(heard := []).append, **given)
    kept = json.loads(next(tmp_path.rglob('seed-0.json')).read_text())
    assert kept['diverged'] and set(kept['measured'].values()) == {None}
    assert 'LM-Softmax s=20 (1 of 1 diverged)' in (tmp_path/'table.md').read_text() and 'diverged,' in heard[0]


# What is asked decides

def test_a_record_answers_its_configuration_only(tmp_path):
    one, = plan(TABLES['3'], rows=['ce'], **SMALL)
    asked = json.loads(json.dumps(one.configuration.__dict__))
    for name in ('data', 'despite_withdrawal'): del asked[name]
    rest = dict(diverged=False, measured={}, machine={}, seconds=1., identities=2, queries=1, gallery=1, bound=90.)
    (tmp_path/'a.json').write_text(json.dumps(dict(asked=asked, **rest)))
    c = one.configuration
    assert read_record(tmp_path/'a.json', replace(c, data='elsewhere', despite_withdrawal=True))
    for other in (dict(seed=1), dict(height=32), dict(loss='focal')):
        with pytest.raises(ValueError, match='of another training'):
            read_record(tmp_path/'a.json', replace(c, **other))
    del asked['channels'], asked['weights']  # as if these were newer than the record
    (tmp_path/'a.json').write_text(json.dumps(dict(asked=asked, **rest)))
    assert read_record(tmp_path/'a.json', c) and not read_records([one], tmp_path)


def test_training_is_the_same_for_both_tables(market):
    c = ReIDConfiguration(dataset=str(market), epochs=1, **SMALL)
    with reid_folder(str(market)) as data: training = data.training((28, 28), 1)
    first, second = (train_identities(c, training).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert c.measure()['history'] == c.measure()['history']
    three, pairs = (plan(TABLES[name])[0].configuration for name in ('3', 'verification'))
    assert asdict(three) == asdict(pairs)


def test_market_in_its_own_folder_or_the_one_around(market, tmp_path):
    (tmp_path/'Market-1501-v15.09.15').symlink_to(market, target_is_directory=True)
    for folder in (market, tmp_path):
        with reid_folder('market1501', str(folder)) as data: assert len(data.query) == len(market_folder(market).query)


def test_random_weights_of_resnet50_are_trained(market):
    "Smaller images meet a convolution of PyTorch 2.14 that returns nan in bfloat16: of 4 × 2 pixels, with stride 2."
    c = replace(ReIDConfiguration(dataset=str(market), body='resnet50', channels=3, schedule='warm-up', height=64,
                                  width=32, embedding=None, epochs=1, batch_size=16), learning_rate=3.5e-4)
    found = c.measure()
    assert not found['diverged'] and found['bound'] == pytest.approx(math.degrees(math.acos(-1 / 11)))
    assert 0 < found['measured']['mAP'] <= found['measured']['rank5'] <= 100


# Verification

def test_rates_that_cannot_be_measured_are_left_out(faces, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert make_table(TABLES['verification'], str(faces), tmp_path, rows=['ce'], epochs=1, tell=lambda x: None,
                          **SMALL)
    kept = json.loads(next(tmp_path.rglob('seed-0.json')).read_text())
    assert kept['measured']['tar_at_0.1'] is not None and kept['measured']['tar_at_0.01'] is None
    text = (tmp_path/'table.md').read_text()
    assert 'FAR 0.01 needs 100 impostor pairs or more, there are 30' in text and 'TAR % at FAR 0.1 |' in text
    assert 'TAR % at FAR 0.01' not in text
    assert kept['measured']['fold_accuracy'] == pytest.approx(100 * sum(kept['accuracies']) / 10)


def test_the_pairs_of_glyphs_are_of_letters_not_trained_on(tmp_path):
    task = pairs_task()
    folder = write_glyph_pairs(tmp_path/'pairs')
    names = {name.split('/')[0] for pair in read_pairs(folder/'pairs.txt') for name in pair[:2]}
    with reid_folder() as data: assert data.train.persons.unique().tolist() == [int(c) for c in task.training.classes]
    trained = {chr(int(p.name.split('_')[2])) for p in data.train.paths}
    assert len(trained) == 250 and not names & {unicodedata.name(c).replace(' ', '_') for c in trained}


# The sphere

@pytest.mark.parametrize('kind', ['long-tailed', 'step'])
def test_free_features_find_the_numbers_of_the_theory(kind):
    wanted = {'long-tailed': (28.3, 35.1, 41.7), 'step': (10.3, 12.9, 15.6)}[kind]
    for s, angle in zip((10., 20., 64.), wanted, strict=True):
        found = FreeFeatures(k=10, d=16, scale=s, ratio=100., kind=kind).measure()
        assert found['measured']['class_margin'] == pytest.approx(angle, abs=.05)


def test_what_is_measured_on_the_sphere_by_hand():
    c = FreeFeatures(loss='cosface', scale=10., seed=3)
    found = c.measure()
    W, Z = (torch.tensor(found[name], dtype=torch.float64) for name in ('prototypes', 'features'))
    targets, m = torch.arange(8), found['measured']
    assert m['class_margin'] == pytest.approx(math.degrees(class_margin(W)))
    assert m['gap'] == pytest.approx(math.degrees(best_packing(8, 3).class_margin) - m['class_margin'])
    assert m['min_sample_margin'] == pytest.approx(min_sample_margin(Z @ W.T, targets).item())
    assert m['final_loss'] == pytest.approx(c.weighted_loss()(Z @ W.T, targets).item()) and 0 <= m['gap'] < 2
    assert c.measure()['prototypes'] == found['prototypes'] != replace(c, seed=4).measure()['prototypes']


def test_a_small_gap_is_best_and_losses_are_not_compared():
    recipe, runs = TABLES['sphere'], plan(TABLES['sphere'], rows=['normface-20', 'lm-softmax-20'])[:2]
    finished = [(r, dict(diverged=False, machine={}, measured=dict(
        class_margin=70. + i, gap=4. - i, min_sample_margin=.7, final_loss=1. - i))) for i, r in enumerate(runs)]
    (_, heads, rows), = summarise(recipe, finished).parts
    bold = {head: [row[j][1] for row in rows] for j, head in enumerate(heads)}
    assert bold['gap to the best packing°'] == bold['class margin°'] == [False, True]
    assert bold['final loss'] == [False, False] and bold['min sample margin'] == [True, True]


# Mistakes

@pytest.mark.parametrize('argv,message', [
    (['3', '--dataset', 'nothing'], "'nothing' is neither a directory nor one of glyphs, market1501, dukemtmc"),
    (['3', '--dataset', 'market1501'], 'market1501 needs data'), (['3', '--dataset', '.'], 'bounding_box_train is not'),
    (['3', '--dataset', 'dukemtmc', '--data', '.'], 'withdrawn by its authors'),
    (['3', '--dataset', 'dukemtmc', '--data', '.', '--despite-withdrawal'], 'bounding_box_train is not a directory'),
    (['3', '--weights', 'w.pth'], "weights has no meaning for the body 'conv3-narrow'"),
    (['3', '--epochs', '0'], 'epochs must be'), (['3', '--rows', 'focal'], "got 'focal'"),
    (['verification', '--dataset', 'nothing'], "'nothing' is neither a directory nor glyphs"),
    (['verification', '--dataset', '.'], 'pairs.txt'), (['sphere', '--epochs', '3'], 'epochs has no meaning'),
    (['sphere', '--data', '.'], 'data has no meaning'), (['sphere', '--seeds', '0'], 'seeds must be')])
def test_mistakes_are_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run('table', *argv) == 2
    err = capsys.readouterr().err
    assert message in err and 'Traceback' not in err and not list(tmp_path.iterdir())
    assert len(err.splitlines()) == 1


def test_broken_folders_are_refused_before_training(market, faces, tmp_path, capsys):
    (tmp_path/'bounding_box_train').mkdir()
    for name in ('query', 'bounding_box_test'): (tmp_path/name).symlink_to(market/name)
    (tmp_path/'bounding_box_train'/'who.png').write_bytes(b'')
    assert run('table', '3', '--dataset', tmp_path, '--out', tmp_path/'out') == 2
    assert "1 files are not named like 0002_c1s1_000451_03.jpg: who.png" in capsys.readouterr().err
    (tmp_path/'test').symlink_to(faces/'test')
    (tmp_path/'train').symlink_to(faces/'test')
    assert run('table', 'verification', '--dataset', tmp_path, '--out', tmp_path/'out') == 2
    err = capsys.readouterr().err
    assert 'train and test must not share identities, 20 are in both' in err and len(err.splitlines()) == 1
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('given,message', [
    (dict(k=1), 'k must be ≥ 2'), (dict(d=2.), 'd must be an int'), (dict(loss='ce'), 'scale has no meaning'),
    (dict(scale=-1.), 'scale'), (dict(ratio=.5), 'ratio'),
    (dict(kind='flat'), 'kind must be one of long-tailed, step')])
def test_bad_free_features(given, message):
    with pytest.raises((ValueError, TypeError), match=message): FreeFeatures(**given)


@pytest.mark.parametrize('given,message', [
    (dict(height=4), 'height must be ≥ 8'), (dict(channels=2), 'channels must be 1'),
    (dict(schedule='never'), 'schedule must be one of'), (dict(body='resnet99'), 'body must be one'),
    (dict(body='resnet50'), 'channels must be 3 for resnet50'), (dict(weights='x'), 'weights has no meaning'),
    (dict(loss='nothing'), 'loss must be one of'), (dict(scale=-1.), 'scale'), (dict(flip=True, epochs=0), 'epochs')])
def test_bad_identity_configurations(given, message):
    with pytest.raises(ValueError, match=message): IdentityConfiguration(**given)
