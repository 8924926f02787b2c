"Glyphs: who is an identity, the two folders, that the same seed writes the same files, and what is never overwritten."
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from largest_margins.reid import parse_market_name
from largest_margins.study.glyphs import (
    FACES,
    draw_glyphs,
    glyph_characters,
    glyph_name,
    glyph_split,
    write_glyph_market,
    write_glyph_pairs,
)

SMALL = dict(identities=24, distractors=5, junk=9)


def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def market(tmp_path_factory): return write_glyph_market(tmp_path_factory.mktemp('market')/'glyphs', **SMALL)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    return write_glyph_pairs(tmp_path_factory.mktemp('pairs')/'glyphs', identities=60, folds=5, pairs=20)


# Characters

@pytest.mark.parametrize('categories', ['LN', 'SP'])
def test_no_two_characters_are_drawn_alike_in_any_face(categories):
    characters = glyph_characters(categories)
    assert len(characters) == len(set(characters)) > (499 if categories == 'LN' else 99)
    for face in FACES:
        pictures = {picture.tobytes() for picture in draw_glyphs(characters, face)}
        assert len(pictures) == len(characters) and bytes(28 * 28) not in pictures


def test_a_character_with_a_double_is_no_identity():
    for double in ('AΑА', 'oοо', 'cс'):
        drawn = draw_glyphs(double, FACES[0])
        assert (drawn == drawn[0]).all() and not set(double) & set(glyph_characters())


def test_a_picture_is_in_the_middle_and_of_the_asked_size():
    for size in (28, 41):
        picture, = draw_glyphs('d', FACES[2], size)
        rows, columns = np.flatnonzero(picture.any(1)), np.flatnonzero(picture.any(0))
        assert picture.shape == (size, size) and picture.dtype == np.uint8
        assert abs(rows[0] + rows[-1] - size + 1) <= 2 and abs(columns[0] + columns[-1] - size + 1) <= 2
    drawn = draw_glyphs(glyph_characters(), FACES[1])
    assert not drawn[:, [0, -1]].any(), 'a glyph is cut off above or below'


def test_the_split_is_a_draw_of_its_own():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    train, test = glyph_split(5, 30)
    assert np.array_equal(np.random.get_state()[1], before), 'global generator touched'  # noqa: NPY002
    assert (train, test) == glyph_split(5, 30) != glyph_split(6, 30)
    assert len(set(train)) == len(set(test)) == 15 and not set(train) & set(test)


@pytest.mark.parametrize('call,message', [
    (lambda: draw_glyphs('a', 'Arial'), 'face must be one of'), (lambda: draw_glyphs('a', FACES[0], 4), 'size'),
    (lambda: glyph_characters(''), 'categories'), (lambda: glyph_split(0, 3), 'identities must be even'),
    (lambda: glyph_split(0, 0), 'identities'), (lambda: glyph_split(0, 10**4), 'identities'),
    (lambda: write_glyph_market('new', identities=8, distractors=-1), 'distractors'),
    (lambda: write_glyph_market('new', identities=8, junk=25), 'junk must be ≥ 0 and ≤ 24'),
    (lambda: write_glyph_pairs('new', identities=8, folds=3), 'folds must be ≥ 2 and ≤ 2'),
    (lambda: write_glyph_pairs('new', identities=8, folds=2, pairs=31), 'pairs must be ≥ 1 and ≤ 30')])
def test_bad_arguments_write_nothing(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message): call()
    assert not list(tmp_path.iterdir())


# The folder in the form of Market-1501

def found(folder): return [(*parse_market_name(p), p) for p in sorted(folder.iterdir())]


def test_the_splits_and_their_identities(market):
    train, test = glyph_split(0, 24)
    number = {c: i for i, c in enumerate(glyph_characters(), 1)}
    assert {(p, c) for p, c, _ in found(market/'bounding_box_train')} \
        == {(number[g], c) for g in train for c in range(1, 7)}
    gallery = found(market/'bounding_box_test')
    assert {(p, c) for p, c, _ in gallery if p > 0} == {(number[g], c) for g in test for c in range(1, 7)}
    assert sorted(c for p, c, _ in gallery if p == 0) == sorted([*range(1, 7)] * 5)
    assert sum(p == -1 for p, _, _ in gallery) == 9 and len(gallery) == 12 * 6 + 30 + 9
    assert sorted(p for p, _, _ in found(market/'query')) == sorted(number[g] for g in test)


def test_names_say_what_is_on_the_picture(market):
    for person, camera, path in found(market/'bounding_box_train'):
        character = chr(int(path.stem.split('_')[2]))
        assert glyph_characters()[person - 1] == character
        assert np.array_equal(np.asarray(Image.open(path)), draw_glyphs(character, FACES[camera - 1])[0])


def test_the_gallery_shows_the_query_one_pixel_aside_in_its_own_camera(market):
    gallery = {(p, c): np.asarray(Image.open(path)) for p, c, path in found(market/'bounding_box_test')}
    for person, camera, path in found(market/'query'):
        asked = np.asarray(Image.open(path))
        assert np.array_equal(gallery[person, camera], np.roll(asked, 1, 1)) and asked.any()


