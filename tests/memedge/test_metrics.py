"""The metrics that evaluation adds, against scikit-learn, their definitions written out, and known properties."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from memedge.metrics import auc, delong, percentiles, resample, roc, threshold, tpr


@pytest.fixture
def scores():
    """Two detectors' scores of 40 positives and 130 negatives, correlated, with ties."""
    generator = np.random.default_rng(3)
    shared = generator.normal(size=170)
    both = [shared + generator.normal(size=170) + shift * (np.arange(170) < 40) for shift in (1.5, 1.0)]
    return tuple(s[:40].round(1) for s in both), tuple(s[40:].round(1) for s in both)


def test_roc_is_scikit_learns(scores):
    (positive, _), (negative, _) = scores
    x, y, _ = roc_curve(np.r_[np.ones(40), np.zeros(130)], np.r_[positive, negative], drop_intermediate=False)
    counts = np.arange(131)
    expected = [y[np.round(x * 130) <= count].max() for count in counts]
    np.testing.assert_allclose(roc(positive, negative, counts), expected)
    assert roc(positive, negative, np.array([1, 3]))[0] == tpr(positive, negative, 1)


def test_roc_of_resamples_is_that_of_each(scores):
    (positive, _), (negative, _) = scores
    some, others = next(resample(40, 130, resamples=5))
    counts = np.array([0, 2, 130])
    together = roc(positive[some], negative[others], counts)
    np.testing.assert_array_equal(
        together, [roc(positive[i], negative[j], counts) for i, j in zip(some, others, strict=True)]
    )


def test_threshold_is_what_the_strict_tpr_uses(scores):
    (positive, _), (negative, _) = scores
    for percent in (1, 3):
        bound = threshold(negative, percent)
        assert (negative > bound).sum() <= 130 * percent / 100
        assert (positive > bound).mean() == tpr(positive, negative, percent)


def brute_force(positive, negative):
    """DeLong's variance of a difference, from all P · N pairs."""
    wins = [(p[:, None] > n[None]) + 0.5 * (p[:, None] == n[None]) for p, n in zip(positive, negative, strict=True)]
    covariance = np.cov([w.mean(axis=1) for w in wins]) / len(positive[0])
    covariance += np.cov([w.mean(axis=0) for w in wins]) / len(negative[0])
    return wins[1].mean() - wins[0].mean(), np.sqrt(np.array([-1, 1]) @ covariance @ np.array([-1, 1]))


def test_delong_is_its_definition(scores):
    difference, error, p = delong(*scores)
    np.testing.assert_allclose((difference, error), brute_force(*scores))
    labels = np.r_[np.ones(40), np.zeros(130)]
    first, second = (roc_auc_score(labels, np.r_[a, b]) for a, b in zip(*scores, strict=True))
    assert difference == pytest.approx(second - first)
    assert 0 < p < 1
    swapped = delong(*(pair[::-1] for pair in scores))
    assert swapped == (-difference, error, p)
    scaled = delong(*((pair[0], np.exp(pair[1])) for pair in scores))
    assert scaled == (difference, error, p)  # a rising function changes no rank


def test_delong_agrees_with_the_bootstrap(scores):
    positive, negative = scores
    some, others = next(resample(40, 130))
    first, second = (auc(p[some], n[others]) for p, n in zip(positive, negative, strict=True))
    assert delong(positive, negative)[1] == pytest.approx((second - first).std(), rel=0.1)


def test_delong_holds_its_level():
    """Of two detectors that are equally good, a p-value is below 10 % in 10 % of data sets."""
    generator, below = np.random.default_rng(0), 0
    for _ in range(500):
        positive, negative = generator.normal(1, 1, (2, 40)), generator.normal(0, 1, (2, 60))
        below += delong(tuple(positive), tuple(negative))[2] < 0.1
    assert 0.06 < below / 500 < 0.14


def test_delong_without_variance():
    high, low = np.array([3.0, 4, 5]), np.array([0.0, 1, 2])
    assert delong((high, high + 1), (low, low)) == (0, 0, None)
    assert delong((high, low), (high, low)) == (0, 0, None)  # the very same scores
    assert delong((low * 0, high), (low * 0, low)) == (0.5, 0, None)


def test_resamples_come_in_parts_that_fit_in_memory(monkeypatch):
    monkeypatch.setattr("memedge.metrics.INDICES", 100)
    parts = list(resample(3, 22, resamples=10))
    assert [part.shape for part, _ in parts] == [(4, 3), (4, 3), (2, 3)]
    assert {int(i) for part, _ in parts for i in part.ravel()} == {0, 1, 2}
    assert max(others.max() for _, others in parts) <= 21


def test_percentile_intervals_cover():
    """The 95 % interval of the AUC holds the true one in about 95 % of data sets."""
    from scipy.stats import norm

    generator, covered = np.random.default_rng(1), 0
    for trial in range(200):
        positive, negative = generator.normal(1, 1, 50), generator.normal(0, 1, 80)
        some, others = next(resample(50, 80, resamples=300, seed=trial))
        low, high = percentiles(auc(positive[some], negative[others]))
        covered += low <= norm.cdf(1 / np.sqrt(2)) <= high
    assert 0.89 <= covered / 200 <= 0.99
