"""The p-Laplacian of the density at a generated image (Brokman et al., SSVM 2025; METHODS.md §4)."""

from collections.abc import Callable, Sequence
from math import prod, sqrt

import numpy as np

from memedge.detectors.ddim import guided, plan
from memedge.detectors.draws import Draws, Floats, norms, per_block, rows
from memedge.engine.denoiser import Denoiser, Latents
from memedge.engine.passes import States

DIRECTIONS = 64
SEED = 0  # of the directions: the same for all prompts and draws
STEPS = 50
RADIUS = 1.5  # ρ
PLACE = -3  # of t among the schedule's timesteps


class PLaplace:
    """The flux of s / ‖s‖ into a small sphere around a generated latent x0: the p-Laplacian for p = 1, reversed.

    Δ_p = div(‖s‖^(p−2) s) with s = ∇ log p is estimated as the mean over N = 64 points y = x0 + ρ √d n, n uniform on
    the unit sphere, d = C·H·W, of ‖s(y)‖^(p−2) ⟨s(y), n⟩. With s(y) = −ε(y, t) / √(1 − ᾱ) and p = 1, which the paper
    found best, the scale of s cancels and −Δ_1 is the mean cosine of ε(y, t) and n. Around a memorized image s points
    inwards everywhere, so the value is high.

    `with_prompt`: ε is ε_c; else ε_0, for which the image alone is needed. It is never the guided ε, which is no score
    of any density that the model was trained on.
    """

    def __init__(self, denoiser: Denoiser, draws: int, seed: int | None, *, with_prompt: bool):
        manifest = denoiser.manifest
        self.name = "p-laplace" if with_prompt else "p-laplace-image"
        eps = "ε_c" if with_prompt else "ε_0"
        self.formula = (
            f"mean cosine of {eps}(x0 + ρ√d·n) and n over {DIRECTIONS} directions n around a generated x0: −Δ_1 "
            "(Brokman et al. 2025)"
        )
        self._denoiser, self._with_prompt = denoiser, with_prompt
        self._steps = plan(manifest.schedule, STEPS)
        self.passes = 2.0 * len(self._steps) - 1 + DIRECTIONS
        self._first = Draws(denoiser, denoiser.noise(draws, seed), self._steps[0].timestep)
        self.timestep = manifest.schedule.timesteps[PLACE]
        self._directions = directions(DIRECTIONS, manifest.latent_shape)

    def __call__(self, prompts: Sequence[str]) -> Floats:
        return per_block(self._denoiser.engine, prompts, len(self._first.noise), self._score)

    def _score(self, states: States) -> Floats:
        *_, (_, _, generated) = guided(self._denoiser, states, self._first, self._steps)
        _, prompts = rows(self._first.noise, states)

        def eps(latents: Latents) -> Latents:
            if self._with_prompt:
                return self._denoiser.predict(states, prompts, latents, self.timestep)
            return self._denoiser.uncond(latents, self.timestep)

        return inward_flux(eps, generated, RADIUS, self._directions).reshape(len(states.empty), -1)


def directions(count: int, shape: tuple[int, ...]) -> Latents:
    """Return unit vectors, float32 [count, C, H, W], uniform on the sphere."""
    normal = np.random.default_rng(SEED).standard_normal((count, *shape), dtype=np.float32)
    unit: Latents = normal / norms(normal).astype(np.float32)[:, None, None, None]
    return unit


def inward_flux(eps: Callable[[Latents], Latents], centre: Latents, radius: float, units: Latents) -> Floats:
    """Return the mean cosine of ε(x + ρ √d n) and n over unit vectors n [N, C, H, W], float64 [R] of x [R, C, H, W]."""
    length = radius * sqrt(prod(centre.shape[1:]))
    total = np.zeros(len(centre))
    for unit in units:
        found = eps(centre + np.float32(length) * unit)
        total += np.einsum("rchw,chw->r", found, unit, dtype=np.float64) / np.maximum(norms(found), 1e-8)
    return total / len(units)
