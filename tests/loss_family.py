"The losses in one table, each with its formula written out again in high precision; the core's tests share it."
from collections.abc import Callable
from math import pi
from typing import NamedTuple

import torch
from mpmath import mp, mpf

from largest_margins import losses as lm

mp.dps = 40  # far beyond float64, so that the references do not round

COUNTS = (50, 5, 500, 20)  # training samples of classes 0..3, and again for 4..7


def psi(u):
    "cos on [0, π], then the same arc again, two lower."
    return mp.cos(u) if u <= mp.pi else psi(u - mp.pi) - 2


def margin_softmax(num, den=None):
    "The per-sample loss of the contract's table, from curves of (θ, class)."
    den = den or num

    def loss(row, y, s):
        theta = mp.acos(row[y])
        rest = sum(mp.exp(s * c) for j, c in enumerate(row) if j != y)
        return mp.log(mp.exp(s * den(theta, y)) + rest) - s * num(theta, y)
    return loss


def ratio(j, y): return mpf(COUNTS[j % 4]) / COUNTS[y % 4]


def normface_with_prior(row, y, s):
    return mp.log(sum(ratio(j, y) * mp.exp(s * c) for j, c in enumerate(row))) - s * row[y]


def largest_margin_with_prior(row, y, s):
    return mp.log(sum(ratio(j, y) * mp.exp(s * (c - row[y])) for j, c in enumerate(row) if j != y)) / s


def largest_margin_softmax(row, y, s):
    return mp.log(sum(mp.exp(s * (c - row[y])) for j, c in enumerate(row) if j != y)) / s


def negative_sample_margin(row, y, s):
    return max(c for j, c in enumerate(row) if j != y) - row[y]


def focal(row, y, s):
    "On logits, so `s` plays no part; γ = 2."
    p = mp.exp(row[y]) / sum(mp.exp(x) for x in row)
    return (1 - p) ** 2 * -mp.log(p)


def ldam_margin(y):
    return mpf(1) / 2 * (mpf(COUNTS[y % 4]) / 5) ** mpf(-.25)


def slope(y): return mpf(2 + y % 4) / 2


def offset(y): return mpf(y % 4) / 8


class Row(NamedTuple):
    "One loss: how it is made and what it must be."
    name: str
    make: Callable  # (scale, classes, **options) -> loss; class i of the loss is class classes[i] of the reference
    sample: Callable  # (row of mpf, y, scale) -> mpf, the loss of one sample
    kinks: tuple = ()  # angles of the target at which the formula changes
    edits_logit: bool = True  # num = den, the cross-entropy of logits with one entry edited

    def __repr__(self): return self.name

    def samples(self, cosines, targets, scale):
        "The loss of every sample, as mpf."
        rows = [[mpf(c) for c in row] for row in cosines.double().tolist()]
        return [self.sample(row, max(y, 0), mpf(scale)) for row, y in zip(rows, targets.tolist(), strict=True)]


def per_class(values, classes):
    return torch.tensor([float(values(j)) for j in classes], dtype=torch.float64)


def class_prior(classes): return per_class(lambda j: COUNTS[j % 4], classes)


def arc(m1, m2, m3):
    "The angles below π at which m1·θ + m2 is a multiple of π."
    kinks = tuple((n * pi - m2) / m1 for n in range(1, int(m1 + 1) + 1) if 0 < (n * pi - m2) / m1 < pi)
    return margin_softmax(lambda theta, y: psi(mpf(m1) * theta + mpf(m2)) - mpf(m3)), kinks


