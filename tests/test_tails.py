"The study with few-shot tails: its term, its noise, its records, and what a plan without them says."
import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback

import largest_margins
from largest_margins.cli import main
from largest_margins.data import load
from largest_margins.study import tails
from largest_margins.study.experiments import Configuration, noisy
from largest_margins.study.free_features import FreeFeatures
from largest_margins.study.tables import plan, read_records, run_record, summarise
from largest_margins.study.tails import TailConfiguration, adjusted_margins, study, train

RESULTS = Path(__file__).parent.parent/'results'


def test_adjusted_margins_are_the_worst_adjusted_lead():
    g = torch.Generator().manual_seed(0)
    cosines, targets = 2 * torch.rand(20, 5, generator=g) - 1, torch.randint(5, (20,), generator=g)
    prior = torch.tensor([1., 2., 5., 50., 300.])
    for row, (c, y) in enumerate(zip(cosines, targets, strict=True)):
        leads = [c[y] - c[j] - (prior[j].log() - prior[y].log()) / 7 for j in range(5) if j != y]
        assert adjusted_margins(cosines, targets, prior, 7.)[row].item() == pytest.approx(min(leads).item(), abs=1e-6)


def test_noise_replaces_a_share_of_the_training_labels_only():
    data = load('digits')
    found = noisy(data, .3, seed=1)
    moved = found.train_targets != data.train_targets
    assert moved.float().mean().item() == pytest.approx(.3, abs=1e-3)
    assert torch.equal(found.test_targets, data.test_targets)
    assert torch.equal(noisy(data, .3, seed=1).train_targets, found.train_targets)
    for field in ('noise', 'adjusted_sample_margin'):
        with pytest.raises(ValueError, match=field): TailConfiguration(**{field: -.1})


def test_the_adjusted_term_trains_and_is_recorded():
    short = dict(loss='normface', scale=10., logit_adjustment=1., epochs=1, ratio=20., body='conv2-narrow', embedding=8)
    without, added = (TailConfiguration(**short, adjusted_sample_margin=w).measure() for w in (0., 5.))
    assert without['prototypes'] != added['prototypes'] and added['counts'][0] == 134
    assert {'ece', 'fitted_nll', 'auroc_cosine', 'fpr95_margin', 'nc1', 'min_train_margin', 'few'} <= set(
        added['measured'])
    assert 'best_accuracy' not in added['measured']


SHORT = dict(loss='cosface', scale=10., logit_adjustment=1., body='conv2-narrow', embedding=12, ratio=20.)


def test_a_learned_scale_has_the_gradient_of_the_loss_and_moves():
    g = torch.Generator().manual_seed(0)
    z, W = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (9, 4))
    y, counts = torch.randint(4, (9,), generator=g), [9, 5, 2, 1]
    def loss_at(scale, course='plain'):
        return TailConfiguration(loss='normface', scale=scale, logit_adjustment=1., course=course).loss_func(counts)
    loss, h = loss_at(8., 'scale-learned').double(), 1e-3
    value = loss.linear(z, W, y)
    value.backward()
    assert value.item() == pytest.approx(loss_at(8.).linear(z, W, y).item(), rel=1e-6)
    up, down = (loss_at(8. * math.exp(by)).linear(z, W, y).item() for by in (h, -h))
    assert loss.log_scale.grad.item() == pytest.approx((up - down) / (2 * h), rel=1e-5)
    c = TailConfiguration(**SHORT | dict(loss='normface', course='scale-learned', epochs=2))
    assert c.optimum([5] * 4, 9) is None and replace(c, course='plain').optimum([5] * 4, 9) is not None
    assert c.measure()['measured']['scale'] != 10. == replace(c, course='plain').measure()['measured']['scale']


def test_a_margin_rises_from_0_over_half_of_the_epochs(monkeypatch):
    seen = []
    class Watch(Callback):
        run_valid = False
        def after_batch(self): seen.append((self.pct_train, self.learn.loss_func.margin))
    def watched(*args, cbs, **options): return train(*args, cbs=[*cbs, Watch()], **options)
    monkeypatch.setattr(tails, 'train', watched)
    TailConfiguration(**SHORT, margin=.4, epochs=4, course='margin-rising').measure()
    margins = [margin for _, margin in seen]
    assert margins == sorted(margins) and margins[0] == 0 and margins[-1] == .4
    half = len(margins) // 2
    assert 0 < margins[1] < margins[half - 1] < .4 and set(margins[half:]) == {.4}