def test_distractors_are_no_letters_and_junk_is_a_corner(market):
    for person, camera, path in found(market/'bounding_box_test'):
        character, picture = chr(int(path.stem.split('_')[2])), np.asarray(Image.open(path))
        if person == 0: assert character in glyph_characters('SP') and character not in glyph_characters()
        if person == -1:
            whole = draw_glyphs(character, FACES[camera - 1])[0]
            corners = [whole[i:i + 14, j:j + 14] for i in (0, 14) for j in (0, 14)]
            assert any(np.array_equal(picture[::2, ::2], corner) for corner in corners)


# Pairs in the form of LFW

def read(folder):
    lines = [line.split('\t') for line in (folder/'pairs.txt').read_text().splitlines()]
    folds, n = map(int, lines[0])
    return folds, n, [lines[1 + 2 * n * i:1 + 2 * n * (i + 1)] for i in range(folds)], len(lines)


def test_pairs_are_listed_as_in_lfw(pairs):
    folds, n, parts, lines = read(pairs)
    assert (folds, n, lines) == (5, 20, 1 + 5 * 40)
    for part in parts:
        assert [len(line) for line in part] == [3] * n + [4] * n
        for _, first, second in part[:n]: assert first != second
        for one, first, other, second in part[n:]: assert one != other and first != second
        assert len({tuple(line) for line in part}) == 2 * n, 'a pair comes twice'
        for line in part:
            shown = [(line[0], line[1]), (line[-2] if len(line) == 4 else line[0], line[-1])]
            for name, number in shown: assert (pairs/name/f'{name}_{int(number):04d}.png').is_file()


def test_folds_share_no_identity_and_no_identity_was_trained_on(pairs):
    _, _, parts, _ = read(pairs)
    seen = [{field for line in part for field in line if not field.isdigit()} for part in parts]
    assert all(not a & b for a, b in combinations(seen, 2))
    train, test = glyph_split(0, 60)
    assert set.union(*seen) <= {glyph_name(c) for c in test} and not set.union(*seen) & {glyph_name(c) for c in train}
    pictures = list(pairs.glob('*/*.png'))
    assert len(pictures) == 30 * 6
    character, = (c for c in test if glyph_name(c) == pictures[0].parent.name)
    face = FACES[int(pictures[0].stem[-4:]) - 1]
    assert np.array_equal(np.asarray(Image.open(pictures[0])), draw_glyphs(character, face)[0])


def test_every_pair_of_one_character_when_all_are_asked_for(tmp_path):
    folder = write_glyph_pairs(tmp_path/'all', identities=8, folds=2, pairs=30)
    _, n, parts, _ = read(folder)
    for part in parts: assert len({tuple(line) for line in part[:n]}) == 2 * 15


# Files

@pytest.mark.parametrize('write,options', [
    (write_glyph_market, SMALL), (write_glyph_pairs, dict(identities=24, folds=2, pairs=4))])
def test_the_same_seed_writes_the_same_bytes(write, options, tmp_path):
    first, again, other = (files(write(tmp_path/name, seed=seed, **options))
                           for name, seed in (('a', 0), ('b', 0), ('c', 1)))
    assert first == again and first.keys() != other.keys()


def test_what_this_module_wrote_is_replaced_and_nothing_else(tmp_path):
    folder = write_glyph_market(tmp_path/'glyphs', **SMALL)
    assert json.loads((folder/'glyphs.json').read_text())['identities'] == 24
    write_glyph_market(folder, identities=8, distractors=0, junk=0)
    assert len(list((folder/'query').iterdir())) == 4 and len(list((folder/'bounding_box_test').iterdir())) == 24
    (folder/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='holds something else'): write_glyph_market(folder, **SMALL)
    assert (folder/'notes.txt').read_text() == 'mine' and [p.name for p in tmp_path.iterdir()] == ['glyphs']


@pytest.mark.parametrize('content', [
    '{"made_by": "largest_margins.study.glyphs", "entries": []}', '{"made_by": "largest_margins.study.glyphs"}',
    'no json', '[]'])
def test_a_note_alone_does_not_make_a_folder_ours(tmp_path, content):
    (tmp_path/'glyphs.json').write_text(content)
    (tmp_path/'photo.png').write_bytes(b'mine')
    for write in (write_glyph_market, write_glyph_pairs):
        with pytest.raises(FileExistsError): write(tmp_path)
    assert (tmp_path/'photo.png').read_bytes() == b'mine'
    with pytest.raises(FileExistsError): write_glyph_market(tmp_path/'photo.png')


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    folder = write_glyph_market(tmp_path/'glyphs', **SMALL)
    before = files(folder)
    def stop(picture, path): raise KeyboardInterrupt
    monkeypatch.setattr(Image.Image, 'save', stop)
    for target in (folder, tmp_path/'new'):
        with pytest.raises(KeyboardInterrupt): write_glyph_market(target, seed=1, **SMALL)
    assert files(folder) == before and [p.name for p in tmp_path.iterdir()] == ['glyphs']


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path/'empty').mkdir()
    assert write_glyph_pairs(tmp_path/'empty', identities=8, folds=2, pairs=3) == tmp_path/'empty'
    assert Path(write_glyph_pairs(str(tmp_path/'a'/'b'), identities=8, folds=2, pairs=3), 'pairs.txt').is_file()
