"""What embeddings are changed for: a loss, measured by the forward engine, and the target that it comes down to."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from memedge.decision import score_bounds
from memedge.detector import DEFAULT_ALIGNMENT, DEFAULT_OPERANDS
from memedge.engine.errors import InputError
from memedge.engine.manifest import Alignment, Operands
from memedge.engine.passes import Engine
from memedge.plot import counted

Loss = Literal["score", "norm"]
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """One prompt's embeddings, [K, D], after some steps: their norm, their loss, and whether it is at the target."""

    states: Array
    steps: int
    norm: float
    loss: float
    reached: bool


class Goal:
    """A loss and its target, for one engine.

    Attributes:
        target: what was given, or the calibration's clean_score: what half of the clean prompts do not exceed.
        calibration: for what runs, or None.
        weights: of norm and alignment in the loss.
        rows: how many conditional UNet evaluations one of the loss takes.
    """

    def __init__(self, engine: Engine, loss: Loss, target: float | None):
        """Take the calibration for what runs.

        Raises:
            InputError: an unknown loss; no γ or no target where one is needed; a target that cannot be.
        """
        if loss not in get_args(Loss):
            raise InputError(f"There is no loss={loss!r}: use 'score' or 'norm'.")
        if target is not None and not math.isfinite(target):
            raise InputError(f"target is {target}: give a finite number.")
        self._engine, self._is_norm = engine, loss == "norm"
        path, manifest, self._key = engine.directory.path, engine.directory.manifest, engine.backend.key
        self.calibration = manifest.calibrations.get(self._key)
        self._gamma = self.calibration or manifest.preset
        self._cosine: tuple[Alignment, Operands] = DEFAULT_ALIGNMENT, DEFAULT_OPERANDS
        if self.calibration:
            self._cosine = self.calibration.alignment, self.calibration.operands
        if self._is_norm:
            if target is None:
                raise InputError("loss='norm' has no target of its own: give one, or use loss='score'.")
            self.rows, self.weights, self.target = engine.draws, (1.0, 0.0), target
            return
        if self._gamma is None:
            raise InputError(
                f"{path} is not calibrated for {self._key}, so there is no score to lower: run `memedge calibrate`, or "
                "use loss='norm' with a target."
            )
        if self._cosine != (DEFAULT_ALIGNMENT, DEFAULT_OPERANDS):
            raise InputError(
                f"{path} is calibrated for another alignment than {DEFAULT_ALIGNMENT!r} of {DEFAULT_OPERANDS!r}, which "
                "alone has derivatives: use loss='norm' with a target."
            )
        self.rows, self.weights = engine.passes, (self._gamma.gamma_norm, self._gamma.gamma_alignment)
        if target is None:
            if self.calibration is None or self.calibration.clean_score is None:
                raise InputError(
                    f"{path} holds no score of clean prompts for {self._key} to come down to: run `memedge calibrate`, "
                    "or give a target."
                )
            target = self.calibration.clean_score
        self.target = target

    def measure(self, states: Array, steps: int) -> Measured:
        """Return the loss of embeddings [K, D], by a forward pass of the engine."""
        embedded = self._engine.embed(states[None])
        if self._is_norm:
            (norm,) = self._engine.norm(embedded)
            return Measured(states, steps, float(norm), float(norm), bool(norm <= self.target))
        norms, aligned = self._engine.statistics(embedded, *self._cosine)
        assert self._gamma is not None
        score = float(score_bounds(self._gamma, norms, aligned, aligned)[0][0])
        reached = score <= self.target
        return Measured(states, steps, float(norms[0]), score, bool(reached))

    def verdict(self, measured: Measured) -> tuple[float | None, bool | None, int]:
        """Return the score, whether it is that of a memorized prompt, and how many passes it took to know."""
        if self._gamma is None:
            return None, None, 0
        score, passes = measured.loss, 0
        if self._is_norm:
            norms, aligned = self._engine.statistics(self._engine.embed(measured.states[None]), *self._cosine)
            score, passes = float(score_bounds(self._gamma, norms, aligned, aligned)[0][0]), self._engine.passes
        if self.calibration is None:
            return score, None, passes
        return score, measured.norm > 0 and score >= self.calibration.threshold, passes

    def reason(self, before: Measured, after: Measured, steps: int, memorized: bool | None) -> str:
        """Say what came of `steps` steps."""
        still = "; the score is still that of a memorized prompt" if memorized and after.reached else ""
        name = "norm" if self._is_norm else "score"
        target = f"target {self.target:.4g}"
        if before.norm == 0:
            return "the empty prompt has no guidance, and nothing to lower"
        if before.reached:
            return f"{name} {before.loss:.4g} ≤ {target} without a change{still}"
        if after.reached:
            return f"{name} {before.loss:.4g} → {after.loss:.4g} ≤ {target}, in {counted(after.steps, 'step')}{still}"
        found = f"the lowest of {counted(steps, 'step')}, which began at {before.loss:.4g}"
        return f"{name} {after.loss:.4g} does not come down to {target} ({found}): allow more steps"
