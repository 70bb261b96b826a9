"""Verdicts with the fewest passes: the noisy timestep first, the other one only for prompts that are still open."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from memedge.decision.rule import Rule
from memedge.engine.arrays import Bools, Floats, Indices
from memedge.engine.engine import Engine, States
from memedge.engine.errors import InputError
from memedge.engine.precision import BATCH_NOISE, Tolerance

Early = Literal["proven", "conformal", "screen", "off"]


@dataclass(frozen=True)
class Outcome:
    """What is known of B prompts after the passes they took.

    Attributes:
        norm: float64 [B]; NaN if it was not computed.
        alignment: float64 [B]; NaN if passes were left out.
        lowest, highest: float64 [B], bounds of the score; equal if it is known: if nothing was left out, or nothing
            that it is made of.
        passes: int64 [B], conditional UNet evaluations; float64, with parts of one, after a screen.
        proven: bool [B], whether no result of the passes that were left out could change the verdict.
        readout: float64 [B], the screen's; None without one. What it passed has no norm (NaN) and no bounds (±∞).
    """

    norm: Floats
    alignment: Floats
    lowest: Floats
    highest: Floats
    passes: npt.NDArray[np.int64] | Floats
    proven: Bools
    readout: Floats | None = None

    @staticmethod
    def whole(rule: Rule, norm: Floats, alignment: Floats, passes: int) -> "Outcome":
        """Return the outcome of computing everything."""
        low, high = rule.bounds(norm, alignment, alignment)
        count = len(norm)
        return Outcome(norm, alignment, low, high, np.full(count, passes), np.ones(count, dtype=bool))


def check_early(rule: Rule, early: str, engine: Path, key: str) -> None:
    """Raise InputError unless passes can be left out in this way.

    Args:
        rule: of what runs.
        early: the way, one of Early.
        engine: its path, for messages.
        key: what runs it, likewise.
    """
    if early not in get_args(Early):
        raise InputError(f"There is no early={early!r}: use 'proven', 'conformal', 'screen' or 'off'.")
    if early == "conformal" and rule.conformal is None:
        raise InputError(
            f"{engine} stores no conformal interval for {key}: calibrate it with at least 99 prompts, or use "
            "early='proven'."
        )
    if early == "screen" and rule.screen is not None and not rule.screens:
        raise InputError(
            "The screen holds for the calibrated threshold: leave threshold and target_fpr out, or use "
            "early='conformal'."
        )
    if early == "screen" and not rule.screens:
        why = f" ({rule.no_screen.rstrip('.')})" if rule.no_screen else ""
        raise InputError(
            f"{engine} stores no screen for {key}{why}: run `memedge calibrate`, or use early='conformal'."
        )


class Passes:
    """B prompts on their way through the passes: the noisy timestep is known, the other one comes draw by draw.

    Without a conformal interval in the rule, no pass that is left out could have changed a verdict, because the
    alignment lies in [−1, 1].

    Attributes:
        open: indices of the prompts whose verdicts need another pass.
        draw: the draw of that pass, at the low-noise timestep.
    """

    def __init__(self, rule: Rule, norm: Floats, draws: int, noise: Tolerance):
        """Take the norms, float64 [B], over all `draws`; `noise` is what another batch's rounding may change."""
        self._rule, self._norm, self._draws, self._noise = rule, norm, draws, noise
        self._known = np.zeros_like(norm)
        self._done = np.zeros(len(norm), dtype=np.int64)
        self._lowest, self._highest = rule.alignment_bounds(self._known, 0, draws)
        self.draw = 0
        self.open = self._still_open(np.arange(len(norm)))

    def add(self, alignments: Floats) -> Indices:
        """Take the alignments of the open prompts on `draw`; return which prompts are not open any more."""
        before = self.open
        self._known[before] += alignments
        self._done[before] += 1
        self.draw += 1
        bounds = self._rule.alignment_bounds(self._known[before], self.draw, self._draws)
        self._lowest[before], self._highest[before] = bounds
        self.open = self._still_open(before) if self.draw < self._draws else before[:0]
        return np.setdiff1d(before, self.open)

    def outcome(self, prompts: Indices) -> Outcome:
        """Return what is known of some prompts."""
        rule, draws = self._rule, self._draws
        norm, known, done = self._norm[prompts], self._known[prompts], self._done[prompts]
        low, high = rule.bounds(norm, self._lowest[prompts], self._highest[prompts])
        # The empty prompt's Δ is 0, so all of it is known.
        whole = (done == draws) | (norm == 0)
        low, high = np.where(norm == 0, 0.0, low), np.where(norm == 0, 0.0, high)
        rest = rule.without_conformal().alignment_bounds(known, done, draws)
        proven = whole | ~rule.decide(norm, *rest, self._noise)[1]
        return Outcome(norm, np.where(whole, known / draws, np.nan), low, high, draws + done, proven)

    def _still_open(self, prompts: Indices) -> Indices:
        bounds = self._lowest[prompts], self._highest[prompts]
        return prompts[self._rule.decide(self._norm[prompts], *bounds, self._noise)[1]]


def decide_early(engine: Engine, rule: Rule, states: States) -> Outcome:
    """Run prompts until each verdict is decided, draw by draw of the low-noise timestep."""
    norm = engine.norm(states)
    passes = Passes(rule, norm, engine.draws, BATCH_NOISE[engine.backend.precision])
    while len(passes.open):
        passes.add(engine.alignments(states, passes.open, passes.draw, rule.alignment, rule.operands))
    return passes.outcome(np.arange(len(norm)))
