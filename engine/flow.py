"""What export and run time both compute of flow-matching models (docs/methods.md §9)."""

from typing import Any, Final

PATCH: Final = 2  # latent pixels of an image token in each direction, in all transformers known here


def size_shift(config: Any, latent_shape: tuple[int, int, int]) -> float:
    """Return mu, the shift of noise levels for a picture: linear in its tokens, through two points.

    Args:
        config: of diffusers' scheduler: its base_shift and max_shift are at base_image_seq_len and max_image_seq_len.
        latent_shape: C, H, W.
    """
    _, height, width = latent_shape
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (height * width // PATCH**2 - config.base_image_seq_len))
