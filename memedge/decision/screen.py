"""The screen: prompts that are clean by their first effects on the UNet take no whole pass (docs/methods.md §5)."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from memedge.decision.early import Outcome, decide_early
from memedge.decision.rounding import Alone
from memedge.decision.rule import Rule
from memedge.engine.arrays import Bools, Floats, Indices
from memedge.engine.engine import Engine, States
from memedge.engine.precision import BATCH_NOISE

LEAST = 1e-3  # added to changes before the logarithm: a channel that nothing changes has one too


@dataclass(frozen=True)
class Screening:
    """What the screen says of B prompts.

    Attributes:
        readout: float64 [B].
        passed: bool [B], which are clean by it.
        passes: float64 [B], the work so far, in conditional UNet evaluations.
    """

    readout: Floats
    passed: Bools
    passes: Floats

    def outcome(self) -> Outcome:
        """Return the outcome of the passed prompts, of which nothing else is known."""
        count = int(self.passed.sum())
        unknown, infinite = np.full(count, np.nan), np.full(count, np.inf)
        proven = np.zeros(count, dtype=np.bool_)
        passes, readout = self.passes[self.passed], self.readout[self.passed]
        return Outcome(unknown, unknown.copy(), -infinite, infinite, passes, proven, readout)

    def of(self, prompts: Indices) -> "Screening":
        """Return what it says of some prompts."""
        return Screening(self.readout[prompts], self.passed[prompts], self.passes[prompts])

    def before(self, outcome: Outcome, prompts: Indices) -> Outcome:
        """Return the outcome of the passes that some prompts took after the screen, with the screen's part in it."""
        return replace(outcome, passes=outcome.passes + self.passes[prompts], readout=self.readout[prompts])


def features(changes: Floats) -> Floats:
    """Return what the read-out is linear in, of changes at a tap, float64 [B, C]: their logarithms."""
    found: Floats = np.log(changes + LEAST)
    return found


def screen(engine: Engine, rule: Rule, states: States, alone: Alone) -> Screening:
    """Screen a batch; a prompt whose read-out is too near the cut for its batch not to matter is screened alone.

    Args:
        engine: the engine.
        rule: one with a screen.
        states: of B prompts.
        alone: encodes one of them again, by itself.
    """
    found = rule.screen
    assert found is not None
    weights = np.array(found.weights)

    def read(some: States) -> Floats:
        return np.asarray(features(engine.changes(some, found.tap)) @ weights + found.intercept)

    readout = read(states)
    share = engine.draws * engine.directory.manifest.tap_share(found.tap)
    passes = np.full(len(readout), share)
    # What rounding may do to a norm, relative, it does to its logarithm, absolute.
    noise = BATCH_NOISE[engine.backend.precision].norm * float(np.abs(weights).sum())
    for row in np.flatnonzero(np.abs(readout - found.cut) <= noise):
        readout[row] = read(alone(int(row)))[0]
        passes[row] += share
    return Screening(readout, (readout < found.cut) & ~states.empty, passes)


def decide_screened(engine: Engine, rule: Rule, states: States, alone: Alone) -> Outcome:
    """Screen prompts, and run those that are not passed until each verdict is decided, as `decide_early`."""
    screening = screen(engine, rule, states, alone)
    passed, rest = np.flatnonzero(screening.passed), np.flatnonzero(~screening.passed)
    outcome = screening.outcome()
    if not len(rest):
        return outcome
    other = screening.before(decide_early(engine, rule, engine.select(states, rest)), rest)
    place = np.argsort(np.concatenate([passed, rest]))

    def column(name: str) -> Any:
        return np.concatenate([getattr(outcome, name), getattr(other, name)])[place]

    return Outcome(**{field.name: column(field.name) for field in fields(Outcome)})
