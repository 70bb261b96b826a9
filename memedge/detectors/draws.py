"""What detectors share: prompts a block at a time, and noise draws whose ε_0 is computed once."""

from collections.abc import Callable, Sequence

import numpy as np

from memedge.engine.arrays import Floats, Indices
from memedge.engine.denoiser import Denoiser, Latents
from memedge.engine.engine import Engine, States
from memedge.prompts.text import checked_prompts

# Latent values of one block of rows (prompt × draw): 64 rows of SD 1.x, of which each array takes 4 MiB.
BLOCK_VALUES = 1 << 20


def per_block(engine: Engine, prompts: Sequence[str], draws: int, score: Callable[[States], Floats]) -> Floats:
    """Return `score` of all prompts, float64 [B, draws], computed in blocks, so that memory stays bounded.

    Raises:
        InputError: something that is not text.
    """
    texts = list(checked_prompts(prompts))
    size = max(1, BLOCK_VALUES // (draws * int(np.prod(engine.directory.manifest.latent_shape))))
    parts = [np.empty((0, draws))]
    for start in range(0, len(texts), size):
        ids, _ = engine.tokenize(texts[start : start + size])
        parts.append(score(engine.encode(ids)))
    return np.concatenate(parts)


class Draws:
    """n draws of noise at one timestep.

    Attributes:
        noise: float32 [n, C, H, W].
        timestep: where they are looked at.
        uncond: ε_0, float32 [n, C, H, W], which no prompt changes.
    """

    def __init__(self, denoiser: Denoiser, noise: Latents, timestep: int):
        """Compute ε_0: one pass per draw."""
        self._denoiser = denoiser
        self.noise, self.timestep = noise, timestep
        self.uncond = denoiser.uncond(noise, timestep)

    def cond(self, states: States) -> Latents:
        """Return ε_c of each prompt on each draw, float32 [B, n, C, H, W]: one pass each. The empty prompt's is ε_0."""
        latents, prompts = rows(self.noise, states)
        cond = self._denoiser.predict(states, prompts, latents, self.timestep)
        cond = cond.reshape(len(states.empty), *self.noise.shape)
        cond[states.empty] = self.uncond
        return cond


def rows(draws: Latents, states: States) -> tuple[Latents, Indices]:
    """Return latents [B · n, C, H, W] and the prompt of each, for all prompts on all draws [n, C, H, W], in C order."""
    latents = np.tile(draws, (len(states.empty), 1, 1, 1))
    return latents, np.repeat(states.all, len(draws))