def test_a_margin_loss_begins_where_ce_ended(monkeypatch):
    fits = []
    class Watch(Callback):
        order = 1  # after the weights were handed over
        def keep(self):
            return {k: v.clone() for k, v in self.learn.model.state_dict().items() if 'loss' not in k}
        def before_fit(self): fits.append([self.learn.n_epoch, type(self.learn.loss_func).__name__, self.keep()])
        def after_fit(self): fits[-1].append(self.keep())
    def watched(*args, cbs, **options): return train(*args, cbs=[*cbs, Watch()], **options)
    monkeypatch.setattr(tails, 'train', watched)
    found = TailConfiguration(**SHORT, epochs=5, course='ce-first').measure()
    (n, ce, _, ended), (m, cosface, began, _) = fits
    assert (n, ce, m, cosface) == (2, 'FocalLoss', 3, 'CosFaceLoss') and len(found['history']) == 3
    assert began.keys() == ended.keys() and all(torch.equal(began[name], ended[name]) for name in began)


def test_a_course_must_have_a_meaning():
    for loss, course in (('ce', 'margin-rising'), ('normface', 'margin-rising'), ('cosface', 'scale-learned')):
        with pytest.raises(ValueError, match='course has no meaning'): TailConfiguration(loss=loss, course=course)
    assert TailConfiguration(course='ce-first').label == 'CosFace s=20 m=0.1 CE first'
    assert len(study('digits').more(10)) == 11


@pytest.mark.parametrize('dataset, k, settings', [
    ('digits', 10, 3), ('letters', 26, 1), ('shuttle', 7, 1), ('mnist_10k', 10, 1), ('fashion_small', 10, 1)])
def test_stored_runs_are_the_whole_study_from_clean_clones(dataset, k, settings):
    finished = read_records(plan(study(dataset), None, seeds=5, num_classes=k), RESULTS/dataset/'tails')
    assert len(finished) == len([*(RESULTS/dataset/'tails').rglob('seed-*.json')]) == 13 * 5 * settings
    assert {found['git']['commit'][:7] for _, found in finished} <= {'b090266', 'e0c60e0'}
    rows = [row.name for row in study(dataset).more(k)]
    changed = read_records(plan(study(dataset), None, rows, seeds=5, num_classes=k), RESULTS/dataset/'changed')
    assert len(changed) == len([*(RESULTS/dataset/'changed').rglob('seed-*')]) == 11 * 5 * settings
    assert {found['git']['commit'][:7] for _, found in changed} <= {'fd79ed5', '92a3dc4'}
    for _, found in finished + changed: assert not (found['git']['changed'] or found['diverged'])


LONGER = [('digits', 'natural', 80), *((name, 'long-tailed-100', epochs) for name, epochs in dict(
    digits=160, letters=160, mnist_10k=48, fashion_small=48).items()), ('shuttle', 'natural', 32)]


def test_the_longer_trainings_are_stored_from_clean_clones():
    rows = ['ce', 'ce+prior', 'normface-*0+prior', 'normface-5+prior', 'cosface-10+prior', 'lm-*']
    longer = []
    for name, setting, epochs in LONGER:
        recipe, classes = study(name), dict(letters=26, shuttle=7).get(name, 10)
        recipe = replace(recipe, settings=[s for s in recipe.settings if s.name == setting])
        longer += read_records(plan(recipe, None, rows, 5, classes, epochs=epochs), RESULTS/name/'converged')
    assert len(longer) == len([*RESULTS.glob('*/converged/**/seed-*')]) == 8 * 5 * len(LONGER)
    assert {(found['git']['commit'][:7], found['git']['changed']) for _, found in longer} == {
        ('43f254f', False), ('fd79ed5', False), ('d8abc90', False)}


