"""Other thresholds than the calibrated one: a given one, or that of another false-positive rate. No engine changes."""

import math
from dataclasses import replace
from numbers import Real

import numpy as np

from memedge.decision.rule import Rule
from memedge.engine.arrays import Floats
from memedge.engine.errors import InputError
from memedge.engine.manifest import Calibration


def operating_at(
    rule: Rule, calibration: Calibration | None, threshold: float | None, target_fpr: float | None, what: str
) -> Rule:
    """Return a rule with another threshold, or itself if neither is given.

    Args:
        rule: of what runs.
        calibration: that of what runs, or None.
        threshold: from which score on a prompt is memorized.
        target_fpr: at most this share of the calibration's clean prompts reaches the threshold.
        what: the engine and what runs it, for messages, such as "my-engine for cpu-fp32".

    Raises:
        InputError: both are given, or one that cannot be; there are no scores; the calibration keeps no clean scores,
            or too few for the rate.
    """
    if threshold is not None and target_fpr is not None:
        raise InputError("Both threshold and target_fpr were given, and each sets the threshold: give one of them.")
    if threshold is not None:
        if not _is_number(threshold) or not math.isfinite(threshold):
            raise InputError(f"threshold is {threshold!r}: give a finite number.")
        if not rule.fitted:
            raise InputError(
                f"There is no calibration of {what}, so there is no score that a threshold is for: run `memedge "
                "calibrate`."
            )
        return replace(rule, threshold=float(threshold), operating_point="threshold")
    if target_fpr is not None:
        if not _is_number(target_fpr) or not 0 < target_fpr < 1:
            raise InputError(f"target_fpr is {target_fpr!r}: give a rate between 0 and 1.")
        if calibration is None:
            raise InputError(
                f"There is no calibration of {what}, so there are no clean scores that target_fpr could be met on: run "
                "`memedge calibrate`."
            )
        point = f"target_fpr={target_fpr:g}"
        return replace(rule, threshold=_threshold_for(calibration, float(target_fpr), what), operating_point=point)
    return rule


def allowed(clean: int, target_fpr: float) -> int:
    """Return how many of the clean scores may reach the threshold: the most whose share is at most the target."""
    near = int(clean * target_fpr)  # but for rounding: 0.29 · 100 is 28.999…
    return max(count for count in (near - 1, near, near + 1) if count / clean <= target_fpr)


def middle_of_gap(below: float, scores: Floats) -> float:
    """Return the middle between a score that must stay below the threshold and the next one above, or just above it."""
    above = scores[scores > below]
    just_above = np.nextafter(below, np.inf)
    if not len(above):
        return float(just_above)
    return float(max(below + (above.min() - below) / 2, just_above))


def _threshold_for(calibration: Calibration, target_fpr: float, what: str) -> float:
    """Return the threshold for a rate; it is the calibrated one where as many clean prompts may reach either."""
    prompts = calibration.clean.prompts
    if calibration.clean_scores is None:
        raise InputError(
            f"The calibration of {what} keeps no clean scores that target_fpr could be met on, as it was made before "
            "they were kept: give a threshold, or run `memedge calibrate` again."
        )
    if target_fpr < 1 / (prompts + 1):
        raise InputError(
            f"target_fpr={target_fpr:g} cannot be met by {prompts} clean prompts, which tell rates from "
            f"{math.ceil(1e6 / (prompts + 1)) / 1e6:g} on apart: give a larger rate, or run `memedge calibrate` with "
            f"{math.ceil(1 / target_fpr)} of them."
        )
    count = allowed(prompts, target_fpr)
    if count == allowed(prompts, calibration.target_fpr):
        return calibration.threshold
    scores = np.array(calibration.clean_scores)
    if count >= len(scores):
        raise InputError(
            f"target_fpr={target_fpr:g} is above what the {len(scores)} highest of {prompts} clean scores tell, which "
            f"is all that the calibration of {what} keeps: give at most {(len(scores) - 1) / prompts:g}, or a "
            "threshold."
        )
    return middle_of_gap(float(scores[count]), scores)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
