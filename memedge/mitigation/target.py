"""What embeddings are changed for: a loss, measured by the forward engine, and the target that it comes down to."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from memedge.decision.rule import DEFAULT_ALIGNMENT, Rule
from memedge.engine.arrays import Floats, Singles
from memedge.engine.engine import Engine
from memedge.engine.errors import InputError
from memedge.engine.gradients import DIFFERENTIABLE
from memedge.wording import counted

Loss = Literal["score", "norm"]


@dataclass(frozen=True)
class Iterate:
    """One prompt's embeddings, [K, D], after some steps: their norm, their loss, and whether it is at the target."""

    states: Singles
    steps: int
    norm: float
    loss: float
    reached: bool


class Target:
    """A loss and the value it is to come down to, for one engine.

    Attributes:
        value: what was given, or the calibration's clean_score: what half of the clean prompts do not exceed.
        rule: the rule for what runs.
        weights: of norm and alignment in the loss.
        rows: how many conditional UNet evaluations one of the loss takes.
    """

    def __init__(self, engine: Engine, loss: Loss, value: float | None):
        """Take the rule for what runs.

        Raises:
            InputError: an unknown loss; no γ or no target where one is needed; a target that cannot be.
        """
        if loss not in get_args(Loss):
            raise InputError(f"There is no loss={loss!r}: use 'score' or 'norm'.")
        if value is not None and not math.isfinite(value):
            raise InputError(f"target is {value}: give a finite number.")
        self._engine, self._is_norm = engine, loss == "norm"
        path, key = engine.directory.path, engine.backend.key
        self.rule = rule = Rule.of(engine.directory.manifest, key)
        if self._is_norm:
            if value is None:
                raise InputError("loss='norm' has no target of its own: give one, or use loss='score'.")
            self.rows, self.weights, self.value = engine.draws, (1.0, 0.0), value
            return
        if not rule.fitted:
            raise InputError(
                f"{path} is not calibrated for {key}, so there is no score to lower: run `memedge calibrate`, or "
                "use loss='norm' with a target."
            )
        if rule.alignment != DEFAULT_ALIGNMENT or rule.operands not in DIFFERENTIABLE:
            raise InputError(
                f"{path} is calibrated for another alignment than {DEFAULT_ALIGNMENT!r} of "
                f"{' or '.join(DIFFERENTIABLE)}, which alone have derivatives: use loss='norm' with a target."
            )
        self.rows = engine.passes if rule.gamma_alignment else engine.draws
        self.weights = rule.gamma_norm, rule.gamma_alignment
        if value is None:
            if rule.clean_score is None:
                raise InputError(
                    f"{path} holds no score of clean prompts for {key} to come down to: run `memedge calibrate`, "
                    "or give a target."
                )
            value = rule.clean_score
        self.value = value

    def measure(self, states: Singles, steps: int) -> Iterate:
        """Return the loss of embeddings [K, D], by a forward pass of the engine."""
        if self._is_norm:
            norm = loss = self._engine.norm(self._engine.embed(states[None]))
        else:
            norm, loss = self._score(states)
        # The empty prompt has no guidance: nothing to lower, however low the target.
        reached = bool(loss[0] <= self.value or norm[0] == 0)
        return Iterate(states, steps, float(norm[0]), float(loss[0]), reached)

    def verdict(self, iterate: Iterate) -> tuple[float | None, bool | None, int]:
        """Return the score, whether it is that of a memorized prompt, and how many passes it took to know."""
        if not self.rule.fitted:
            return None, None, 0
        norm, score, passes = np.array([iterate.norm]), np.array([iterate.loss]), 0
        if self._is_norm and self.rule.gamma_alignment == 0:
            score = self.rule.gamma_norm * norm
        elif self._is_norm:
            (norm, score), passes = self._score(iterate.states), self._engine.passes
        memorized = self.rule.memorized(norm, score)
        return float(score[0]), None if memorized is None else bool(memorized[0]), passes

    def _score(self, states: Singles) -> tuple[Floats, Floats]:
        """Return norm and score, float64 [1] each, of embeddings [K, D]."""
        embedded = self._engine.embed(states[None])
        if self.rule.gamma_alignment == 0:
            norm = self._engine.norm(embedded)
            return norm, self.rule.gamma_norm * norm
        norm, aligned = self._engine.statistics(embedded, self.rule.alignment, self.rule.operands)
        return norm, self.rule.score(norm, aligned)

    def reason(self, before: Iterate, after: Iterate, steps: int, memorized: bool | None) -> str:
        """Say what came of `steps` steps."""
        still = "; the score is still that of a memorized prompt" if memorized and after.reached else ""
        name = "norm" if self._is_norm else "score"
        target = f"target {self.value:.4g}"
        if before.norm == 0:
            return "the empty prompt has no guidance, and nothing to lower"
        if before.reached:
            return f"{name} {before.loss:.4g} ≤ {target} without a change{still}"
        if after.reached:
            return f"{name} {before.loss:.4g} → {after.loss:.4g} ≤ {target}, in {counted(after.steps, 'step')}{still}"
        found = f"the lowest of {counted(steps, 'step')}, which began at {before.loss:.4g}"
        return f"{name} {after.loss:.4g} does not come down to {target} ({found}): allow more steps"
