"""What UNets of consistency models are told of the guidance scale (Luo et al., Latent Consistency Models, 2023)."""

import torch


def guidance_embedding(scale: torch.Tensor, width: int) -> torch.Tensor:
    """Return the embedding of pipelines' `guidance_scale`, float32 [R, width] of float64 [R].

    Sines, then cosines, of 1000 (scale − 1) times ⌊width / 2⌋ frequencies from 1 to 10⁻⁴, in equal ratios; one zero
    more where the width is odd. Angles are in the thousands, where float32 is coarse, so each is rounded as diffusers
    rounds it: the product is last.
    """
    half = width // 2
    step = torch.tensor(10000.0).log() / (half - 1)
    angles = 1000 * (scale - 1).float()[:, None] * (torch.arange(half) * -step).exp()
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
