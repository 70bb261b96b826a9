"""Verdicts that would hang on rounding: a prompt whose score is too near the threshold is evaluated alone."""

from collections.abc import Callable

import numpy as np

from memedge.decision.early import Outcome
from memedge.decision.rule import Rule
from memedge.engine.arrays import Floats, Indices
from memedge.engine.engine import Engine, States
from memedge.engine.precision import BATCH_NOISE

Alone = Callable[[int], States]  # encodes one prompt of a batch again, by itself


def settle(engine: Engine, rule: Rule, alone: Alone, rows: Indices, norm: Floats, aligned: Floats) -> Indices:
    """Evaluate each prompt alone whose score is too near the threshold, in place; return which of `rows` they are.

    A prompt that is evaluated alone has the same shapes whatever its batch was. Its verdict is the same too.

    Args:
        rows: K prompts of the batch; norm and aligned, float64 [K] each, are theirs.
    """
    near = np.flatnonzero(rule.decide(norm, aligned, aligned, BATCH_NOISE[engine.backend.precision])[1])
    for place in near:
        one = engine.statistics(alone(rows[place]), rule.alignment, rule.operands)
        norm[place], aligned[place] = one[0][0], one[1][0]
    return rows[near]


def settle_outcome(engine: Engine, rule: Rule, alone: Alone, outcome: Outcome) -> None:
    """Do that, in place, with the prompts of an outcome of which all is known."""
    whole = np.flatnonzero(~np.isnan(outcome.alignment))
    if not len(whole):
        return
    norm, aligned = outcome.norm[whole], outcome.alignment[whole]
    settled = settle(engine, rule, alone, whole, norm, aligned)
    outcome.norm[whole], outcome.alignment[whole] = norm, aligned
    outcome.passes[settled] += engine.passes
    outcome.lowest[whole], outcome.highest[whole] = rule.bounds(norm, aligned, aligned)
