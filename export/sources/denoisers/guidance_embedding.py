"""What UNets of consistency models are told of the guidance scale (Luo et al., Latent Consistency Models, 2023)."""

import torch


def guidance_embedding(scale: float, width: int) -> torch.Tensor:
    """Return the embedding of a pipeline's `guidance_scale`, float32 [1, width].

    Sines, then cosines, of 1000 (scale − 1) times ⌊width / 2⌋ frequencies from 1 to 10⁻⁴, in equal ratios; one zero
    more where the width is odd. Angles are in the thousands, where float32 is coarse, so each is rounded as diffusers
    rounds it: the product is last.
    """
    half = width // 2
    step = torch.tensor(10000.0).log() / (half - 1)
    angles = 1000 * torch.tensor(scale - 1) * (torch.arange(half) * -step).exp()
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))[None]
