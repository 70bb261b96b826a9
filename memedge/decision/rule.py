"""The rule: how norm and alignment make a score, and from which score on a prompt is memorized (docs/methods.md §1)."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from memedge.engine.arrays import Bools, Floats
from memedge.engine.manifest import Alignment, Calibration, Conformal, Manifest, Operands, Screen
from memedge.engine.precision import Tolerance
from memedge.engine.reduction import check_options

DEFAULT_ALIGNMENT: Alignment = "channel"
DEFAULT_OPERANDS: Operands = "uncond_delta"
NO_SCREEN_PLANS = "The plans here hold none of the screen's graphs: run `memedge build` again."


@dataclass(frozen=True)
class Rule:
    """score = γ_norm · norm + γ_alignment · alignment; memorized if score ≥ threshold and norm > 0.

    Attributes:
        gamma_norm, gamma_alignment: the weights.
        alignment, operands: the cosine that the weights are for.
        source: where the weights come from. "calibrated": fitted to this engine. "published": of the paper, for this
            family of models; scores order prompts, and there are no verdicts. "not fitted": (1, 1), with which no
            score is given.
        family: the family of models of published weights.
        threshold: the calibrated threshold or that of another operating point, or None: then there are no verdicts.
        operating_point: where the threshold comes from. "calibrated": the engine; "threshold": it was given;
            "target_fpr=R": the calibration's clean scores, for that rate; "": there is none.
        conformal: where the alignment of prompts like the calibration's lies, or None.
        clean_score: the median score of the clean prompts of the calibration, or None.
        screen: what passes prompts by their first effects on the UNet, or None. It belongs to the calibrated threshold.
        no_screen: why there is none, in a sentence, if that is known.
    """

    gamma_norm: float = 1.0
    gamma_alignment: float = 1.0
    alignment: Alignment = DEFAULT_ALIGNMENT
    operands: Operands = DEFAULT_OPERANDS
    source: Literal["calibrated", "published", "not fitted"] = "not fitted"
    family: str = ""
    threshold: float | None = None
    operating_point: str = ""
    conformal: Conformal | None = None
    clean_score: float | None = None
    screen: Screen | None = None
    no_screen: str = ""

    @staticmethod
    def of(manifest: Manifest, key: str) -> "Rule":
        """Return an engine's rule for what runs.

        Args:
            manifest: the engine's.
            key: what calibrations are keyed by, "<provider>-<precision>".
        """
        if found := manifest.calibrations.get(key):
            return Rule.calibrated(found)
        if preset := manifest.preset:
            return Rule(preset.gamma_norm, preset.gamma_alignment, source="published", family=preset.family)
        return Rule()

    @staticmethod
    def calibrated(calibration: Calibration) -> "Rule":
        """Return the rule that a calibration fitted."""
        return Rule(
            gamma_norm=calibration.gamma_norm,
            gamma_alignment=calibration.gamma_alignment,
            alignment=calibration.alignment,
            operands=calibration.operands,
            source="calibrated",
            threshold=calibration.threshold,
            operating_point="calibrated",
            conformal=calibration.conformal,
            clean_score=calibration.clean_score,
            screen=calibration.screen,
            no_screen=calibration.no_screen,
        )

    def measuring(self, alignment: Alignment | None, operands: Operands | None) -> "Rule":
        """Return the rule for another cosine: this one if the cosine is its own, else one that is not fitted.

        Args:
            alignment: over what the cosine is taken; None stands for this rule's.
            operands: the cosine's pair; None stands for this rule's.

        Raises:
            InputError: there is no such alignment or there are no such operands.
        """
        alignment, operands = alignment or self.alignment, operands or self.operands
        check_options(alignment, operands)
        if (alignment, operands) == (self.alignment, self.operands):
            return self
        return Rule(alignment=alignment, operands=operands)

    def without_conformal(self) -> "Rule":
        """Return the same rule, of which only what is proven is used."""
        return replace(self, conformal=None)

    def without_screen(self, reason: str) -> "Rule":
        """Return the same rule without its screen, for a reason in a sentence."""
        return replace(self, screen=None, no_screen=reason)

    @property
    def screens(self) -> bool:
        """Whether it has a screen, which holds for the calibrated threshold alone."""
        return self.screen is not None and self.operating_point == "calibrated"

    @property
    def fitted(self) -> bool:
        """Whether there are scores: the weights are calibrated or published."""
        return self.source != "not fitted"

    @property
    def formula(self) -> str:
        """The score in words, such as "2 · norm − 6.1 · alignment", or "1 · norm"."""
        if self.gamma_alignment == 0:
            return f"{self.gamma_norm:.4g} · norm"
        sign = "−" if self.gamma_alignment < 0 else "+"
        return f"{self.gamma_norm:.4g} · norm {sign} {abs(self.gamma_alignment):.4g} · alignment"

    def score(self, norm: Floats, alignment: Floats) -> Floats:
        """Return the score, float64 [B], of norm and alignment, float64 [B] each."""
        return self.bounds(norm, alignment, alignment)[0]

    def bounds(self, norm: Floats, lowest: Floats, highest: Floats) -> tuple[Floats, Floats]:
        """Return the least and the greatest score, float64 [B] each, with the alignment in [lowest, highest]."""
        base = self.gamma_norm * norm
        ends = self.gamma_alignment * lowest, self.gamma_alignment * highest
        return base + np.minimum(*ends), base + np.maximum(*ends)

    def memorized(self, norm: Floats, score: Floats) -> Bools | None:
        """Return which prompts are memorized, bool [B], or None without a threshold."""
        if self.threshold is None:
            return None
        memorized: Bools = (score >= self.threshold) & _has_guidance(norm)
        return memorized

    def decide(self, norm: Floats, lowest: Floats, highest: Floats, noise: Tolerance) -> tuple[Bools, Bools]:
        """Return which prompts are memorized and which are still open, bool [B] each; the others are not memorized.

        A verdict is given where both bounds of the score are on one side of the threshold by more than `noise` can move
        a score: the floating-point difference between two evaluations of one prompt in batches of different shapes.

        Args:
            norm: float64 [B].
            lowest: float64 [B], the least that the alignment can be.
            highest: float64 [B], the greatest that it can be: the least where the alignment is known.
            noise: of the norm, relative, and of the alignment, absolute (engine/precision.py).
        """
        if self.threshold is None:
            nothing = np.zeros(len(norm), dtype=np.bool_)
            return nothing, nothing.copy()
        low, high = self.bounds(norm, lowest, highest)
        margin = abs(self.gamma_norm) * norm * noise.norm + abs(self.gamma_alignment) * noise.alignment
        guided = _has_guidance(norm)
        memorized = (low >= self.threshold + margin) & guided
        clean = (high < self.threshold - margin) | ~guided
        return memorized, ~(memorized | clean)

    def alignment_bounds(self, known: Floats, done: int | npt.NDArray[np.int64], draws: int) -> tuple[Floats, Floats]:
        """Return where the mean alignment over `draws` lies, given the sum over the first `done` of them; float64 [B].

        A draw that was not computed lies in [−1, 1]. With a conformal interval the mean also lies in that, but for a
        share δ of prompts. Where what is known already contradicts the interval, only what is proven is used.
        """
        rest = draws - done
        lowest, highest = (known - rest) / draws, (known + rest) / draws
        if self.conformal is None:
            return lowest, highest
        narrow = np.maximum(lowest, self.conformal.lowest), np.minimum(highest, self.conformal.highest)
        possible = (narrow[0] <= narrow[1]) & (rest > 0)
        return np.where(possible, narrow[0], lowest), np.where(possible, narrow[1], highest)


def _has_guidance(norm: Floats) -> Bools:
    """Return where Δ is not 0. It is 0 for the empty prompt alone, which is never memorized, whatever the threshold."""
    guided: Bools = norm > 0
    return guided
