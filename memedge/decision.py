"""From statistics to verdicts: one rule, for scores and for bounds of scores (METHODS.md §1, exact acceleration 4)."""

import numpy as np
import numpy.typing as npt

from memedge.engine.manifest import Calibration, Conformal, Preset
from memedge.engine.precision import Tolerance

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def decide(
    calibration: Calibration, norm: Floats, lowest: Floats, highest: Floats, noise: Tolerance
) -> tuple[Bools, Bools]:
    """Return which prompts are memorized and which are still open, bool [B] each; the others are not memorized.

    The alignment lies in [lowest, highest], so the score γ_norm · norm + γ_align · alignment lies between two bounds.
    A verdict is given where both are on one side of the threshold by more than `noise` can move a score: the
    floating-point difference between two evaluations of one prompt in batches of different shapes.

    Args:
        calibration: γ and the threshold.
        norm, lowest, highest: float64 [B]; lowest equals highest where the alignment is known.
        noise: of the norm, relative, and of the alignment, absolute (engine/precision.py).
    """
    low, high = score_bounds(calibration, norm, lowest, highest)
    margin = abs(calibration.gamma_norm) * norm * noise.norm + abs(calibration.gamma_alignment) * noise.alignment
    memorized = low >= calibration.threshold + margin
    clean = high < calibration.threshold - margin
    return memorized, ~(memorized | clean)


def score_bounds(weights: Calibration | Preset, norm: Floats, lowest: Floats, highest: Floats) -> tuple[Floats, Floats]:
    """Return the least and the greatest score, float64 [B] each, with the alignment in [lowest, highest]."""
    base = weights.gamma_norm * norm
    ends = weights.gamma_alignment * lowest, weights.gamma_alignment * highest
    return base + np.minimum(*ends), base + np.maximum(*ends)


def alignment_bounds(
    known: Floats, done: int | npt.NDArray[np.int64], draws: int, conformal: Conformal | None
) -> tuple[Floats, Floats]:
    """Return where the mean alignment over `draws` lies, given the sum over the first `done` of them; float64 [B] each.

    A draw not done lies in [−1, 1]. With `conformal` the mean also lies in its interval, but for a share ε of prompts;
    where what is known already contradicts that, only what is proven is used.
    """
    rest = draws - done
    lowest, highest = (known - rest) / draws, (known + rest) / draws
    if conformal is None:
        return lowest, highest
    narrow = np.maximum(lowest, conformal.lowest), np.minimum(highest, conformal.highest)
    possible = (narrow[0] <= narrow[1]) & (rest > 0)
    return np.where(possible, narrow[0], lowest), np.where(possible, narrow[1], highest)
