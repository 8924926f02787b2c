"What the pictures show, read back from the artists."
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.text import Text
from torch.nn import functional as F

from largest_margins.codes import simplex
from largest_margins.losses import (
    ArcFaceLoss,
    CosFaceLoss,
    GMSoftmaxLoss,
    LDAMLoss,
    LMSoftmaxLoss,
    NormFaceLoss,
    SampleMarginLoss,
)
from largest_margins.margins import sample_margins
from largest_margins.plots import (
    BLUE,
    GREEN,
    GREY,
    LOOKS,
    ORANGE,
    axes_for,
    plot_class_accuracies,
    plot_confusion,
    plot_loss_curves,
    plot_loss_history,
    plot_margin_history,
    plot_norm_ratios,
    plot_prototypes,
    plot_sample_margins,
    plot_similarities,
    plot_target_logits,
)
from largest_margins.reid import evaluate, plot_cmc
from largest_margins.verification import plot_pair_distances, plot_roc

HISTORY = [dict(epoch=e, class_margin=60. + e, bound=96.4, mean_sample_margin=.1 * e, min_sample_margin=-.5,
                norm_ratio=1.2 + .1 * e, train_loss=2. - e, valid_loss=2.5 - e) for e in range(4)]
NAN = math.nan


@pytest.fixture(autouse=True)
def closed():
    plt.close('all')      # what another module's tests left
    yield
    plt.close('all')


@pytest.fixture
def cosines():
    torch.manual_seed(0)
    targets = torch.randint(5, (300,))
    features = F.normalize(simplex(5, 8)[targets] + .3 * torch.randn(300, 8))
    return features @ simplex(5, 8).T, targets


@pytest.mark.parametrize('d', [2, 3, 4, 16])
def test_prototypes_in_each_dimension(d):
    torch.manual_seed(0)
    ax = plot_prototypes(torch.randn(5, d), names=list('abcde'))
    ax.figure.canvas.draw()
    if d == 2: assert len(ax.texts) == 10 and {t.get_text() for t in ax.texts} >= set('abcde')
    if d == 3: assert ax.name == '3d' and [t.get_text() for t in ax.texts] == list('abcde')


def test_angles_are_in_degrees():
    image, = plot_prototypes(simplex(6, 8)).images
    angles = np.ma.filled(image.get_array(), np.nan)
    off = angles[~np.eye(6, dtype=bool)]
    assert np.allclose(off, np.degrees(np.arccos(-1 / 5)), atol=1e-4) and np.isnan(np.diagonal(angles)).all()


def test_histograms_hold_every_number(cosines):
    scores, targets = cosines
    ax = plot_similarities(scores, targets)
    own, others = ax.containers
    width = own[0].get_width()
    assert sum(p.get_height() for p in own) * width == pytest.approx(1)
    assert sum(p.get_height() for p in others) * width == pytest.approx(1)
    ax = plot_sample_margins(scores, targets)
    bars = ax.containers[0]
    margins = sample_margins(scores, targets)
    assert sum(p.get_height() for p in bars) == 300
    below = sum(p.get_height() for p in bars if p.get_x() + p.get_width() <= 1e-9)
    assert below == (margins < 0).sum()
    assert f'{margins.mean():.3f}' in ax.get_legend().texts[0].get_text()


def test_history():
    axes = plot_margin_history(HISTORY)
    assert len(axes) == 3
    assert axes[0].lines[0].get_xydata().tolist() == [[e + 1, 60 + e] for e in range(4)]
    assert [line.get_label() for line in axes[0].lines] == ['class margin', 'best possible']
    assert 'degrees' in axes[0].get_ylabel()
    given = plt.subplots(1, 3)[1]
    assert plot_margin_history(HISTORY, given)[0] is given[0]
    with pytest.raises(ValueError, match='3 axes'): plot_margin_history(HISTORY, plt.subplots(1, 2)[1])
    with pytest.raises(ValueError, match='at least one epoch'): plot_margin_history([])


def test_target_logits():
    ax = plot_target_logits({'NormFace': NormFaceLoss(20.), 'ArcFace': ArcFaceLoss(20., .5)})
    for line, shift in zip(ax.lines, (0, .5), strict=True):
        theta, logit = np.radians(line.get_xdata()), np.asarray(line.get_ydata())
        inside = theta + shift < np.pi
        assert np.allclose(logit[inside], np.cos(theta + shift)[inside], atol=1e-6)
        assert (np.diff(logit) < 1e-12).all()


