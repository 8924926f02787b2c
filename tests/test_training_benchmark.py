"The benchmark of the training loop runs, on a few images, and stores what it measured."
import json
from pathlib import Path

import pytest
from processes import interpret, run_alone

benchmark = Path(__file__).parent.parent/'benchmarks'/'training.py'


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    out = tmp_path_factory.mktemp('out')/'few.json'
    status, printed = run_alone(interpret, benchmark, '--dataset', 'mnist_5k', '--images', '256', '--rounds', '1',
                                '--recipes', 'quick', '--epochs', '1', '--seeds', '1', '--out', out)
    assert status == 0, printed
    assert [path.name for path in out.parent.iterdir()] == ['few.json']
    return json.loads(out.read_text())


def test_every_row_is_measured_against_the_bare_loop(stored):
    assert stored['machine'] and len(stored['rows']) == 7
    assert stored['rows'][0]['over bare'] == 1
    assert all(row['microseconds'] > 0 and row['over bare'] > 0 for row in stored['rows'])


def test_a_recipe_is_trained(stored):
    row, = stored['recipes']
    assert row['recipe'] == 'quick' and row['seed'] == 0 and row['accuracy'] > 50 and row['seconds'] > 0


def test_what_is_stored_has_the_same_form(stored):
    kept = json.loads((benchmark.parent/'results'/'training.json').read_text())
    assert {row['row'] for row in kept['rows']} == {row['row'] for row in stored['rows']}
    assert set(kept['recipes'][0]) == set(stored['recipes'][0])
