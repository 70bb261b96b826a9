"""Mitigation: prompt embeddings, or starting noise, changed until a prompt no longer brings a training image back."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from memedge.detector import Detector
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.arrays import Singles
from memedge.engine.denoiser import Denoiser
from memedge.engine.embeddings import unpack
from memedge.engine.engine import Engine
from memedge.engine.errors import InputError, IntegrityError, not_installed
from memedge.engine.gradients import Gradients, OnnxGradients
from memedge.engine.providers import PROVIDERS
from memedge.mitigation.adamw import AdamW
from memedge.mitigation.sail import BACKWARD, FORWARD, Sail
from memedge.mitigation.target import Loss, Target
from memedge.prompts.text import checked_prompts


@dataclass(frozen=True)
class Mitigation:
    """A prompt's embeddings, moved until the loss was at the target, or else those of the lowest loss that was met.

    `torch.from_dlpack(result.states[None])` is diffusers' `prompt_embeds`, and `pooled` its `pooled_prompt_embeds`.

    Attributes:
        prompt: the prompt.
        states: float32 [L, D], the embeddings; that of BOS is the prompt's own.
        pooled: float32 [P], SDXL's pooled embeddings; None in other models.
        loss: "score" or "norm"; `target`, `before` and `after` are its values.
        target: the value that the loss was to reach.
        before, after: the loss of the prompt and of `states`, both by a forward pass of the engine.
        score: the score of `states`, or None if there is no γ.
        threshold: the calibrated threshold of scores, or None.
        memorized: whether `score` reaches the threshold; None if the engine is not calibrated for what runs.
        iterations: how many steps led to `states`.
        distance: ‖e − e_c‖₂ / ‖e_c‖₂ of the embeddings e and the prompt's e_c, without BOS.
        succeeded: whether `after` is at most the target.
        truncated: whether the prompt was longer than the text encoder reads.
        passes, backward_passes: conditional UNet evaluations in all, forward and backward.
        reason: in words. It also says if the loss is at the target and the score is still that of a memorized prompt.
    """

    prompt: str
    states: Singles = field(repr=False)
    pooled: Singles | None = field(repr=False)
    loss: Loss
    target: float
    before: float
    after: float
    score: float | None
    threshold: float | None
    memorized: bool | None
    iterations: int
    distance: float
    succeeded: bool
    truncated: bool
    passes: int
    backward_passes: int
    reason: str


@dataclass(frozen=True)
class MitigatedNoise:
    """Starting noise moved to where a prompt's guidance is less sharp.

    Attributes:
        prompt: the prompt.
        noise: float32 [C, H, W]; `torch.from_dlpack(result.noise[None])` is diffusers' `latents`.
        draw: which of the draws it comes from.
        before, after: ‖Δ(x + Δ(x)/‖Δ(x)‖)‖₂ + α‖x‖₂ of that draw and of `noise` (docs/methods.md §3).
        norm_before, norm_after: ‖Δ(x)‖₂, in ε.
        target: the value that the loss was to reach, or None.
        iterations: how many steps led to `noise`.
        distance: ‖x − x₀‖₂ / ‖x₀‖₂ of the noise x and the draw x₀.
        succeeded: whether `after` is at most the target; None without one.
        truncated: whether the prompt was longer than the text encoder reads.
        passes, backward_passes: UNet evaluations in all, conditional and unconditional, forward and backward.
        reason: in words.
    """

    prompt: str
    noise: Singles = field(repr=False)
    draw: int
    before: float
    after: float
    norm_before: float
    norm_after: float
    target: float | None
    iterations: int
    distance: float
    succeeded: bool | None
    truncated: bool
    passes: int
    backward_passes: int
    reason: str


class Mitigator:
    """Changes what a prompt is generated from. Any number of threads may call any of its methods at once.

    It can be pickled, as a Detector can.
    """

    def __init__(self, engine: Engine, gradients: Gradients):
        """Take an opened engine and its derivatives; `load` opens both."""
        self.engine, self.gradients = engine, gradients
        self._again: tuple[Callable[..., Mitigator], tuple[object, ...]] | None = None  # how to make one like it

    def __repr__(self) -> str:
        return f"<Mitigator on {self.engine.directory.path}: {self.engine.backend.key}>"

    @staticmethod
    def load(
        path: str | PathLike[str] | None = None,
        provider: str = "auto",
        threads: int | None = None,
        *,
        checkpoint: str | None = None,
    ) -> "Mitigator":
        """Open an engine directory.

        Args:
            path: the folder `memedge export` wrote; default: the embedded engine.
            provider: "cuda", "cpu", or "auto": "cuda" if it can run here and the engine is calibrated for it.
            threads: threads per call; default: as many cores as this process may use.
            checkpoint: what the engine was exported from, to be differentiated by torch's autograd. By default the
                engine's own gradient graphs are run, which needs no torch.

        Raises:
            EngineError: the directory is no engine, was damaged, or cannot run here as asked.
            InputError: threads is not positive; the checkpoint is another one, or torch is not installed.
            ExportError: the checkpoint cannot be read.
        """
        engine = Engine.open(Path(path or EMBEDDED_ENGINE), provider, None, threads, gradients=True)
        gradients = _from_checkpoint(engine, checkpoint) if checkpoint else OnnxGradients(engine)
        mitigator = Mitigator(engine, gradients)
        place = None if path is None else str(Path(path).resolve())
        mitigator._again = _open_again, (place, engine.backend.provider, threads, checkpoint, engine.directory.identity)
        return mitigator

    @staticmethod
    def for_detector(detector: Detector) -> "Mitigator":
        """Return a mitigator on a detector's engine, for scores as low as those of clean prompts.

        If the detector's provider computes gradients, its very own engine is used, else the same directory on cpu.

        Raises:
            InputError: the engine is not calibrated for cuda or cpu, or without the score of clean prompts.
            EngineError: the engine cannot run on cpu, or has no gradients.
        """
        if PROVIDERS[detector.info.provider].gradients:
            mitigator = Mitigator(detector.engine, detector.gradients)
            mitigator._again = Mitigator.for_detector, (detector,)
        else:
            mitigator = Mitigator.load(detector.info.path, "cpu", detector.info.threads)
        Target(mitigator.engine, "score", None)  # says now what it would say of the first prompt
        return mitigator

    def __reduce__(self) -> tuple[Any, ...]:
        if self._again is None:
            raise InputError("Only a mitigator of Mitigator.load or for_detector can be pickled: load it there.")
        return self._again

    def embedding(
        self,
        prompt: str,
        target: float | None = None,
        *,
        loss: Loss = "score",
        steps: int = 40,
        learning_rate: float = 0.05,
        distance_weight: float = 5.0,
    ) -> Mitigation:
        """Move a prompt's embeddings until its score, or its norm, is at the target (Wen et al., docs/methods.md §2).

        AdamW moves all embeddings but that of BOS. The forward engine measures the loss before the first step and after
        each one, and the first loss at the target ends it. The norm is the mean over the draws of ‖Δ‖₂. The published
        target of 3 is for the norm of all draws together, which grows with √n.

        Args:
            prompt: one prompt.
            target: the value that the loss is to reach. Default, for loss="score": the median score of the clean
                prompts that the engine was calibrated on. The threshold would not do: a prompt that scores just below
                it is no longer called memorized, and still replicates mostly (docs/benchmarks.md).
            loss: "score", as the detector's: γ_norm · norm + γ_align · alignment; or "norm".
            steps: at most so many. The papers' 10 are for targets that leave more of the memory.
            learning_rate: AdamW's.
            distance_weight: steps descend the loss plus this times (‖e − e_c‖₂ / ‖e_c‖₂)². The papers have 0. A weight
                leaves more of the prompt at the same target, after more steps.

        Raises:
            InputError: something that is not text; a number that cannot be; no γ or no target where one
                is needed.
            ProviderError: the engine has no gradients that can be computed here.
            NotFiniteError: the model or its derivatives gave NaN or infinity.

        Examples:
            >>> from memedge import Mitigator
            >>> result = Mitigator.load(provider="cpu").embedding("the left luggage sign")
            >>> round(result.before, 1), round(result.after, 1), result.succeeded
            (-11.4, -24.3, True)
            >>> result.states.shape
            (24, 96)
        """
        (prompt,) = checked_prompts([prompt])
        _check(steps, learning_rate)
        if not (math.isfinite(distance_weight) and distance_weight >= 0):
            raise InputError(f"distance_weight is {distance_weight}: give a number of at least 0.")
        goal = Target(self.engine, loss, target)
        ids, truncated = self.engine.tokenize([prompt])
        own = self.engine.backend.memory.download(self.engine.encode(ids).tensor)[0]
        words = slice(self.engine.first_word, None)  # BOS is the same in all prompts
        size = _length(own[words]) or 1.0  # the empty prompt's may all be zeros
        slope = np.float32(2 * distance_weight / size**2)
        best = now = before = goal.measure(own, 0)
        lowest = now.loss
        optimizer = AdamW(learning_rate)
        while not now.reached and now.steps < steps:
            gradient = self.gradients.statistics(now.states[None], *goal.weights, goal.rule.operands).states[0]
            moved = own.copy()
            moved[words] = optimizer.step(now.states[words], (gradient + slope * (now.states - own))[words])
            if self.engine.directory.manifest.masked:
                moved[:, -1] = own[:, -1]  # which tokens are there
            now = goal.measure(moved, now.steps + 1)
            value = now.loss + distance_weight * (_length((moved - own)[words]) / size) ** 2
            if now.reached or value < lowest:
                best, lowest = now, value
        score, memorized, more = goal.verdict(best)
        states, pooled = unpack(self.engine.directory.manifest, best.states)
        return Mitigation(
            prompt=prompt,
            states=states,
            pooled=pooled,
            loss=loss,
            target=goal.value,
            before=before.loss,
            after=best.loss,
            score=score,
            threshold=goal.rule.threshold,
            memorized=memorized,
            iterations=best.steps,
            distance=_length((best.states - own)[words]) / size,
            succeeded=best.reached,
            truncated=bool(truncated[0]),
            passes=goal.rows * (1 + 2 * now.steps) + more,
            backward_passes=goal.rows * now.steps,
            reason=goal.reason(before, best, now.steps, memorized),
        )

    def noise(
        self,
        prompt: str,
        target: float | None = None,
        *,
        draws: int = 8,
        steps: int = 10,
        learning_rate: float = 0.05,
        alpha: float = 0.05,
        seed: int | None = None,
    ) -> MitigatedNoise:
        """Move starting noise to where a prompt's guidance is less sharp: SAIL (Jeon et al., docs/methods.md §3).

        Adam moves several draws at once. Each has a loss of its own, ‖Δ(x + Δ(x)/‖Δ(x)‖)‖₂ + α‖x‖₂ at the noisiest
        timestep. The prompt and its score stay as they are: this changes the picture, not the verdict.

        Args:
            prompt: one prompt, not the empty one.
            target: the first draw whose loss is at most this ends it. The authors have 8.2 for SD 1.4, where α‖x‖₂ is
                6.4. By default all steps are done, and the noise of the lowest loss that was met is returned.
            draws: at least 1.
            steps: at most so many.
            learning_rate: Adam's.
            alpha: α; the authors' for SD 2 is 0.01.
            seed: of the draws. None: the engine's own first, then others from its seed (Denoiser.noise).

        Raises:
            InputError: something that is not text, the empty prompt, or a number that cannot be.
            ProviderError: the engine has no gradients that can be computed here, or computes on its own noise only.
            NotFiniteError: the model or its derivatives gave NaN or infinity.

        Examples:
            >>> from memedge import Mitigator
            >>> result = Mitigator.load(provider="cpu").noise("the left luggage sign", draws=2, steps=3)
            >>> round(result.norm_before, 1), round(result.norm_after, 1), result.noise.shape
            (3.2, 2.8, (4, 16, 16))
        """
        (prompt,) = checked_prompts([prompt])
        _check(steps, learning_rate)
        for name, value in (("alpha", alpha), ("target", target), ("seed", seed)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}: give a number of at least 0.")
        ids, truncated = self.engine.tokenize([prompt])
        states = self.engine.encode(ids)
        if states.empty[0]:
            raise InputError("The empty prompt has no guidance, so there is none to soften: any noise will do.")
        denoiser = self._denoiser
        sail = Sail(denoiser, self.gradients, states, alpha)
        optimizer = AdamW(learning_rate, weight_decay=0)
        now = start = sail.at(denoiser.noise(draws, seed))
        best, draw, found, done = now, int(now.loss.argmin()), 0, 0
        while done < steps and (target is None or best.loss[draw] > target):
            now = sail.at(optimizer.step(now.latents, sail.gradient(now)))
            done += 1
            if now.loss.min() < best.loss[draw]:
                best, draw, found = now, int(now.loss.argmin()), done
        before, after = float(start.loss[draw]), float(best.loss[draw])
        succeeded = None if target is None else after <= target
        return MitigatedNoise(
            prompt=prompt,
            noise=best.latents[draw].copy(),
            draw=draw,
            before=before,
            after=after,
            norm_before=float(start.norm[draw]),
            norm_after=float(best.norm[draw]),
            target=target,
            iterations=found,
            distance=_length(best.latents[draw] - start.latents[draw]) / _length(start.latents[draw]),
            succeeded=succeeded,
            truncated=bool(truncated[0]),
            passes=draws * (FORWARD * (done + 1) + BACKWARD * done),
            backward_passes=draws * BACKWARD * done,
            reason=_noise_reason(before, after, target, done),
        )

    @cached_property
    def _denoiser(self) -> Denoiser:
        return Denoiser(self.engine)


def _open_again(
    path: str | None, provider: str, threads: int | None, checkpoint: str | None, identity: str
) -> Mitigator:
    """Return the mitigator that was pickled; raises EngineError where the same engine cannot be had."""
    mitigator = Mitigator.load(path, provider, threads, checkpoint=checkpoint)
    if mitigator.engine.directory.identity != identity:
        raise IntegrityError(f"{mitigator.engine.directory.path} is not the engine that was pickled: load it again.")
    return mitigator


def _length(values: Singles) -> float:
    return float(np.linalg.norm(values.astype(np.float64)))


def _check(steps: int, learning_rate: float) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is {steps}: give a whole number of at least 1.")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise InputError(f"learning_rate is {learning_rate}: give a positive number.")


def _noise_reason(before: float, after: float, target: float | None, done: int) -> str:
    change = f"loss {before:.4g} → {after:.4g}"
    if target is None:
        return f"{change}, the lowest of {done} steps on each draw"
    if after <= target:
        return f"{change} ≤ target {target:.4g}"
    return f"{change}, the lowest of {done} steps on each draw, is above target {target:.4g}: allow more steps or draws"


def _from_checkpoint(engine: Engine, checkpoint: str) -> Gradients:
    try:
        from memedge.autograd.gradients import TorchGradients
    except ImportError as error:
        raise InputError(
            not_installed("A checkpoint's own gradient", error, "export", ", or leave the checkpoint out")
        ) from None
    return TorchGradients(engine, checkpoint)
