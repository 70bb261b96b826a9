"""A guard around a diffusers pipeline: memorized prompts are blocked, steered, mitigated or flagged.

    from memedge.integrations.diffusers import guard
    guarded = guard(pipe, Detector.load("engine"))
    result = guarded("a prompt", num_inference_steps=30)

Needs torch and diffusers, which the pipeline is made of.
"""

from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from memedge.detector import Detector
from memedge.engine.errors import InputError, not_installed
from memedge.integrations.call import Call
from memedge.integrations.checks import (
    FIRST_STEP,
    STEER,
    check_calls,
    check_model,
    check_threshold,
    takes_picture,
)
from memedge.integrations.families.find import family_of
from memedge.integrations.first_step import FirstStep
from memedge.integrations.guarded import Done, GuardedOutput, GuardVerdict, compare, judged, kept, mitigated
from memedge.integrations.monitored import MonitoredRun, calibration_of
from memedge.integrations.monitoring import MONITOR, settings_of
from memedge.integrations.same_model import beside_the_weights, check_same_model
from memedge.integrations.same_text import read_alike
from memedge.integrations.steering import Steering
from memedge.mitigation.mitigator import Mitigator
from memedge.monitor.calibration import MonitorCalibration

__all__ = ["Action", "GuardVerdict", "GuardedOutput", "GuardedPipeline", "guard"]

# What from_pipe and its like read of a pipeline first, and what makes another of its class.
UNGUARDED = ("components", "config", "from_pipe", "from_pretrained", "from_single_file")
Action = Literal["block", "steer", "mitigate", "flag", "reseed"]
# What is done to memorized prompts; those that are mitigated are blocked until then.
OVER: dict[Action, Done] = {
    "block": "blocked",
    "steer": "steered",
    "mitigate": "blocked",
    "flag": "flagged",
    "reseed": "reseeded",
}


