"""What a guarded pipeline returns: images, and what was found of each prompt and done about it."""

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

from memedge.engine.errors import InputError
from memedge.mitigation.mitigator import Mitigation
from memedge.monitor.verdicts import MonitorVerdict
from memedge.results import Scores

LOG = logging.getLogger("memedge")
Done = Literal["passed", "blocked", "mitigated", "steered", "flagged", "reseeded"]


@dataclass(frozen=True)
class GuardVerdict:
    """What the guard found of one prompt, and did.

    Attributes:
        prompt: the prompt; None if it was given as embeddings.
        action: "passed": not memorized; "blocked": its images are None; "mitigated": they are generated from other
            embeddings; "steered": by opposite guidance first; "flagged": as asked for; "reseeded": from other noise.
            With `monitor` it is what was done to the image that fared worst.
        score: its score, as it was given. None if the verdict needed less than all of it, or with `first_step` or
            `monitor`.
        norm: its norm; with `first_step` or `monitor` that of the pipeline's own first step, the mean over its images.
        threshold: that of scores; with `first_step` that of the norm, with `monitor` its calibration's cut.
        reason: why the verdict is what it is.
        mitigation: what was tried to mitigate it, with the loss before and after; None if nothing was. Its `score`,
            `threshold` and `memorized` are the guard's own, of the embeddings as the pipeline takes them; where the
            detector's provider computes no gradients, the loss is that of another one.
        images: with `monitor` its verdict on each of the prompt's images, of the last time that it was made; else ().
    """

    prompt: str | None
    action: Done
    score: float | None
    norm: float
    threshold: float | None
    reason: str
    mitigation: Mitigation | None = None
    images: tuple[MonitorVerdict, ...] = ()


@dataclass(frozen=True)
class GuardedOutput:
    """What a guarded pipeline returns.

    Attributes:
        images: as many as were asked for, each prompt's after those of the one before; PIL images, or arrays or
            tensors, by output_type. None in the place of each that is blocked.
        verdicts: one for each prompt.
        output: the pipeline's own output, in which whatever there is of blocked images is None too; None if all are.
    """

    images: list[Any]
    verdicts: list[GuardVerdict]
    output: Any

    @staticmethod
    def assemble(output: Any, verdicts: list[GuardVerdict], kept: list[bool]) -> "GuardedOutput":
        """Take a pipeline's output, and withhold the images that are not kept.

        Args:
            output: None if nothing was generated.
            verdicts: one for each prompt.
            kept: one for each image.
        """
        for verdict in verdicts:
            LOG.info("guard: %s: %s", verdict.action, verdict.reason)
        if output is None:
            return GuardedOutput([None] * len(kept), verdicts, None)
        if not all(kept):
            for name, values in list(output.items()):
                output[name] = [value if keep else None for value, keep in zip(values, kept, strict=True)]
        return GuardedOutput(list(output.images), verdicts, output)


def kept(verdicts: list[GuardVerdict], images: int) -> list[bool]:
    """Return whether each image is kept, where all `images` of a prompt are blocked with it, or none."""
    return [verdict.action != "blocked" for verdict in verdicts for _ in range(images)]


def judged(scores: Scores, row: int, prompt: str | None, over: Done) -> GuardVerdict:
    """Return the verdict on one of the scored embeddings; `over` is what is done to memorized ones."""
    score, threshold, memorized = _entry(scores, row)
    norm = float(scores.norm[row])
    reason = "the empty prompt has no guidance"
    if norm:
        reason = f"score {compare(score, threshold)} threshold {threshold:.4g}"
    return GuardVerdict(prompt, over if memorized else "passed", score, norm, threshold, reason)


def mitigated(verdict: GuardVerdict, result: Mitigation, scores: Scores, row: int) -> GuardVerdict:
    """Return the verdict on a blocked prompt after its mitigation, given what its new embeddings score."""
    score, threshold, memorized = _entry(scores, row)
    result = replace(result, score=score, threshold=threshold, memorized=memorized)
    if not result.succeeded:
        done, reason = verdict.action, f"not mitigated: {result.reason}"
    elif memorized:
        done, reason = verdict.action, f"mitigated, but still score {compare(score, threshold)} threshold as generated"
    else:
        done, reason = "mitigated", f"mitigated: score {compare(score, threshold)} threshold"
    return replace(verdict, action=done, reason=f"{verdict.reason}; {reason}", mitigation=result)


def compare(value: float, threshold: float) -> str:
    """Return the value and its relation to a threshold."""
    return f"{value:.4g} {'≥' if value >= threshold else '<'}"


def _entry(scores: Scores, row: int) -> tuple[float, float, bool]:
    """Return score, threshold and verdict, which a calibrated detector always gives."""
    if scores.score is None or scores.memorized is None or scores.threshold is None:
        raise InputError("The detector's engine is not calibrated for what it runs: run `memedge calibrate`.")
    return float(scores.score[row]), scores.threshold, bool(scores.memorized[row])
