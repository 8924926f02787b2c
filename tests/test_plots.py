"What the pictures show, read back from the artists."
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from largest_margins.codes import simplex
from largest_margins.losses import ArcFaceLoss, NormFaceLoss
from largest_margins.margins import sample_margins
from largest_margins.plots import (
    axes_for,
    plot_loss_curves,
    plot_margin_history,
    plot_prototypes,
    plot_sample_margins,
    plot_similarities,
)

HISTORY = [dict(epoch=e, class_margin=60. + e, bound=96.4, mean_sample_margin=.1 * e, min_sample_margin=-.5,
                norm_ratio=1.2) for e in range(4)]


@pytest.fixture(autouse=True)
def closed():
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


def test_curves():
    ax = plot_loss_curves({'NormFace': NormFaceLoss(20.), 'ArcFace': ArcFaceLoss(20., .5)})
    for line, shift in zip(ax.lines, (0, .5), strict=True):
        theta, logit = np.radians(line.get_xdata()), np.asarray(line.get_ydata())
        inside = theta + shift < np.pi
        assert np.allclose(logit[inside], np.cos(theta + shift)[inside], atol=1e-6)
        assert (np.diff(logit) < 1e-12).all()


def test_pictures_are_transparent_and_given_axes_are_used(cosines):
    ax = plt.subplots()[1]
    assert plot_similarities(*cosines, ax) is ax and ax.patch.get_alpha() == 0
    new = axes_for()
    assert new.figure.get_facecolor()[3] == 0


def test_bad_input(cosines):
    scores, targets = cosines
    with pytest.raises(ValueError, match='logits'): plot_similarities(20 * scores, targets)
    with pytest.raises(ValueError, match='targets'): plot_sample_margins(scores, targets[:-1])
    with pytest.raises(ValueError, match='names'): plot_prototypes(simplex(3, 4), names=['a'])
    with pytest.raises(ValueError, match='row 1 is zero'): plot_prototypes(torch.tensor([[1., 0], [0, 0]]))
