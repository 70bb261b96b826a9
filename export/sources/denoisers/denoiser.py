"""What every denoiser is to the export, whatever the family."""

import torch
from torch import nn


class Denoiser(nn.Module):
    """sample [R, C, H, W], timestep int64 [R], states [B, K, D], prompt int64 [R] → prediction [R, C, H, W].

    Row r is for the states of prompt[r]. Call it without `prompt`; R is B then. After `make_exportable` it can be
    exported, with `prompt`, and no longer be called. Distilled models are told a guidance scale in each row, float64
    [R], so that it is rounded where pipelines round it; where nobody says, it is the checkpoint's.

    Attributes:
        latent_shape: C, H, W.
        state_width: D, of the states that it takes.
    """

    guidance: torch.Tensor | None  # float64 [1]; None: it isn't told any
    latent_shape: tuple[int, int, int]
    state_width: int

    def __init__(self, guidance: float | None):
        super().__init__()
        scale = None if guidance is None else torch.tensor([guidance], dtype=torch.float64)
        self.register_buffer("guidance", scale)

    def make_exportable(self) -> None:
        """Take attention that exports well, and can't be called."""
        raise NotImplementedError

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        states: torch.Tensor,
        prompt: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        raise NotImplementedError

    def told(self, guidance: torch.Tensor | None, rows: int) -> torch.Tensor | None:
        """Return the scale that each row is told, [R]: the checkpoint's where nobody says; None if there is none."""
        return guidance if guidance is not None or self.guidance is None else self.guidance.expand(rows)
