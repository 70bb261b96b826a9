"""A guard around a diffusers pipeline: memorized prompts are blocked, mitigated or flagged.

    from memedge.integrations.diffusers import guard
    guarded = guard(pipe, Detector.load("engine"))
    result = guarded("a prompt", num_inference_steps=30)

Needs torch and diffusers, which the pipeline is made of.
"""

from dataclasses import replace
from typing import Any, Literal, get_args

from memedge.detector import Detector
from memedge.engine.errors import InputError, not_installed
from memedge.integrations.call import Call
from memedge.integrations.checks import check_first_step, check_model
from memedge.integrations.first_step import AllOver, FirstStep
from memedge.integrations.guarded import GuardedOutput, GuardVerdict, compare, judged, mitigated
from memedge.mitigation.mitigator import Mitigator

__all__ = ["Action", "GuardVerdict", "GuardedOutput", "GuardedPipeline", "guard"]

Action = Literal["block", "mitigate", "flag"]


def guard(
    pipe: Any,
    detector: Detector,
    action: Action = "block",
    *,
    first_step: float | None = None,
    threshold: float | None = None,
    target_fpr: float | None = None,
) -> "GuardedPipeline":
    """Return a pipeline that acts on memorized prompts, and generates all others exactly as `pipe` does.

    Prompts are judged before anything is generated, by `Detector.detect`; as embeddings, by `score_embeddings`, if they
    are given as such or made otherwise than the engine makes them (clip_skip, another prompt_2, textual inversion). If
    all are blocked, nothing is generated. In a batch, a prompt that is not blocked is generated in the blocked one's
    place, and its picture dropped: all others keep their random numbers, on any scheduler.

    With `first_step` no pass of the UNet is added: the first call's own guidance is measured, on its own latents. If
    all prompts are blocked the run ends there; else it goes on, and the blocked ones' images are withheld. A negative
    prompt takes the empty one's place in that norm, so a threshold holds for a pipeline's own settings.

    Args:
        pipe: a pipeline of Stable Diffusion 1, 2 or XL, with any scheduler; image-to-image too, but not with
            `first_step`.
        detector: on an engine exported from the same model, with its LoRAs if it has any.
        action: "block"; "flag": generate, and say so; "mitigate": generate from embeddings that the Mitigator has moved
            until they score as clean prompts, checked by `detector` once more as the pipeline takes them, else
            block.
        first_step: the mean of ‖Δ‖₂ over a prompt's images, in ε, from which it counts as memorized. Needs
            guidance_scale > 1. The detector then says only what the model predicts, and needs no calibration.
        threshold: another operating point of scores than the detector's: see `Detector.at`. Not with `first_step`,
            which is a threshold itself.
        target_fpr: likewise.

    Raises:
        ImportError: diffusers is not installed.
        InputError: no pipeline with a UNet and prompts, another model's, a detector without calibration, or an option
            that does not exist.
        EngineError: the engine has no derivatives that could be computed here, for "mitigate".

    Examples:
        >>> from diffusers import StableDiffusionPipeline
        >>> from memedge import Detector
        >>> from memedge.integrations.diffusers import guard
        >>> pipe = StableDiffusionPipeline.from_pretrained("model")
        >>> guarded = guard(pipe, Detector.load("engine", provider="cpu"))
        >>> result = guarded(["cow icon", "a green star on a hill"], num_inference_steps=2)
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
        raise InputError(f"There is no action={action!r}: use 'block', 'mitigate' or 'flag'.")
    check_model(pipe, detector.info.manifest)
    if first_step is not None:
        check_first_step(pipe, first_step)
        if threshold is not None or target_fpr is not None:
            raise InputError("first_step is a threshold itself, of the norm: leave threshold and target_fpr out.")
        if action == "mitigate":
            raise InputError("action='mitigate' needs the prompts' scores: leave first_step out.")
    detector = detector.at(threshold, target_fpr)
    if first_step is None and detector.info.rule.threshold is None:
        raise InputError(
            f"{detector.info.path} is not calibrated for {detector.info.key}, so there are no verdicts to act on: run "
            "`memedge calibrate`, or give first_step a threshold of the norm."
        )
    return GuardedPipeline(pipe, detector, action, first_step)


class GuardedPipeline:
    """Is called as the pipeline is; all its other attributes are the pipeline's, to read and to set.

    A pipeline may be called by one thread at a time, and so may a guarded one; those of several threads may share a
    detector, and a UNet.
    """

    def __init__(self, pipe: Any, detector: Detector, action: Action, first_step: float | None):
        """Take what `guard` has checked."""
        self.__dict__.update(  # as attributes are otherwise set on the pipeline
            _pipe=pipe,
            _detector=detector,
            _over="flagged" if action == "flag" else "blocked",  # what is done to memorized prompts
            _does={"block": "blocked", "flag": "flagged", "mitigate": "mitigated or blocked"}[action],
            _first_step=first_step,
            _mitigator=Mitigator.for_detector(detector) if action == "mitigate" else None,
        )

    def __getattr__(self, name: str) -> Any:
        if "_pipe" not in self.__dict__:  # while it is being copied
            raise AttributeError(name)
        return getattr(self._pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._pipe, name, value)

    def __repr__(self) -> str:
        judge = f"first_step={self._first_step:g}" if self._first_step is not None else repr(self._detector)
        return f"<{type(self._pipe).__name__} guarded by {judge}, memorized prompts are {self._does}>"

    def to(self, *args: Any, **kwargs: Any) -> "GuardedPipeline":
        """Move the pipeline, as its own `to`; returns this guarded one."""
        self._pipe.to(*args, **kwargs)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> GuardedOutput:
        """Generate what the pipeline's own arguments say, but for memorized prompts.

        Raises:
            InputError: arguments that the guard cannot follow (return_dict=False, first_step without guidance), or
                prompts or embeddings that the detector does not take.
            NotFiniteError: the model produced NaN or infinity.
        """
        check_model(self._pipe, self._detector.info.manifest)
        call = Call(self._pipe, args, kwargs)
        if self._first_step is not None:
            return self._watch(call, self._first_step)
        verdicts = self._judge(call)
        if self._mitigator is not None:
            self._mitigate(call, self._mitigator, verdicts)
        blocked = [row for row, verdict in enumerate(verdicts) if verdict.action == "blocked"]
        if len(blocked) == len(verdicts):
            return GuardedOutput.assemble(None, verdicts, call.images)
        if blocked:
            call.replace(blocked, donor=next(row for row in range(len(verdicts)) if row not in blocked))
        return GuardedOutput.assemble(call.run(), verdicts, call.images)

    def _judge(self, call: Call) -> list[GuardVerdict]:
        """Return a verdict for each prompt; those that may yet be mitigated are "blocked"."""
        if call.text_only:
            return [
                GuardVerdict(v.prompt, self._over if v.memorized else "passed", v.score, v.norm, v.threshold, v.reason)
                for v in self._detector.detect(call.prompts)
            ]
        scores = self._detector.score_embeddings(*call.embeddings())
        return [judged(scores, row, prompt, self._over) for row, prompt in enumerate(call.prompts)]

    def _mitigate(self, call: Call, mitigator: Mitigator, verdicts: list[GuardVerdict]) -> None:
        """Put other embeddings in the place of blocked prompts, and say so; those for which it fails stay blocked."""
        rows = [row for row, verdict in enumerate(verdicts) if verdict.action == "blocked"]
        if not rows:
            return
        if not call.text_only:
            for row in rows:
                reason = f"{verdicts[row].reason}; only text that the engine's own text encoder reads can be mitigated"
                verdicts[row] = replace(verdicts[row], reason=reason)
            return
        distinct = dict.fromkeys(call.prompts[row] for row in rows)
        results = {prompt: mitigator.embedding(prompt) for prompt in distinct}
        call.use_embeddings()
        for row in rows:
            call.set_embeddings(row, results[call.prompts[row]].states, results[call.prompts[row]].pooled)
        # As the pipeline takes them, in its own precision, and by the caller's own detector.
        scores = self._detector.score_embeddings(*call.embeddings(rows))
        for position, row in enumerate(rows):
            verdicts[row] = mitigated(verdicts[row], results[call.prompts[row]], scores, position)

    def _watch(self, call: Call, threshold: float) -> GuardedOutput:
        """Generate, and judge by the norm of the pipeline's own first step."""
        check_first_step(self._pipe, threshold)
        scale = call.get("guidance_scale")
        if not (scale or 0) > 1:
            raise InputError(
                f"guidance_scale is {scale}, so there is no guidance to measure: give more than 1, or leave first_step "
                "out to have the prompts scored."
            )
        prediction_type = self._detector.info.manifest.prediction_type
        stop_at = threshold if self._over == "blocked" else None
        watch = FirstStep(self._pipe, len(call.prompts), call.images, prediction_type, stop_at)
        output = None
        try:
            with watch:
                output = call.run()
        except AllOver:
            self._pipe.maybe_free_model_hooks()  # as the pipeline does at its end
        verdicts = [
            GuardVerdict(
                prompt=prompt,
                action=self._over if norm >= threshold else "passed",
                score=None,
                norm=norm,
                threshold=threshold,
                reason=f"norm {compare(norm, threshold)} first_step {threshold:.4g} at timestep {watch.timestep:g}",
            )
            for prompt, norm in zip(call.prompts, watch.measured().tolist(), strict=True)
        ]
        return GuardedOutput.assemble(output, verdicts, call.images)