LOSSES = dict(normface=NormFaceLoss(20.), cosface=CosFaceLoss(20., .2), arcface=ArcFaceLoss(20., .5),
              ldam=LDAMLoss([50, 5, 5, 5], 20.), gm=GMSoftmaxLoss(20., alpha1=.9, beta2=.1), lm=LMSoftmaxLoss(20.),
              logsumexp=LMSoftmaxLoss(20., 'logsumexp'), sample_margin=SampleMarginLoss())


@pytest.mark.parametrize('name', LOSSES)
def test_loss_curves_are_the_losses(name):
    loss = LOSSES[name]
    ax = plot_loss_curves({name: loss}, num_classes=4, others=-.25)
    curve, equal = ax.lines
    assert loss.reduction == 'mean' and equal.get_xdata()[0] == pytest.approx(math.degrees(math.acos(-.25)))
    for i in (0, 100, 360, 500, 720):
        cosines = torch.tensor([[math.cos(math.radians(curve.get_xdata()[i])), -.25, -.25, -.25]], dtype=torch.float64)
        assert curve.get_ydata()[i] == pytest.approx(loss(cosines, torch.tensor([0])).item(), abs=1e-7)


# Histories

def test_norm_ratios_of_several_runs():
    other = [{**epoch, 'norm_ratio': None if e == 3 else 2.} for e, epoch in enumerate(HISTORY)]
    ax = plot_norm_ratios({'a': HISTORY, 'b': other, 'c': []})
    assert [line.get_label() for line in ax.lines] == ['a', 'b', 'c (diverged)']
    assert ax.lines[0].get_xydata().tolist() == [[e + 1, 1.2 + .1 * e] for e in range(4)]
    assert np.array_equal(ax.lines[1].get_ydata(), [2, 2, 2, NAN], equal_nan=True)
    assert len({line.get_color() for line in ax.lines}) == 3


def test_losses_by_epoch():
    ax = plot_loss_history(HISTORY)
    assert [line.get_label() for line in ax.lines] == ['training', 'validation']
    assert ax.lines[0].get_xydata().tolist() == [[e + 1, 2 - e] for e in range(4)]
    assert ax.lines[1].get_ydata().tolist() == [2.5 - e for e in range(4)]
    assert all(tick == round(tick) for tick in ax.get_xticks())


# Classes

def test_accuracy_by_class_from_frequent_to_rare():
    a = torch.tensor([[90., 60, 30], [80., 70, 30], [NAN, NAN, NAN]])
    ax = plot_class_accuracies({'a': a, 'b': torch.tensor([50., NAN, 10])}, [5, 100, 20], names=['x', 'y', 'z'])
    bars = {c.get_label(): c for c in ax.containers if c.get_label() in 'ab'}
    assert [bar.get_height() for bar in bars['a']] == [65, 30, 85]
    assert np.array_equal([bar.get_height() for bar in bars['b']], [NAN, 10, 50], equal_nan=True)
    assert [t.get_text() for t in ax.get_xticklabels()] == ['y', 'z', 'x']
    spreads = [np.ptp(segment[:, 1]) / 2 for segment in bars['a'].errorbar.lines[2][0].get_segments()]
    assert spreads == pytest.approx([math.sqrt(50), 0, math.sqrt(50)])
    middle = [[bar.get_x() + bar.get_width() for bar in bars['a']], [bar.get_x() for bar in bars['b']]]
    assert np.allclose(middle, [[0, 1, 2]] * 2)
    beside = ax.figure.axes[1]
    assert beside.get_yscale() == 'log' and beside.lines[0].get_ydata().tolist() == [100, 20, 5]


def test_a_hundred_classes_need_no_names():
    ax = plot_class_accuracies({'a': torch.arange(100.)}, list(range(1, 101)))
    assert [bar.get_height() for bar in ax.patches] == list(range(99, -1, -1))
    assert not len(ax.get_xticks())
    assert not plot_confusion(torch.ones(30, 30)).texts


def test_confusion_in_percent_of_the_true_class():
    confusion = torch.tensor([[8, 2, 0], [0, 1, 3], [0, 0, 0]])
    ax = plot_confusion(confusion, names=['a', 'b', 'c'])
    shares = np.ma.filled(ax.images[0].get_array(), NAN)
    assert np.array_equal(shares, [[80, 20, 0], [0, 25, 75], [NAN] * 3], equal_nan=True)
    assert {(t.get_position(), t.get_text()) for t in ax.texts} == {
        ((0, 0), '8'), ((1, 0), '2'), ((1, 1), '1'), ((2, 1), '3')}
    cell = ax.images[0].cmap
    for text in ax.texts:
        share = shares[text.get_position()[::-1]]
        assert contrast(text.get_color(), cell(share / 100)) > 4.5
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('predicted class', 'true class')


