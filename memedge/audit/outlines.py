"""A picture's outlines as a vector. Plain backgrounds have none, so they do not count.

At each pixel the gradient's direction, doubled so that light on dark is as dark on light, weighs as much as there is an
edge: w (cos 2θ, sin 2θ), with w = m² / (m² + EDGE²) of the gradient's length m over the three channels. The field is
blurred, so that a pixel's shift costs little, and taken at every other pixel. The similarity of two pictures is the
cosine between their fields: 1 for the same outlines in other colours or on another background, about 0 for others.
"""

import torch
import torch.nn.functional as F

from memedge.autograd.diffusion_model import Pictures

SIDE = 64  # pixels; larger pictures are scaled down
EDGE = 0.15  # a gradient's length, of values in [0, 1], that counts by half
BLUR = 1.5  # pixels, the Gaussian's standard deviation
STRIDE = 2
CHUNK = 1024


def outlines(pictures: Pictures) -> torch.Tensor:
    """Return the pictures' fields, unit vectors float32 [N, 2 · 32 · 32], of uint8 pictures [N, S, S, 3]."""
    parts = [_outlines(torch.from_numpy(pictures[start : start + CHUNK])) for start in range(0, len(pictures), CHUNK)]
    return torch.cat(parts)


def _outlines(pictures: torch.Tensor) -> torch.Tensor:
    values = pictures.permute(0, 3, 1, 2).float() / 255
    if values.shape[-1] != SIDE:
        values = F.interpolate(values, [SIDE, SIDE], mode="bilinear", antialias=True, align_corners=False)
    values = F.pad(values, (1, 1, 1, 1), mode="replicate")
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
