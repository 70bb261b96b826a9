"""Generation by DDIM with classifier-free guidance, in NumPy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

from memedge.detectors.draws import Draws, rows
from memedge.engine.denoiser import Denoiser, Latents
from memedge.engine.engine import States
from memedge.engine.manifest import Schedule

GUIDANCE = 7.5  # Stable Diffusion's default, which the papers generate with


@dataclass(frozen=True)
class Step:
    """From one timestep to the next: ᾱ at both."""

    timestep: int
    alpha: float
    next_alpha: float


def plan(schedule: Schedule, steps: int | None = None) -> list[Step]:
    """Return generation in `steps` steps, evenly chosen from the schedule's, or in all of them.

    Timesteps with ᾱ = 0 (zero terminal SNR) are left out: from there ε says nothing about the image.
    """
    pairs = [pair for pair in zip(schedule.timesteps, schedule.alphas_cumprod, strict=True) if pair[1] > 0]
    if steps is not None:
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(steps, len(pairs))).round().astype(int)]
    following = [*(alpha for _, alpha in pairs[1:]), schedule.final_alpha_cumprod]
    return [Step(t, alpha, next_alpha) for (t, alpha), next_alpha in zip(pairs, following, strict=True)]


def step(latents: Latents, eps: Latents, alpha: float, next_alpha: float) -> Latents:
    """Return the latents after a DDIM step with η = 0 (Song et al., ICLR 2021, equation 12).

    x' = √ᾱ' x0 + √(1 − ᾱ') ε with x0 = (x − √(1 − ᾱ) ε) / √ᾱ; float32 [R, C, H, W] all.
    """
    kept = sqrt(next_alpha / alpha)
    moved: Latents = kept * latents + (sqrt(1 - next_alpha) - kept * sqrt(1 - alpha)) * eps
    return moved


def guided(
    denoiser: Denoiser, states: States, first: Draws, steps: Sequence[Step], guidance: float = GUIDANCE
) -> Iterator[tuple[Latents, Latents, Latents]]:
    """Denoise each draw for each prompt; yield ε_c, ε_0 and the latents after each step, float32 [B · n, C, H, W].

    The guided ε is ε_0 + guidance · (ε_c − ε_0). The first step takes ε_0 from `first`, so it is one pass per row;
    every other one is two.
    """
    latents, prompts = rows(first.noise, states)
    for place, now in enumerate(steps):
        if place == 0:
            cond = first.cond(states).reshape(latents.shape)
            uncond, _ = rows(first.uncond, states)
        else:
            cond, uncond = denoiser.guidance(states, prompts, latents, now.timestep)
        latents = step(latents, uncond + guidance * (cond - uncond), now.alpha, now.next_alpha)
        yield cond, uncond, latents
