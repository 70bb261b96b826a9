"""The split-conformal interval of the alignment (Vovk et al.; docs/methods.md §5)."""

import math

import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError
from memedge.engine.manifest import Conformal


def rank_of(share: float, prompts: int) -> int:
    """Return k = ⌊share · (prompts + 1)⌋: the k-th of so many values bounds a new one, but for at most that share."""
    return math.floor(share * (prompts + 1) + 1e-9)  # 0.01 · 100 may be 0.999…


def conformal_interval(alignment: npt.NDArray[np.float64], gamma_alignment: float, delta: float) -> Conformal:
    """Return an interval that holds the alignment of a new prompt with probability at least 1 − δ.

    The new prompt must be exchangeable with the calibration prompts. The interval is open towards lower scores. Almost
    all prompts are clean, and knowing how far the alignment can raise a score saves their second pass; memorized
    prompts are few and may take it. With m prompts the k-th most suspicious alignment bounds that of a new prompt, but
    for a share k / (m + 1). The δ that is stored is the largest such share that is at most the one asked for.

    Args:
        alignment: float64 [m], that of each calibration prompt, its mean over all draws.
        gamma_alignment: the alignment's weight in the score.
        delta: the share of verdicts that may change, in (0, 1).

    Raises:
        InputError: fewer than 1 / δ − 1 prompts.
    """
    prompts = len(alignment)
    rank = rank_of(delta, prompts)
    if rank < 1:
        raise InputError(
            f"{prompts} prompts cannot bound the alignment at δ = {delta:g}: give at least {math.ceil(1 / delta) - 1}."
        )
    ordered = np.sort(alignment)
    share = rank / (prompts + 1)
    if gamma_alignment >= 0:
        return Conformal(-1.0, float(ordered[-rank]), share, prompts)
    return Conformal(float(ordered[rank - 1]), 1.0, share, prompts)