FAMILY = [
    Row('NormFace', lambda s, classes, **o: lm.NormFaceLoss(s, **o), margin_softmax(lambda t, y: mp.cos(t))),
    Row('CosFace', lambda s, classes, **o: lm.CosFaceLoss(s, .35, **o),
        margin_softmax(lambda t, y: mp.cos(t) - mpf(.35))),
    Row('ArcFace', lambda s, classes, **o: lm.ArcFaceLoss(s, .5, **o), *arc(1, .5, 0)),
    Row('SphereFace 1.5', lambda s, classes, **o: lm.SphereFaceLoss(s, 1.5, **o), *arc(1.5, 0, 0)),
    Row('SphereFace 4', lambda s, classes, **o: lm.SphereFaceLoss(s, 4., **o), *arc(4, 0, 0)),
    Row('combined', lambda s, classes, **o: lm.CombinedMarginLoss(s, 1.3, .4, .2, **o), *arc(1.3, .4, .2)),
    Row('LDAM', lambda s, classes, **o: lm.LDAMLoss([COUNTS[j % 4] for j in classes], s, **o),
        margin_softmax(lambda t, y: mp.cos(t) - ldam_margin(y))),
    Row('GM numbers', lambda s, classes, **o: lm.GMSoftmaxLoss(s, 1.2, .8, -.1, .1, **o),
        margin_softmax(lambda t, y: mpf(1.2) * mp.cos(t) - mpf(.1), lambda t, y: mpf(.8) * mp.cos(t) + mpf(.1)),
        edits_logit=False),
    Row('GM per class', lambda s, classes, **o: lm.GMSoftmaxLoss(
            s, alpha1=per_class(slope, classes), beta2=per_class(offset, classes), **o),
        margin_softmax(lambda t, y: slope(y) * mp.cos(t), lambda t, y: mp.cos(t) + offset(y)), edits_logit=False),
    Row('LM mean', lambda s, classes, **o: lm.LMSoftmaxLoss(s, **o), largest_margin_softmax, edits_logit=False),
    Row('LM logsumexp', lambda s, classes, **o: lm.LMSoftmaxLoss(s, 'logsumexp', **o), largest_margin_softmax,
        edits_logit=False),
    Row('NormFace with prior', lambda s, classes, **o: lm.NormFaceLoss(s, prior=class_prior(classes), **o),
        normface_with_prior, edits_logit=False),
    Row('LM with prior', lambda s, classes, **o: lm.LMSoftmaxLoss(s, prior=class_prior(classes), **o),
        largest_margin_with_prior, edits_logit=False),
    Row('ElasticFace', lambda s, classes, **o: lm.ElasticFaceLoss(s, .5, **o).eval(), *arc(1, .5, 0),
        edits_logit=False),
    Row('ElasticFace cos', lambda s, classes, **o: lm.ElasticFaceLoss(s, .3, kind='cos', **o).eval(),
        margin_softmax(lambda t, y: mp.cos(t) - mpf(.3)), edits_logit=False),
    Row('R_sm', lambda s, classes, **o: lm.SampleMarginLoss(**o), negative_sample_margin, edits_logit=False),
    Row('focal', lambda s, classes, **o: lm.FocalLoss(2., **o), focal, edits_logit=False),
]
ON_COSINES = [row for row in FAMILY if row.name != 'focal']
ANGULAR = [row for row in FAMILY if row.kinks]
SMOOTHABLE = [row for row in FAMILY if row.edits_logit]


def reduced(row, losses, targets, scale, weight=None, reduction='mean'):
    "What the reduction makes of the losses of a batch, by loops; a target of −100 does not count."
    targets = targets.tolist()
    if reduction == 'none':
        return [mpf(0) if y == -100 else x * (1 if weight is None else mpf(weight[y].item()))
                for x, y in zip(losses, targets)]
    losses, targets = [x for x, y in zip(losses, targets) if y != -100], [y for y in targets if y != -100]
    weights = [mpf(1) if weight is None else mpf(weight[y].item()) for y in targets]
    if not targets: return mpf(0)
    if reduction == 'class-mean':
        weights = [a / targets.count(y) for a, y in zip(weights, targets)]
    if row.name == 'LM logsumexp':
        if reduction != 'sum': weights = [a * len(weights) / sum(weights) for a in weights]
        return mp.log(sum(a * mp.exp(scale * x) for a, x in zip(weights, losses))) / scale
    if reduction == 'class-mean':  # the mean of each class, then the weighted mean over the classes present
        present = sorted(set(targets))
        means = {j: sum(x for x, y in zip(losses, targets) if y == j) / targets.count(j) for j in present}
        importance = {j: mpf(1) if weight is None else mpf(weight[j].item()) for j in present}
        return sum(importance[j] * means[j] for j in present) / sum(importance.values())
    total = sum(a * x for a, x in zip(weights, losses))
    return total if reduction == 'sum' else total / sum(weights)


def quality(norms, mean, deviation, h=.333):
    "AdaFace's measure of an image, from the norm of its feature (Kim et al. 2022, eq. 13)."
    return [max(mpf(-1), min(mpf(1), (x - mean) / (deviation + mpf('1e-3')) * mpf(h))) for x in norms]


def adaface(row, y, s, z, m=.4):
    "One sample's loss (Kim et al. 2022, eq. 14 and 15)."
    theta = max(mpf(0), min(mp.pi, mp.acos(row[y]) - mpf(m) * z))
    rest = sum(mp.exp(s * c) for j, c in enumerate(row) if j != y)
    own = s * (mp.cos(theta) - mpf(m) * z - mpf(m))
    return mp.log(mp.exp(own) + rest) - own


def ignoring(targets, every=3):
    "The same targets, of which some do not count."
    return torch.where(torch.arange(len(targets)) % every == 1, -100, targets)


def batch(n=7, k=4, seed=0, dtype=torch.float64):
    "Cosines well inside (−1, 1), and targets in which one class is missing and one is frequent."
    generator = torch.Generator().manual_seed(seed)
    cosines = 1.9 * torch.rand(n, k, generator=generator, dtype=torch.float64) - .95
    targets = torch.tensor([0, 1, 1, 3, 1, 0, 1])[torch.arange(n) % 7]
    return cosines.to(dtype), targets
