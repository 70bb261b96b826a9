"""Verdicts in words: what is known of each prompt, and why that is enough."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from memedge.early import Outcome
from memedge.engine.manifest import Calibration, Manifest, Preset
from memedge.results import Verdict


def make_verdicts(
    prompts: Sequence[str],
    truncated: npt.NDArray[np.bool_],
    outcome: Outcome,
    manifest: Manifest,
    key: str,
) -> list[Verdict]:
    """Return a verdict per prompt; without a calibration for `key` it is open, and there may be a score or not."""
    calibration = manifest.calibrations.get(key)
    verdicts = []
    for row, prompt in enumerate(prompts):
        norm, alignment = float(outcome.norm[row]), float(outcome.alignment[row])
        whole = not math.isnan(alignment)
        memorized = threshold = None
        score = float(outcome.lowest[row]) if whole and (calibration or manifest.preset) else None
        if calibration is None:
            reason = _missing(key, manifest.preset)
        else:
            threshold = calibration.threshold
            memorized = norm > 0 and float(outcome.lowest[row]) >= threshold
            reason = _reason(outcome, row, calibration, whole)
        verdicts.append(
            Verdict(
                prompt=prompt,
                memorized=memorized,
                score=score,
                norm=norm,
                alignment=alignment if whole else None,
                threshold=threshold,
                truncated=bool(truncated[row]),
                passes=int(outcome.passes[row]),
                reason=reason,
            )
        )
    return verdicts


def _missing(key: str, preset: Preset | None) -> str:
    """Say why there is no verdict."""
    if preset is None:
        known = "only norm and alignment"
    else:
        known = f"the score is by the γ of {preset.family}, published, not fitted here"
    return f"no calibration for {key}, so no verdict ({known}): run `memedge calibrate`"


def _reason(outcome: Outcome, row: int, calibration: Calibration, whole: bool) -> str:
    """Say why the score, which lies between the outcome's bounds, makes the verdict what it is."""
    low, high = outcome.lowest[row], outcome.highest[row]
    threshold = f"threshold {calibration.threshold:.4g}"
    if outcome.norm[row] == 0:
        return "the empty prompt has no guidance"
    if whole:
        return f"score {low:.4g} {'≥' if low >= calibration.threshold else '<'} {threshold}"
    bound = f"at least {low:.4g} ≥" if low >= calibration.threshold else f"at most {high:.4g} <"
    if outcome.proven[row] or calibration.conformal is None:
        return f"score {bound} {threshold}, whatever the rest"
    return f"score {bound} {threshold}, but for a share ε = {calibration.conformal.epsilon:.2g} of prompts"