@pytest.mark.parametrize('kind, folder, every', [
    (Configuration, 'digits/table1', 26), (Configuration, 'fashion_mnist/table1', 40),
    (Configuration, 'fashion_mnist/table2', 60), (FreeFeatures, 'sphere', 60),
    *((TailConfiguration, f'{name}/tails', 20) for name in ('digits', 'letters', 'shuttle'))])
def test_stored_gaps_to_the_optimum_are_what_the_configuration_says(kind, folder, every):
    "Those of runs that are older than the column were added to their records later."
    for path in sorted((RESULTS/folder).rglob('seed-*.json'))[::every]:
        record = json.loads(path.read_text())
        c, found = kind(**record['asked']), record['measured']
        best = c.optimum(record.get('counts', getattr(c, 'counts', None)), getattr(c, 'd', None) or c.embedding)
        if best is None: assert found['less_optimum'] is None
        else: assert found['less_optimum'] == pytest.approx(
                found['class_margin'] - best, abs=2e-3)  # another kind of processor ends up to .0007° away


def test_the_table_has_the_gap_to_the_optimum_where_the_loss_has_one():
    recipe = study('digits')
    rows = ['ce', 'normface-5+prior', 'normface-5-fixed+prior']
    finished = read_records(plan(recipe, None, rows=rows, seeds=2), RESULTS/'digits'/'tails')
    optima = {'As it is': 96.37, 'Long-tailed, ratio 100': 78.04}  # degrees; the first is the simplex's but for 0.01°
    parts = {title: (heads, body) for title, heads, body in summarise(recipe, finished).parts}
    for title, optimum in optima.items():
        heads, body = parts[title]
        gaps = [row[heads.index('less the optimum°')][0] for row in body]
        assert gaps[0] == gaps[2] == '—'
        angle = body[1][heads.index('class margin°')][0]
        assert float(angle.split()[0]) - float(gaps[1].split()[0]) == pytest.approx(optimum, abs=.02)


def test_a_record_says_whether_the_package_differs_from_its_commit(tmp_path, monkeypatch):
    module = tmp_path/'package'/'__init__.py'
    module.parent.mkdir()
    module.touch()
    def git(*args):
        subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=x', '-c', 'user.email=x', *args], check=True)
    def changed(): return run_record(TailConfiguration(), {})['git']['changed']
    git('init', '-q')
    git('add', '.')
    git('commit', '-qm', 'x')
    monkeypatch.setattr(largest_margins, '__file__', str(module))
    assert not changed()
    (tmp_path/'results').mkdir()
    (tmp_path/'results'/'seed-0.json').touch()
    assert not changed()  # what the study itself writes
    module.write_text('x = 1')
    assert changed()


def test_the_commands(tmp_path, capsys):
    def run(*argv):
        with pytest.raises(SystemExit) as done: main(['table', *map(str, argv)])
        return done.value.code, capsys.readouterr()
    code, said = run('tails', '--dataset', 'letters', '--data', tmp_path, '--out', tmp_path/'x', '--dry-run')
    assert code == 0 and '13 runs, 13 to train' in said.out
    code, said = run('2', '--predicted', '--rows', 'NormFace')
    assert code == 0 and '62.72 | 62.67' in said.out and 'CosFace' not in said.out
    assert '| sample margin: mean, smallest |' in said.out
    code, said = run('2', '--predicted', '--rows', 'NormFace', '--scale', 20)
    assert code == 0 and 'below: scale 20' in said.out and '62.72 | 84.71' in said.out
    code, said = run('2', '--predicted', '--dataset', 'cifar100', '--rows', 'NormFace')
    assert code == 0 and 'fits CIFAR-10: 4.98' in said.out and '16.11 | 51.8' in said.out
    for argv, message in ((('1', '--predicted'), 'table 2'), (('2', '--predicted', '--dataset', 'digits'), 'cifar100'),
                          (('2', '--predicted', '--epochs', 9), 'epochs has no meaning with --predicted'),
                          (('2', '--predicted', '--rows', 'normface'), 'rows must be as printed')):
        code, said = run(*argv)
        assert code == 2 and message in said.err