def guard(
    pipe: Any,
    detector: Detector,
    action: Action = "block",
    *,
    first_step: float | None = None,
    monitor: bool | MonitorCalibration = False,
    threshold: float | None = None,
    target_fpr: float | None = None,
) -> "GuardedPipeline":
    """Return a pipeline that acts on memorized prompts, and generates all others exactly as `pipe` does.

    Prompts are judged before anything is generated, by what the pipeline makes of them: those that its `encode_prompt`
    reads as the engine does, but for rounding, by `Detector.detect`; all others by `score_embeddings` (embeddings that
    are given, clip_skip, another prompt_2, textual inversion, weights in brackets, an edited text encoder). If all are
    blocked, nothing is generated. In a batch, a prompt that is not blocked is generated in the blocked one's
    place, and its picture dropped: all others keep their random numbers, on any scheduler.

    With `first_step` no pass is added: the first call's own guidance is measured, on its own latents. If all prompts
    are blocked the run ends there; else it goes on, and the blocked ones' images are withheld. Where a negative prompt
    is given, ε_0 of the empty one costs one more call, of half the rows: what a user writes there never changes the
    norm.

    With `monitor` no pass is added either, but where a negative prompt is given: `Monitor` sees each step until
    its calibration needs no more, and each image is judged for itself. A run ends as soon as all of its images are
    memorized, if those are blocked or made again; else they are withheld, alone, at its end.

    A call compares two rows of the denoiser with the engine's ε_0 first (not with `first_step` or `monitor`, which
    measure the pipeline itself): adapters, hooks and edits that change the model are an error.

    Args:
        pipe: a pipeline of Stable Diffusion 1, 2 or XL, with any scheduler; from a picture and with a ControlNet too,
            but not with `first_step`. Or of Stable Diffusion 3, 3.5, Flux.1, Qwen-Image or Z-Image from text, with the
            scheduler, the size and the `max_sequence_length` that the engine was exported with; not with `monitor`, and
            not to steer. A class made of one of them may have an `encode_prompt` of its own, and no `__call__`.
        detector: on an engine exported from the same model, with its LoRAs if it has any.
        action: "block"; "flag": generate, and say so; "mitigate": generate from embeddings that the Mitigator has moved
            until they score as clean prompts, checked by `detector` once more as the pipeline takes them, else
            block; "steer": generate memorized images by opposite guidance while the noise is high, and by the user's
            own after (docs/remedies.md), at guidance_scale > 1; no pass is added, but with a negative prompt a call of
            their rows at each such step. Blocked if it is too late for that: if a run from a picture starts below, or
            the monitor finds it later. "reseed", with `monitor` alone: make memorized images again, up to three times,
            from what their generator draws next; those that are memorized each time are blocked.
        monitor: a calibration that `Monitor.calibrate` made for the calls' scheduler, steps and guidance; True:
            that of the file monitor.json beside the detector's engine.
        first_step: the mean of ‖Δ‖₂ over a prompt's images, in ε, or in v of flow matching, from which it counts as
            memorized. Needs guidance_scale > 1. The detector then says only what the model predicts, and needs no
            calibration.
        threshold: another operating point of scores than the detector's: see `Detector.at`. Not with `first_step`,
            which is a threshold itself.
        target_fpr: likewise.

    Raises:
        ImportError: diffusers is not installed.
        InputError: a pipeline that the guard does not know, another model's or one with adapters that the engine does
            not have, a detector without calibration, or an option that does not exist.
        EngineError: the engine has no derivatives that could be computed here, for "mitigate".

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from memedge import Detector
        >>> from memedge.integrations.diffusers import guard
        >>> pipe = StableDiffusionPipeline.from_pretrained("model")
        >>> guarded = guard(pipe, Detector.load("engine", provider="cpu"))
        >>> result = guarded(["the left luggage sign", "a green star on a hill"], num_inference_steps=2)
        >>> [verdict.action for verdict in result.verdicts], result.images[0]
        (['blocked', 'passed'], None)
    """
    try:
        from diffusers import DiffusionPipeline
    except ModuleNotFoundError as error:
        raise ImportError(not_installed("The guard", error, "export")) from error
    if not isinstance(pipe, DiffusionPipeline):
        raise InputError(f"guard takes a diffusers pipeline, not {type(pipe).__name__}.")
    if not isinstance(detector, Detector):
        raise InputError(f"guard takes a Detector, not {type(detector).__name__}: make one with Detector.load.")
    if action not in get_args(Action):
        raise InputError(f"There is no action={action!r}: use 'block', 'steer', 'mitigate', 'flag' or 'reseed'.")
    check_model(pipe, detector.info.manifest)
    if action == "steer":
        check_calls(pipe, STEER)
    if monitor is not False:
        if first_step is not None or threshold is not None or target_fpr is not None:
            raise InputError(
                "The monitor has a calibration of its own: leave first_step, threshold and target_fpr out."
            )
        if action == "mitigate":
            raise InputError("action='mitigate' needs the prompts' scores: leave monitor out.")
        check_calls(pipe, MONITOR)
        if action == "reseed" and takes_picture(pipe):
            raise InputError(
                f"action='reseed' is of pipelines from text, not {type(pipe).__name__}: use another action."
            )
        return GuardedPipeline(pipe, detector, action, None, calibration_of(monitor, detector))
    if action == "reseed":
        raise InputError("action='reseed' is of images that the monitor finds: give monitor=True.")
    if first_step is not None:
        check_threshold(first_step)
        check_calls(pipe, FIRST_STEP)
        if threshold is not None or target_fpr is not None:
            raise InputError("first_step is a threshold itself, of the norm: leave threshold and target_fpr out.")
        if action == "mitigate":
            raise InputError("action='mitigate' needs the prompts' scores: leave first_step out.")
        return GuardedPipeline(pipe, detector, action, first_step, None)
    detector = detector.at(threshold, target_fpr)
    if detector.info.rule.threshold is None:
        raise InputError(
            f"{detector.info.path} is not calibrated for {detector.info.key}, so there are no verdicts to act on: run "
            "`memedge calibrate`, or give first_step a threshold of the norm."
        )
    check_same_model(pipe, detector)
    return GuardedPipeline(pipe, detector, action, None, None)