# What all pictures have in common

def evaluated(): return evaluate(torch.zeros(2, 3), [7, 8], [1, 1], [3, 7, 8], [1, 2, 2], max_rank=4)


def scored(ax): return plot_roc([.1, .9, .4, .6], [False, True, False, True], ax, 'a')


def similar(draw, ax):
    scores = torch.tensor([[.9, .1], [.2, .3], [.8, .1]])
    return draw(scores, torch.tensor([0, 1, 1]), ax)


GALLERY = dict(
    circle=lambda ax: plot_prototypes(simplex(3, 2), ax), sphere=lambda ax: plot_prototypes(simplex(4, 3), ax),
    angles=lambda ax: plot_prototypes(simplex(4, 8), ax),
    similarities=lambda ax: similar(plot_similarities, ax), margins=lambda ax: similar(plot_sample_margins, ax),
    norms=lambda ax: plot_norm_ratios({'a': HISTORY}, ax), losses=lambda ax: plot_loss_history(HISTORY, ax),
    classes=lambda ax: plot_class_accuracies({'a': torch.tensor([90., 50])}, [9, 5], ax),
    confusion=lambda ax: plot_confusion(torch.eye(3), ax),
    logits=lambda ax: plot_target_logits({'a': NormFaceLoss()}, ax),
    curves=lambda ax: plot_loss_curves({'a': NormFaceLoss()}, ax), cmc=lambda ax: plot_cmc({'a': evaluated()}, ax),
    roc=scored, pairs=lambda ax: plot_pair_distances([.1, .2, 3.], [True, True, False], .5, ax),
    diverged=lambda ax: plot_similarities(torch.full((2, 2), NAN), torch.tensor([0, 1]), ax),
    history=lambda ax: plot_margin_history(HISTORY, None if ax is None else [ax] * 3)[0])


def luminance(color):
    return sum(w * (c / 12.92 if c <= .04045 else ((c + .055) / 1.055)**2.4)
               for w, c in zip((.2126, .7152, .0722), to_rgb(color), strict=True))


def contrast(one, other):
    "WCAG's ratio of two colours, 1 to 21."
    low, high = sorted((luminance(one), luminance(other)))
    return (high + .05) / (low + .05)


@pytest.mark.parametrize('background', ['white', 'black', '#14181e'])
def test_every_colour_reads_on_light_and_on_dark(background):
    assert all(contrast(color, background) > 3 for color in (BLUE, ORANGE, GREEN, GREY))


def seen_by(color, kind):
    "A colour as somebody without one kind of cones sees it, linear RGB (Viénot et al. 1999)."
    matrix = dict(protan=[[.11238, .88762, 0], [.11238, .88762, 0], [.00401, -.00401, 1]],
                  deutan=[[.29275, .70725, 0], [.29275, .70725, 0], [-.02234, .02234, 1]])[kind]
    linear = np.array([c / 12.92 if c <= .04045 else ((c + .055) / 1.055)**2.4 for c in to_rgb(color)])
    return np.clip(np.array(matrix) @ linear, 0, 1)**(1 / 2.2)


@pytest.mark.parametrize('kind', ['protan', 'deutan'])
def test_colours_differ_for_colour_blind_readers(kind):
    seen = [seen_by(color, kind) for color in (BLUE, ORANGE, GREEN)]
    assert min(np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]) > .2


def test_looks_repeat_only_after_twelve_lines():
    looks = [(look['color'], look['linestyle']) for look in LOOKS]
    assert len(set(looks)) == 12 and len({color for color, _ in looks[:3]}) == 3
    ax = axes_for()
    ax.plot([0, 1])
    ax.plot([1, 0])
    axes_for(ax).plot([1, 1])  # goes on where it was
    assert [line.get_color() for line in ax.lines] == [BLUE, ORANGE, GREEN]


def transparent_everywhere(figure):
    return to_rgba(figure.get_facecolor())[3] == 0 and all(ax.patch.get_alpha() == 0 for ax in figure.axes[:1])


