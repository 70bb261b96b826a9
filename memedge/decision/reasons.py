"""Verdicts in words: what is known of each prompt, and why that is enough. Python's log has them at INFO."""

import logging
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from memedge.decision.early import Outcome
from memedge.decision.rule import Rule
from memedge.results import Verdict

LOG = logging.getLogger("memedge")
SAID = {True: "memorized", False: "ok", None: "no verdict"}


def make_verdicts(
    prompts: Sequence[str], truncated: npt.NDArray[np.bool_], outcome: Outcome, rule: Rule, key: str
) -> list[Verdict]:
    """Return a verdict per prompt. Without a threshold it is open; without weights there is no score either.

    Args:
        prompts, truncated: B prompts, and which were cut.
        outcome: what is known of them.
        rule: the rule for what runs.
        key: what runs, for the words.
    """
    memorized = rule.memorized(outcome.norm, outcome.lowest)
    verdicts = []
    for row, prompt in enumerate(prompts):
        norm, alignment = float(outcome.norm[row]), float(outcome.alignment[row])
        known = bool(outcome.lowest[row] == outcome.highest[row])  # of the norm alone, it is after the first passes
        verdicts.append(
            Verdict(
                prompt=prompt,
                memorized=None if memorized is None else bool(memorized[row]),
                score=float(outcome.lowest[row]) if known and rule.fitted else None,
                norm=None if math.isnan(norm) else norm,
                alignment=None if math.isnan(alignment) else alignment,
                threshold=rule.threshold,
                truncated=bool(truncated[row]),
                passes=outcome.passes[row].item(),
                reason=_reason(outcome, row, rule, key),
                operating_point=rule.operating_point,
            )
        )
    return verdicts


def log(verdicts: Iterable[Verdict], key: str) -> None:
    """Log verdicts, without the prompts, which are the user's."""
    if LOG.isEnabledFor(logging.INFO):
        for one in verdicts:
            LOG.info("%s: %s (%s, passes: %.4g)", SAID[one.memorized], one.reason, key, one.passes)


def threshold_in_words(rule: Rule) -> str:
    """Return the threshold, and where it comes from if it is not the calibrated one."""
    return f"threshold {rule.threshold:.4g}{_origin(rule)}"


def rule_in_words(rule: Rule) -> str:
    """Return how norm and alignment make a score, where its weights come from, and what is memorized by it."""
    at = "" if rule.threshold is None else f"; memorized from {rule.threshold:.6g} on{_origin(rule)}"
    return f"{rule.formula}, γ {rule.source}{at}"


def _origin(rule: Rule) -> str:
    return {"": "", "calibrated": "", "threshold": ", as given"}.get(
        rule.operating_point, f" for {rule.operating_point}"
    )


def _reason(outcome: Outcome, row: int, rule: Rule, key: str) -> str:
    """Say why the score, which lies between the outcome's bounds, makes the verdict what it is."""
    if rule.threshold is None:
        known = "only norm and alignment"
        if rule.fitted:
            known = f"the score is by the γ of {rule.family}, published, not fitted here"
        return f"no calibration for {key}, so no verdict ({known}): run `memedge calibrate`"
    low, high = outcome.lowest[row], outcome.highest[row]
    threshold = threshold_in_words(rule)
    if rule.screen is not None and outcome.readout is not None and math.isnan(outcome.norm[row]):
        return (
            f"screened: read-out {outcome.readout[row]:.4g} < cut {rule.screen.cut:.4g}, as of a share "
            f"α = {rule.screen.alpha:.2g} of memorized prompts at most"
        )
    if outcome.norm[row] == 0:
        return "the empty prompt has no guidance"
    if low == high:
        return f"score {low:.4g} {'≥' if low >= rule.threshold else '<'} {threshold}"
    bound = f"at least {low:.4g} ≥" if low >= rule.threshold else f"at most {high:.4g} <"
    if outcome.proven[row] or rule.conformal is None:
        return f"score {bound} {threshold}, whatever the rest"
    return f"score {bound} {threshold}, but for a share δ = {rule.conformal.delta:.2g} of prompts"