class GuardedPipeline:
    """Is called as the pipeline is; its other attributes are the pipeline's, to read and to set.

    But for those that other pipelines are made of, which would not be guarded: they are refused.

    A pipeline may be called by one thread at a time, and so may a guarded one; those of several threads may share a
    detector, and a UNet.
    """

    def __init__(
        self,
        pipe: Any,
        detector: Detector,
        action: Action,
        first_step: float | None,
        calibration: MonitorCalibration | None,
    ):
        """Take what `guard` has checked."""
        self.__dict__.update(  # as attributes are otherwise set on the pipeline
            _pipe=pipe,
            _detector=detector,
            _over=OVER[action],
            _does="mitigated or blocked" if action == "mitigate" else OVER[action],
            _first_step=first_step,
            _calibration=calibration,
            _mitigator=Mitigator.for_detector(detector) if action == "mitigate" else None,
        )

    def __getattr__(self, name: str) -> Any:
        if "_pipe" not in self.__dict__:  # while it is being copied
            raise AttributeError(name)
        if name in UNGUARDED:
            raise InputError(
                f"A guarded pipeline gives no {name}, of which a pipeline without a guard would be made: take the "
                "pipeline's own, and guard what is made of it."
            )
        return getattr(self._pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._pipe, name, value)

    def __repr__(self) -> str:
        judge = f"first_step={self._first_step:g}" if self._first_step is not None else repr(self._detector)
        judge = "the monitor" if self._calibration is not None else judge
        return f"<{type(self._pipe).__name__} guarded by {judge}, memorized prompts are {self._does}>"

    def to(self, *args: Any, **kwargs: Any) -> "GuardedPipeline":
        """Move the pipeline, as its own `to`; returns this guarded one."""
        self._pipe.to(*args, **kwargs)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> GuardedOutput:
        """Generate what the pipeline's own arguments say, but for memorized prompts.

        Raises:
            InputError: arguments that the guard cannot follow (return_dict=False, no guidance where it is measured
                or steered, another run than the monitor is calibrated for), or prompts or embeddings that the detector
                does not take.
            NotFiniteError: the model produced NaN or infinity.
        """
        check_model(self._pipe, self._detector.info.manifest)
        call = Call(self._pipe, args, kwargs)
        if self._over == "steered":
            check_calls(self._pipe, STEER)
            call.check_guided(STEER)
        if self._calibration is not None:
            check_calls(self._pipe, MONITOR)
            call.check_guided(MONITOR)
            self._calibration.check(settings_of(self._pipe, call.get))
            return MonitoredRun(self._pipe, call, self._calibration, self._over).generate()
        if self._first_step is not None:
            return self._watch(call, self._first_step)
        family = family_of(self._pipe)
        family.check_call(self._pipe, call.get, self._detector.info.manifest)
        check_same_model(self._pipe, self._detector, call.get(family.attention))
        call.use_embeddings()
        alike = read_alike(call.prompts, call.embeddings(), self._detector, str(family.denoiser(self._pipe).dtype))
        verdicts = self._judge(call, alike)
        if self._mitigator is not None:
            self._mitigate(call, self._mitigator, verdicts, alike)
        blocked = [row for row, verdict in enumerate(verdicts) if verdict.action == "blocked"]
        if len(blocked) == len(verdicts):
            return GuardedOutput.assemble(None, verdicts, kept(verdicts, call.images))
        if blocked:
            call.replace(blocked, donor=next(row for row in range(len(verdicts)) if row not in blocked))
        if any(verdict.action == "steered" for verdict in verdicts):
            flagged = np.repeat([verdict.action == "steered" for verdict in verdicts], call.images)
            steering = Steering(self._pipe, len(flagged), lambda: flagged)
            return self._steered(call, call.watched(STEER, [steering]), verdicts, steering)
        return GuardedOutput.assemble(call.run(), verdicts, kept(verdicts, call.images))

    def _judge(self, call: Call, alike: list[bool]) -> list[GuardVerdict]:
        """Return a verdict for each prompt; those that may yet be mitigated are "blocked"."""
        verdicts: list[GuardVerdict | None] = [None] * len(call.prompts)
        text = [row for row, same in enumerate(alike) if same]
        if text:
            for row, v in zip(text, self._detector.detect([call.prompts[row] for row in text]), strict=True):
                action: Done = self._over if v.memorized else "passed"
                verdicts[row] = GuardVerdict(v.prompt, action, v.score, v.norm, v.threshold, v.reason)
        other = [row for row, same in enumerate(alike) if not same]
        if other:
            states, pooled, mask = call.embeddings(other)
            scores = self._detector.score_embeddings(states, pooled, mask=mask)
            for place, row in enumerate(other):
                verdicts[row] = judged(scores, place, call.prompts[row], self._over)
        beside = beside_the_weights(self._pipe)
        note = f"; the pipeline has {', '.join(beside)}" if beside else ""
        return [replace(v, reason=v.reason + note) for v in verdicts if v is not None]

    def _mitigate(self, call: Call, mitigator: Mitigator, verdicts: list[GuardVerdict], alike: list[bool]) -> None:
        """Put other embeddings in the place of blocked prompts, and say so; those for which it fails stay blocked."""
        blocked = [row for row, verdict in enumerate(verdicts) if verdict.action == "blocked"]
        rows = [row for row in blocked if alike[row]]
        for row in set(blocked) - set(rows):
            reason = f"{verdicts[row].reason}; only text that the engine's own text encoder reads can be mitigated"
            verdicts[row] = replace(verdicts[row], reason=reason)
        if not rows:
            return
        distinct = dict.fromkeys(call.prompts[row] for row in rows)
        results = {prompt: mitigator.embedding(prompt) for prompt in distinct}
        for row in rows:
            call.set_embeddings(row, results[call.prompts[row]].states, results[call.prompts[row]].pooled)
        # As the pipeline takes them, in its own precision, and by the caller's own detector.
        states, pooled, mask = call.embeddings(rows)
        scores = self._detector.score_embeddings(states, pooled, mask=mask)
        for position, row in enumerate(rows):
            verdicts[row] = mitigated(verdicts[row], results[call.prompts[row]], scores, position)

    def _watch(self, call: Call, threshold: float) -> GuardedOutput:
        """Generate, and judge by the norm of the pipeline's own first step."""
        check_calls(self._pipe, FIRST_STEP)
        call.check_guided(FIRST_STEP)
        prediction_type = self._detector.info.manifest.prediction_type
        stop = self._over == "blocked"
        first = FirstStep(self._pipe, len(call.prompts), prediction_type, threshold, stop=stop)
        steering = Steering(self._pipe, len(call.prompts) * call.images, lambda: np.repeat(first.over(), call.images))
        output = call.watched(FIRST_STEP, [first, steering] if self._over == "steered" else [first])
        verdicts = [
            GuardVerdict(
                prompt=prompt,
                action=self._over if over else "passed",
                score=None,
                norm=norm,
                threshold=threshold,
                reason=f"norm {compare(norm, threshold)} first_step {threshold:.4g} at timestep {first.timestep:g}",
            )
            for prompt, over, norm in zip(call.prompts, first.over(), first.norms.tolist(), strict=True)
        ]
        return self._steered(call, output, verdicts, steering)

    def _steered(self, call: Call, output: Any, verdicts: list[GuardVerdict], steering: Steering) -> GuardedOutput:
        """Say of prompts that were to be steered whether they were; those that it was too late for are blocked."""
        for row, verdict in enumerate(verdicts):
            if verdict.action == "steered":
                was, said = steering.outcome(row * call.images, call.get("guidance_scale"))
                verdicts[row] = replace(
                    verdict, action="steered" if was else "blocked", reason=f"{verdict.reason}; {said}"
                )
        return GuardedOutput.assemble(output, verdicts, kept(verdicts, call.images))