@pytest.mark.parametrize('name', GALLERY)
def test_every_picture_is_readable_returned_and_leaves_matplotlib_alone(name, monkeypatch):
    monkeypatch.setattr(plt, 'show', lambda *args, **kwargs: pytest.fail('show was called'))
    settings = dict(plt.rcParams)
    ax = GALLERY[name](None)
    assert isinstance(ax, Axes) and transparent_everywhere(ax.figure)
    width, height = ax.figure.get_size_inches()
    assert 2 <= width <= 10 and 2 <= height <= 6
    ax.figure.canvas.draw()
    inside = {id(text) for text in ax.texts} if ax.images else set()  # on colours of their own
    texts = [text for text in ax.figure.findobj(Text) if text.get_text() and id(text) not in inside]
    shown = [text for text in texts if ax.axison or text in ax.texts]
    assert shown and all(contrast(text.get_color(), ground) > 3 for text in shown for ground in ('white', 'black'))
    given = plt.figure().add_subplot(projection='3d' if name == 'sphere' else None)
    assert GALLERY[name](given) is given
    assert dict(plt.rcParams) == settings


@pytest.mark.parametrize('d', [2, 3, 8])
def test_a_diverged_run_says_so(d):
    lost = torch.full((4, d), NAN)
    for ax in (plot_prototypes(lost), plot_prototypes(lost, plt.figure().add_subplot(projection='3d')),
               plot_similarities(lost[:, :2], torch.zeros(4).long()), plot_sample_margins(lost, torch.zeros(4).long())):
        ax.figure.canvas.draw()
        assert [text.get_text() for text in ax.texts] == ['not finite: the training diverged']
    history = [{**HISTORY[0], 'class_margin': NAN, 'train_loss': math.inf, 'valid_loss': None}]
    assert plot_margin_history(history)[0].lines[0].get_label() == 'class margin (diverged)'
    assert [line.get_label() for line in plot_loss_history(history).lines] == [
        'training (diverged)', 'validation (diverged)']
    ax = plot_class_accuracies({'a': torch.full((2, d), NAN)}, [3] * d)
    assert ax.get_legend().texts[0].get_text() == 'a (diverged)'


@pytest.mark.parametrize('call,message', [
    (lambda: plot_norm_ratios({}), 'at least one run'), (lambda: plot_norm_ratios({'a': [{'epoch': 0}]}), 'norm_ratio'),
    (lambda: plot_loss_history([]), 'at least one epoch'), (lambda: plot_loss_history([{'epoch': 0}]), 'train_loss'),
    (lambda: plot_margin_history([{'epoch': 0}]), 'class_margin'),
    (lambda: plot_class_accuracies({}, [1, 2]), 'accuracies'),
    (lambda: plot_class_accuracies({'a': torch.zeros(3)}, [1, 2]), r"'a' must be \[2\] or \[runs, 2\], got \(3,\)"),
    (lambda: plot_class_accuracies({'a': torch.zeros(2)}, [1, 0]), 'counts'),
    (lambda: plot_class_accuracies({'a': torch.zeros(2)}, [1, 2], names=['x']), 'names'),
    (lambda: plot_confusion(torch.zeros(2, 3)), 'confusion'),
    (lambda: plot_confusion(torch.eye(2), names=['x']), 'names'),
    (lambda: plot_loss_curves({}, num_classes=1), 'num_classes'), (lambda: plot_loss_curves({}, others=1.5), 'others'),
    (lambda: plot_loss_curves({}, others=NAN), 'others')])
def test_what_cannot_be_drawn_is_refused_and_leaves_no_figure(call, message):
    with pytest.raises(ValueError, match=message): call()
    assert not plt.get_fignums()


def test_axes_of_the_wrong_dimension():
    flat, deep = plt.figure().add_subplot(), plt.figure().add_subplot(projection='3d')
    with pytest.raises(ValueError, match='ax must be three-dimensional for d = 3'): plot_prototypes(simplex(4, 3), flat)
    for d in (2, 5):
        with pytest.raises(ValueError, match=f'ax must not be three-dimensional for d = {d}'):
            plot_prototypes(simplex(3, d), deep)


def test_bad_input(cosines):
    scores, targets = cosines
    with pytest.raises(ValueError, match='logits'): plot_similarities(20 * scores, targets)
    with pytest.raises(ValueError, match='targets'): plot_sample_margins(scores, targets[:-1])
    with pytest.raises(ValueError, match='names'): plot_prototypes(simplex(3, 4), names=['a'])
    with pytest.raises(ValueError, match='row 1 is zero'): plot_prototypes(torch.tensor([[1., 0], [0, 0]]))
