"""Verdicts with the fewest passes: the noisy timestep first, the other one only for prompts that are still open."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memedge.decision.rule import Rule
from memedge.engine.arrays import Bools, Floats
from memedge.engine.engine import Engine, States
from memedge.engine.precision import BATCH_NOISE


@dataclass(frozen=True)
class Outcome:
    """What is known of B prompts after the passes they took.

    Attributes:
        norm: float64 [B].
        alignment: float64 [B]; NaN if passes were left out.
        lowest, highest: float64 [B], bounds of the score; equal if nothing was left out.
        passes: int64 [B], conditional UNet evaluations.
        proven: bool [B], whether no result of the passes that were left out could change the verdict.
    """

    norm: Floats
    alignment: Floats
    lowest: Floats
    highest: Floats
    passes: npt.NDArray[np.int64]
    proven: Bools

    @staticmethod
    def whole(rule: Rule, norm: Floats, alignment: Floats, passes: int) -> "Outcome":
        """Return the outcome of computing everything."""
        low, high = rule.bounds(norm, alignment, alignment)
        count = len(norm)
        return Outcome(norm, alignment, low, high, np.full(count, passes), np.ones(count, dtype=bool))


def decide_early(engine: Engine, rule: Rule, states: States) -> Outcome:
    """Run prompts until each verdict is decided, draw by draw of the low-noise timestep.

    Without a conformal interval in the rule, no pass that is left out could have changed a verdict, because the
    alignment lies in [−1, 1].
    """
    noise = BATCH_NOISE[engine.backend.precision]
    norm = engine.norm(states)
    known = np.zeros_like(norm)
    passes = np.full(len(norm), engine.draws)
    done = np.zeros(len(norm), dtype=np.int64)
    lowest, highest = rule.alignment_bounds(known, 0, engine.draws)
    open_ = np.arange(len(norm))
    for draw in range(engine.draws):
        open_ = open_[rule.decide(norm[open_], lowest[open_], highest[open_], noise)[1]]
        if not len(open_):
            break
        known[open_] += engine.alignments(states, open_, draw, rule.alignment, rule.operands)
        done[open_] += 1
        lowest[open_], highest[open_] = rule.alignment_bounds(known[open_], draw + 1, engine.draws)
    low, high = rule.bounds(norm, lowest, highest)
    # The empty prompt's Δ is 0, so all of it is known.
    whole = (done == engine.draws) | (norm == 0)
    low, high = np.where(norm == 0, 0.0, low), np.where(norm == 0, 0.0, high)
    rest = rule.without_conformal().alignment_bounds(known, done, engine.draws)
    proven = whole | ~rule.decide(norm, *rest, noise)[1]
    return Outcome(norm, np.where(whole, known / engine.draws, np.nan), low, high, passes + done, proven)
