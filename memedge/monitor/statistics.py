"""What a monitor's verdicts can be made from: a value per step and image, the higher the more like a copy."""

from typing import Literal, get_args

import numpy as np

from memedge.engine.arrays import Bools, Floats

Statistic = Literal["norm", "mean norm", "change", "move"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
BOTH_SIDES = ("move",)  # a step that is too short is as strange as one that is too long


def values(statistic: Statistic, norms: Floats, changes: Floats, moves: Floats) -> Floats:
    """Return a statistic's logarithm after each step, float64 [K, B]; NaN after the first where it needs two.

    Args:
        statistic: "norm": the step's own ‖Δ‖₂; "mean norm": its mean over the steps so far (Wen et al.); "change":
            ‖ε_c(x_k+1) − ε_c(x_k)‖₂² (DSM); "move": ‖x_k − x_k+1‖₂ (Broken Memories).
        norms, changes, moves: as Monitor has them, [K, B] and [K − 1, B].
    """
    with np.errstate(divide="ignore"):  # the empty prompt's Δ is 0
        if statistic == "norm":
            return np.log(norms)
        if statistic == "mean norm":
            count = np.arange(1, len(norms) + 1)[:, None]
            return np.asarray(np.log(np.cumsum(norms, axis=0) / count))
        later = np.log(changes if statistic == "change" else moves).reshape(-1, norms.shape[1])
    return np.concatenate([np.full((1, norms.shape[1]), np.nan), later])


def reference(of: Floats, clean: Bools) -> tuple[Floats, Floats]:
    """Return the mean and deviation of clean images after each step, [K] each; 0 and 1 where nothing is known yet.

    Args:
        of: what `values` returns, [K, N].
        clean: which images are, [N].
    """
    known = ~np.isnan(of[:, 0])
    mean, deviation, some = np.zeros(len(of)), np.ones(len(of)), of[known][:, clean]
    mean[known], deviation[known] = some.mean(axis=1), some.std(axis=1)
    return mean, deviation


def running_maximum(statistic: Statistic, of: Floats, mean: Floats, deviation: Floats) -> Floats:
    """Return the highest deviation from clean images over the steps so far, float64 [K, B]; −∞ before there is one.

    Args:
        of: what `values` returns, [K, B].
        mean, deviation: of clean images at each step, [K].
    """
    z = (of - mean[:, None]) / deviation[:, None]
    if statistic in BOTH_SIDES:
        z = np.abs(z)
    highest: Floats = np.maximum.accumulate(np.where(np.isnan(z), -np.inf, z), axis=0)
    return highest
