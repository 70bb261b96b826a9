"""SAIL (Jeon et al., ICML 2025): noise from which a prompt's memory is less sharp (docs/methods.md §3)."""

from dataclasses import dataclass

import numpy as np

from memedge.engine.arrays import Floats
from memedge.engine.denoiser import Denoiser, Latents, norms
from memedge.engine.engine import States
from memedge.engine.gradients import Gradients

FORWARD, BACKWARD = 4, 4  # passes of one draw: of its loss; of the derivative, which takes as many forward ones too


@dataclass(frozen=True)
class Point:
    """The loss on R latents, and what its derivative is made of.

    Attributes:
        latents: x, float32 [R, C, H, W].
        guidance: Δ(x), [R, C, H, W].
        moved: x + Δ(x) / ‖Δ(x)‖, [R, C, H, W].
        moved_guidance: Δ there, [R, C, H, W].
        norm: ‖Δ(x)‖₂, float64 [R].
        loss: float64 [R].
    """

    latents: Latents
    guidance: Latents
    moved: Latents
    moved_guidance: Latents
    norm: Floats
    loss: Floats


class Sail:
    """‖Δ(x + Δ(x)/‖Δ(x)‖)‖₂ + α‖x‖₂ of one prompt's guidance Δ = ε_c − ε_0 at the noisiest timestep."""

    def __init__(self, denoiser: Denoiser, gradients: Gradients, states: States, alpha: float):
        """Take the embeddings of one prompt, which is not the empty one: that has no guidance."""
        self._denoiser, self._gradients, self._states, self._alpha = denoiser, gradients, states, alpha
        self._array = denoiser.engine.backend.memory.download(states.tensor)[0]

    def at(self, latents: Latents) -> Point:
        """Return the loss on latents [R, C, H, W]."""
        guidance = self._guidance(latents)
        norm = norms(guidance)
        moved = latents + _unit(guidance)
        moved_guidance = self._guidance(moved)
        loss = norms(moved_guidance) + self._alpha * norms(latents)
        return Point(latents, guidance, moved, moved_guidance, norm, loss)

    def gradient(self, point: Point) -> Latents:
        """Return each draw's derivative of its loss in x, float32 [R, C, H, W].

        The whole of it: x moves the inner Δ(x) too. With J the Jacobian of Δ, u = Δ(x), and g = J(x')ᵀ Δ(x')/‖Δ(x')‖
        at x' = x + u/‖u‖, it is g + J(x)ᵀ (g − u (u·g)/‖u‖²)/‖u‖ + α x/‖x‖.
        """
        outer = self._gradients.noise(self._array, point.moved, _unit(point.moved_guidance))
        unit = _unit(point.guidance)
        along = (unit * outer).sum(axis=(1, 2, 3), keepdims=True)
        across = (outer - unit * along) / _column(point.norm)
        inner = self._gradients.noise(self._array, point.latents, across)
        total: Latents = outer + inner + np.float32(self._alpha) * _unit(point.latents)
        return total

    def _guidance(self, latents: Latents) -> Latents:
        prompts = np.zeros(len(latents), dtype=np.int64)
        timestep = self._denoiser.manifest.timesteps[0]
        cond, uncond = self._denoiser.guidance(self._states, prompts, latents, timestep)
        return cond - uncond


def _unit(values: Latents) -> Latents:
    unit: Latents = values / _column(norms(values))
    return unit


def _column(values: Floats) -> Latents:
    """Return values [R] to divide [R, C, H, W] by; those that are 0 as the least that is not."""
    return np.maximum(values, np.finfo(np.float32).tiny).astype(np.float32)[:, None, None, None]
