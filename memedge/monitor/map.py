"""Where an image is copied: Σ over channels of Δ² at each pixel (docs/methods.md §7)."""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from memedge.engine.errors import InputError

# Of the shorter side: 13 of 64 latents, as published for Stable Diffusion 1.4.
WINDOW = 13 / 64


def smoothed(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the mean over a square window about each pixel of [B, H, W], cut off at the edges."""
    reach = int(WINDOW * min(values.shape[1:]) / 2)
    for axis in (1, 2):
        size = values.shape[axis]
        sums = np.insert(np.cumsum(values, axis, dtype=np.float64), 0, 0, axis)
        low, high = (np.clip(np.arange(size) + by, 0, size) for by in (-reach, reach + 1))
        count = (high - low).reshape([-1 if at == axis else 1 for at in range(3)])
        values = ((np.take(sums, high, axis) - np.take(sums, low, axis)) / count).astype(np.float32)
    return values


def enlarged(values: npt.NDArray[np.float32], size: Any) -> npt.NDArray[np.float32]:
    """Return maps [B, H, W] in another size, (height, width), between the pixels linearly.

    Raises:
        InputError: the size is not two whole numbers above 0.
    """
    try:
        height, width = (int(side) for side in size)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise InputError(f"size is {size!r}: give the image's (height, width), in pixels.")
    images = [Image.fromarray(one).resize((width, height), Image.Resampling.BILINEAR) for one in values]
    return np.stack([np.asarray(image, dtype=np.float32) for image in images])
