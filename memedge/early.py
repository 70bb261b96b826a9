"""Verdicts with the fewest passes: the high-noise pass first, others only for prompts whose verdict is still open."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memedge.decision import Bools, Floats, alignment_bounds, decide, score_bounds
from memedge.engine.manifest import Calibration, Conformal
from memedge.engine.passes import Engine, States
from memedge.engine.precision import BATCH


@dataclass(frozen=True)
class Outcome:
    """What is known of B prompts after the passes they took.

    Attributes:
        norm: float64 [B].
        alignment: float64 [B]; NaN where passes were left out.
        lowest, highest: float64 [B], bounds of the score: equal where nothing was left out.
        passes: int64 [B], conditional UNet evaluations.
        proven: bool [B], whether the verdict holds whatever was left out would have been.
    """

    norm: Floats
    alignment: Floats
    lowest: Floats
    highest: Floats
    passes: npt.NDArray[np.int64]
    proven: Bools

    @staticmethod
    def whole(norm: Floats, alignment: Floats, passes: int) -> "Outcome":
        """Return the outcome of computing everything, with bounds of the score still to be filled in."""
        unknown = np.full_like(norm, np.nan)
        count = len(norm)
        return Outcome(norm, alignment, unknown, unknown.copy(), np.full(count, passes), np.ones(count, dtype=bool))


def evaluate(engine: Engine, calibration: Calibration, states: States, conformal: Conformal | None) -> Outcome:
    """Run prompts until each verdict is decided, draw by draw of the low-noise timestep.

    Without `conformal` nothing that is left out could have changed a verdict: the alignment lies in [−1, 1].
    """
    noise = BATCH[engine.backend.precision]
    norm = engine.norm(states)
    known = np.zeros_like(norm)
    passes = np.full(len(norm), engine.draws)
    done = np.zeros(len(norm), dtype=np.int64)
    lowest, highest = alignment_bounds(known, 0, engine.draws, conformal)
    open_ = np.arange(len(norm))
    for draw in range(engine.draws):
        undecided = decide(calibration, norm[open_], lowest[open_], highest[open_], noise)[1] & (norm[open_] > 0)
        open_ = open_[undecided]
        if not len(open_):
            break
        known[open_] += engine.alignments(states, open_, draw, calibration.alignment, calibration.operands)
        done[open_] += 1
        lowest[open_], highest[open_] = alignment_bounds(known[open_], draw + 1, engine.draws, conformal)
    low, high = score_bounds(calibration, norm, lowest, highest)
    # The empty prompt's Δ is 0, so all of it is known.
    whole = (done == engine.draws) | (norm == 0)
    low, high = np.where(norm == 0, 0.0, low), np.where(norm == 0, 0.0, high)
    rest = alignment_bounds(known, done, engine.draws, None)
    proven = whole | ~decide(calibration, norm, *rest, noise)[1]
    return Outcome(norm, np.where(whole, known / engine.draws, np.nan), low, high, passes + done, proven)
