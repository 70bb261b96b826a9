"""Copy detection: how similar two pictures are, by their edges. Plain backgrounds have none, so they do not count.

At each pixel the gradient's direction, doubled so that light on dark is as dark on light, weighs as much as there is an
edge: w (cos 2θ, sin 2θ), with w = m² / (m² + EDGE²) of the gradient's length m over the three channels. The field is
blurred, so that a pixel's shift costs little, and taken at every other pixel. The similarity of two pictures is the
cosine between their fields: 1 for the same outlines in other colours or on another background, about 0 for others.

Training pictures are taken as the VAE gives them back, since no generation can be sharper: by 200 pairs judged by eye
(judge.py), that tells copies better, with an AUC of .949 instead of .923.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from vae import decode

EDGE = 0.15  # a gradient's length, of values in [0, 1], that counts by half
BLUR = 1.5  # pixels, the Gaussian's standard deviation
STRIDE = 2
CHUNK = 1024


def fields(pictures: np.ndarray) -> torch.Tensor:
    """Return the pictures' fields, unit vectors float32 [N, 2 · 32 · 32], of uint8 pictures [N, 64, 64, 3]."""
    parts = [_fields(torch.from_numpy(pictures[start : start + CHUNK])) for start in range(0, len(pictures), CHUNK)]
    return torch.cat(parts)


def _fields(pictures: torch.Tensor) -> torch.Tensor:
    values = F.pad(pictures.permute(0, 3, 1, 2).float() / 255, (1, 1, 1, 1), mode="replicate")
    dx = (values[:, :, 1:-1, 2:] - values[:, :, 1:-1, :-2]) / 2
    dy = (values[:, :, 2:, 1:-1] - values[:, :, :-2, 1:-1]) / 2
    squared = (dx.square() + dy.square()).sum(1)
    # The structure tensor of the three channels: its length is at most `squared`, and equal where they agree.
    doubled = torch.stack([(dx.square() - dy.square()).sum(1), (2 * dx * dy).sum(1)], 1)
    field = doubled / (squared + EDGE**2)[:, None]
    reach = 3 * STRIDE
    kernel = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * BLUR**2))
    kernel = (kernel / kernel.sum()).expand(2, 1, 1, -1)
    field = F.conv2d(field, kernel, padding=(0, reach), groups=2)
    field = F.conv2d(field, kernel.transpose(2, 3), padding=(reach, 0), groups=2)
    return F.normalize(field[:, :, ::STRIDE, ::STRIDE].flatten(1))


def printed(vae: AutoencoderKL, latents: np.ndarray) -> torch.Tensor:
    """Return the fields of training pictures as the VAE gives them back, of their latents [N, 4, 16, 16]."""
    return fields(decode(vae, torch.from_numpy(latents.astype(np.float32))))


def nearest(of: torch.Tensor, among: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for fields [N, D], the highest similarity among fields [M, D] and whose it is, [N] each."""
    best = [(part @ among.T).max(1) for part in of.split(CHUNK)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
