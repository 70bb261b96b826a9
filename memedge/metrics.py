"""AUC, TPR at a low FPR, and their bootstrap intervals, of scores of positives and negatives: float [..., count] each.

Statistics are over the last axis, so that all resamples of a bootstrap are one call.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap, rankdata

RESAMPLES = 2000
CONFIDENCE = 0.95
Convention = Literal["strict", "nearest"]
Array = npt.NDArray[Any]  # of floats


def auc(positive: Array, negative: Array, axis: int = -1) -> Array:
    """Return the share of pairs in which the positive is higher, ties counting half [...]; `axis` is the last."""
    count = positive.shape[axis]
    ranks = rankdata(np.concatenate([positive, negative], axis=axis), axis=axis)[..., :count]
    wins = ranks.sum(axis=axis) - count * (count + 1) / 2  # beside the positives below
    return np.asarray(wins / (count * negative.shape[axis]))


def tpr(positive: Array, negative: Array, percent: int, convention: Convention = "strict", axis: int = -1) -> Array:
    """Return the highest TPR at a given FPR, below 100 % [...]; `axis` is the last.

    "strict": at an FPR of at most `percent` %. "nearest": at that FPR, of those that a threshold can give, which is
    nearest to `percent` %; the lower one if two are.
    """
    size = negative.shape[axis]
    falling = -np.sort(-negative, axis=axis)
    always = np.ones((*falling.shape[:-1], 1), dtype=bool)
    # Above bounds[k] are k negatives, or fewer if the k-th and the next are equal.
    bounds = np.concatenate([falling, np.full(always.shape, -np.inf)], axis=axis)
    if convention == "strict":
        return np.asarray((positive > bounds[..., [size * percent // 100]]).mean(axis=axis))
    exact = np.concatenate([always, falling[..., 1:] < falling[..., :-1], always], axis=axis)
    distance = np.abs(100 * np.arange(size + 1) - percent * size)
    best = np.where(exact, distance, distance.max() + 1).argmin(axis=axis)[..., None]
    return np.asarray((positive > np.take_along_axis(bounds, best, axis=axis)).mean(axis=axis))


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
