"""Transformers trained by flow matching: v, and what the engine's statistics are made of (docs/methods.md §9)."""

import torch

from memedge.engine.errors import ExportError
from memedge.engine.flow import PATCH
from memedge.export.sources.denoisers.denoiser import Denoiser
from memedge.export.sources.parts import Parts

SIDE = 128  # of the latents of pipelines whose transformers have no size of their own, where nobody says


class FlowTransformer(Denoiser):
    """Gives v + x · [σ < 1] / (1 − σ), with v = noise − x₀ and σ = timestep / 1000.

    At σ = 1 that is v, whose Δ is what the norm is of. Below it is ε / (1 − σ), as ε = x + (1 − σ) v, and its Δ is that
    of v: so the cosine of ε_0 and Δv is that of what this gives, and of its difference.
    """

    def __init__(self, parts: Parts, tokens: int, pooled_width: int):
        """Take the transformer of parts whose states have `tokens` rows, and one more if there is a pooled state."""
        super().__init__(parts.guidance)
        self.transformer = parts.denoiser
        self._tokens, self._pooled_width = tokens, pooled_width

    def of_prompts(self, states: torch.Tensor) -> torch.Tensor:
        """Return what `velocity` takes of states [B, K, D]: what is computed once for each prompt, whatever the row."""
        return states

    def velocity(
        self, sample: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor, guidance: torch.Tensor | None
    ) -> torch.Tensor:
        """Return v = noise − x₀ [R, C, H, W] as samplers step by it, for σ [R] and of_prompts' states [R, K, D]."""
        raise NotImplementedError

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        states: torch.Tensor,
        prompt: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        states = self.of_prompts(states)
        if prompt is not None:
            states = states.index_select(0, prompt)
        left = 1000 - timestep
        share = (left > 0).float() * 1000 / left.clamp(min=1)  # of x
        velocity = self.velocity(sample, timestep / 1000, states, self.told(guidance, sample.shape[0]))
        return velocity + share[:, None, None, None] * sample

    def split(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens' states [R, L, D] and the pooled ones [R, P]."""
        return states[:, : self._tokens], states[:, self._tokens, : self._pooled_width]


def check_whole_tokens(parts: Parts, height: int, width: int) -> None:
    """Raise ExportError unless latents of that size are a whole number of image tokens each way."""
    if height % PATCH or width % PATCH:
        raise ExportError(
            f"{parts.id} has no tokens for {parts.size(height, width)}: give a --size in steps of "
            f"{PATCH * parts.vae_scale} pixels."
        )


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Return latents [R, C, H, W] as tokens [R, S, C · 4], each of two by two latent pixels, as pipelines pack them."""
    _, channels, height, width = latents.shape
    patches = latents.reshape(-1, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Return the latents [R, C, H, W] of tokens, of a shape C, H, W."""
    channels, height, width = shape
    patches = tokens.reshape(-1, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)
