"""What every denoiser is to the export, whatever the family."""

import torch
from torch import nn


class Denoiser(nn.Module):
    """sample [R, C, H, W], timestep int64 [R], states [B, K, D], prompt int64 [R] → prediction [R, C, H, W].

    Row r is for the states of prompt[r]. Call it without `prompt`; R is B then. After `make_exportable` it can be
    exported, with `prompt`, and no longer be called.

    Attributes:
        latent_shape: C, H, W.
        state_width: D, of the states that it takes.
    """

    latent_shape: tuple[int, int, int]
    state_width: int

    def make_exportable(self) -> None:
        """Take attention that exports well, and can't be called."""
        raise NotImplementedError

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor, prompt: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise NotImplementedError
