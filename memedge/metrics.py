"""AUC, TPR at a low FPR, bootstrap intervals and DeLong's test, of scores of positives and negatives.

Scores are float [..., count] each, the higher the more likely positive. Statistics are over the last axis, so that all
resamples of a bootstrap are one call.
"""

from collections.abc import Callable, Iterator
from math import sqrt
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, bootstrap, norm, rankdata

RESAMPLES = 2000
INDICES = 1 << 22  # of a bootstrap, in memory at once
CONFIDENCE = 0.95
Convention = Literal["strict", "nearest"]
Array = npt.NDArray[Any]  # of floats


def auc(positive: Array, negative: Array, axis: int = -1) -> Array:
    """Return the share of pairs in which the positive is higher, ties counting half [...]; `axis` is the last."""
    count = positive.shape[axis]
    ranks = rankdata(np.concatenate([positive, negative], axis=axis), axis=axis)[..., :count]
    wins = ranks.sum(axis=axis) - count * (count + 1) / 2  # beside the positives below
    return np.asarray(wins / (count * negative.shape[axis]))


def tpr(positive: Array, negative: Array, percent: float, convention: Convention = "strict", axis: int = -1) -> Array:
    """Return the highest TPR at a given FPR, below 100 % [...]; `axis` is the last.

    "strict": at an FPR of at most `percent` %. "nearest": at that FPR, of those that a threshold can give, which is
    nearest to `percent` %; the lower one if two are.
    """
    size = negative.shape[axis]
    bounds = _bounds(negative, axis)
    if convention == "strict":
        return np.asarray((positive > bounds[..., [allowed(percent, size)]]).mean(axis=axis))
    always = np.ones((*bounds.shape[:-1], 1), dtype=bool)
    falling = bounds[..., :-1]
    exact = np.concatenate([always, falling[..., 1:] < falling[..., :-1], always], axis=axis)
    distance = np.abs(100 * np.arange(size + 1) - percent * size)
    best = np.where(exact, distance, distance.max() + 1).argmin(axis=axis)[..., None]
    return np.asarray((positive > np.take_along_axis(bounds, best, axis=axis)).mean(axis=axis))


def roc(positive: Array, negative: Array, counts: npt.NDArray[np.int64]) -> Array:
    """Return the highest TPR with at most counts[k] negatives above the threshold, [..., K]."""
    bounds = _bounds(negative)[..., counts]
    # A row at a time: all pairs of all resamples would be gigabytes.
    flat, rising = bounds.reshape(-1, len(counts)), np.sort(positive, axis=-1).reshape(-1, positive.shape[-1])
    below = [np.searchsorted(row, bound, side="right") for row, bound in zip(rising, flat, strict=True)]
    count = positive.shape[-1]
    return np.asarray((count - np.reshape(below, bounds.shape)) / count)


def allowed(percent: float, negatives: int) -> int:
    """Return how many of the negatives may be above a threshold whose FPR is at most `percent` %."""
    return int(negatives * percent / 100 + 1e-9)  # 0.29 · 100 is 28.999…


def threshold(negative: Array, percent: float) -> float:
    """Return the highest score of a negative [N] that must stay below a threshold with an FPR of at most `percent` %.

    A score is above the threshold if it is greater than this.
    """
    return float(_bounds(negative)[allowed(percent, len(negative))])


def _bounds(negative: Array, axis: int = -1) -> Array:
    """Return bounds [..., N + 1]: above bounds[k] are k negatives, or fewer if the k-th and the next are equal."""
    falling = -np.sort(-negative, axis=axis)
    return np.concatenate([falling, np.full((*falling.shape[:-1], 1), -np.inf)], axis=axis)


def interval(statistic: Callable[..., Array], positive: Array, negative: Array) -> tuple[Array, Array]:
    """Return both ends of the 95 % percentile interval of statistic(positive [..., P], negative [..., N], axis=-1).

    Positives and negatives are resampled separately. A statistic of several figures has them in the first axis.
    """
    found = bootstrap(
        (positive, negative),
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        rng=0,
    ).confidence_interval
    return found.low, found.high


def resample(
    positives: int, negatives: int, resamples: int = RESAMPLES, seed: int = 0
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield the indices of a stratified bootstrap, int64 [r, positives] and [r, negatives], some resamples at a time.

    Where the same indices are used for several detectors' scores of the same prompts, differences are paired.
    """
    generator = np.random.default_rng(seed)
    most = max(1, INDICES // (positives + negatives))
    for start in range(0, resamples, most):
        count = min(most, resamples - start)
        yield (
            generator.integers(positives, size=(count, positives)),
            generator.integers(negatives, size=(count, negatives)),
        )


def percentiles(values: Array) -> tuple[float, float]:
    """Return both ends of the 95 % percentile interval of a figure's resamples [R]."""
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def delong(positive: tuple[Array, Array], negative: tuple[Array, Array]) -> tuple[float, float, float | None]:
    """Compare the AUCs of two detectors of the same P positives and N negatives (DeLong et al., Biometrics 1988).

    The placement value of a positive is the share of negatives below it, ties counting half; that of a negative the
    share of positives above it. The AUC is the mean of either, and the variance of a difference of AUCs is the sum of
    the variances of the differences of placement values, over P and over N.

    Args:
        positive, negative: each detector's scores, float [P] and float [N] with P, N ≥ 2.

    Returns:
        the difference, second minus first; its standard error; and the two-sided p-value of its being 0, or None where
        it does not vary, as for two detectors of AUC 1.
    """
    wins, losses = zip(*(_doubled_wins(p, n) for p, n in zip(positive, negative, strict=True)), strict=True)
    # Differences of whole numbers: what does not vary has a variance of exactly 0.
    of_positives, of_negatives = wins[1] - wins[0], losses[1] - losses[0]
    count, other = len(of_positives), len(of_negatives)
    difference = float(of_positives.sum() / (2 * count * other))
    variance = of_positives.var(ddof=1) / count / (2 * other) ** 2 + of_negatives.var(ddof=1) / other / (2 * count) ** 2
    error = sqrt(variance)
    return difference, error, 2 * float(norm.sf(abs(difference) / error)) if error else None


def _doubled_wins(positive: Array, negative: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return twice the negatives below each positive [P] and the positives above each negative [N]; ties count once."""
    low, high = np.sort(negative), np.sort(positive)
    below = np.searchsorted(low, positive, "left") + np.searchsorted(low, positive, "right")
    above = 2 * len(high) - np.searchsorted(high, negative, "left") - np.searchsorted(high, negative, "right")
    return below, above


def binomial(count: int, total: int) -> tuple[float, float, float]:
    """Return count / total and both ends of its exact 95 % interval (Clopper and Pearson)."""
    low, high = binomtest(count, total).proportion_ci(CONFIDENCE, method="exact")
    return count / total, float(low), float(high)
