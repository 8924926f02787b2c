"Calibration and detection against slow code and other libraries, and what they refuse."
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from largest_margins.reliability import calibration, calibration_error, detection, fit_temperature


def drawn(n=500, k=6, seed=0, factor=1.):
    "Logits, and classes drawn from their softmax."
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, k, generator=g, dtype=torch.float64)
    return factor * logits, torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]


@pytest.mark.parametrize('bins', [1, 10, 15])
def test_calibration_error_is_the_sum_over_bins(bins):
    logits, y = drawn(factor=3.)
    p = logits.softmax(1).numpy()
    sure, right, error = p.max(1), p.argmax(1) == y.numpy(), 0.
    for b in range(bins):
        inside = (sure > b / bins) & (sure <= (b + 1) / bins)
        if inside.any(): error += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert calibration_error(torch.from_numpy(p), y, bins) == pytest.approx(error)


def test_a_temperature_undoes_a_factor_and_moves_no_decision():
    logits, y = drawn(4000)
    honest = fit_temperature(logits, y)
    assert honest == pytest.approx(1, abs=.1)
    assert fit_temperature(5 * logits, y) == pytest.approx(5 * honest, rel=1e-3)
    around = [F.cross_entropy(logits / (honest * f), y) for f in (.98, 1., 1.02)]
    assert around[1] == min(around)


def test_the_fitted_numbers_do_not_judge_their_own_fit():
    logits, y = drawn(factor=4.)
    found = calibration(logits, y)
    fitted = torch.empty_like(logits)
    for half in (0, 1): fitted[half::2] = logits[half::2] / fit_temperature(logits[1 - half::2], y[1 - half::2])
    assert found.fitted_nll == pytest.approx(F.cross_entropy(fitted, y).item())
    assert found.nll == pytest.approx(F.cross_entropy(logits, y).item()) and found.fitted_nll < found.nll


@pytest.mark.parametrize('ties', [False, True])
def test_auroc_is_scikit_learn_s(ties):
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 300), rng.normal(0, 1, 200)
    if ties: a, b = a.round(), b.round()
    found = detection(torch.from_numpy(a), torch.from_numpy(b))
    labels = np.r_[np.ones(300), np.zeros(200)]
    assert found.auroc == pytest.approx(roc_auc_score(labels, np.r_[a, b]))
    kept = max(t for t in a if (a >= t).mean() >= .95)
    assert found.fpr95 == pytest.approx((b >= kept).mean())


def test_detection_is_pytorch_ood_s():
    from pytorch_ood import metrics
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, generator=g) + 1.5, torch.randn(300, generator=g)
    reference = metrics.OODMetrics()  # unknown samples have labels below 0, and the larger scores
    reference.update(-torch.cat([a, b]), torch.cat([torch.zeros(400), -torch.ones(300)]).long())
    wanted = reference.compute()
    assert detection(a, b).auroc == pytest.approx(float(wanted['AUROC']))
    assert detection(-b, -a).fpr95 == pytest.approx(float(wanted['FPR95TPR']))  # there unknown ones are the positive


@pytest.mark.parametrize('call, message', [
    (lambda: calibration_error(torch.ones(3, 2), torch.zeros(3, dtype=torch.long)), 'rows that sum to 1'),
    (lambda: calibration_error(torch.full((3, 2), .5), torch.tensor([0, 1, 2])), 'targets'),
    (lambda: calibration_error(torch.full((3, 2), .5), torch.zeros(3, dtype=torch.long), 0), 'bins'),
    (lambda: calibration(torch.zeros(1, 2), torch.tensor([0])), 'two samples'),
    (lambda: fit_temperature(torch.tensor([[math.nan, 0.]]), torch.tensor([0])), 'logits'),
    (lambda: detection(torch.tensor([]), torch.ones(2)), 'known'),
    (lambda: detection(torch.ones(2), torch.ones(2, 2)), 'unknown')])
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message): call()
