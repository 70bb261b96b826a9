"""The VAE: 64 x 64 RGB pictures to 16 x 16 x 4 latents of zero mean and unit variance, and back; 1.4 M parameters."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from pictures import SIZE

LATENT_CHANNELS = 4
LATENT_SIZE = SIZE // 4
CHUNK = 64  # pictures encoded or decoded at once


def make_vae() -> AutoencoderKL:
    """Return an untrained VAE. Most of its time goes into 64 x 64 maps, so these have few channels."""
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(16, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """Return uint8 pictures [B, 64, 64, 3] as floats in [-1, 1], [B, 3, 64, 64]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_bytes(decoded: torch.Tensor) -> torch.Tensor:
    """Return floats in [-1, 1], [B, 3, 64, 64], as uint8 pictures [B, 64, 64, 3]."""
    return ((decoded + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


@torch.inference_mode()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """Return the latents, float32 [N, 4, 16, 16], of uint8 pictures [N, 64, 64, 3]: means, without noise."""
    chunks = torch.from_numpy(pictures).split(CHUNK)
    return torch.cat([vae.encode(to_unit(chunk)).latent_dist.mean for chunk in chunks]).numpy()


@torch.inference_mode()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> np.ndarray:
    """Return uint8 pictures [N, 64, 64, 3] of latents [N, 4, 16, 16]."""
    return torch.cat([to_bytes(vae.decode(chunk).sample) for chunk in latents.split(CHUNK)]).numpy()


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: np.ndarray) -> None:
    """Fold the channels' mean and standard deviation over these latents into the VAE's innermost convolutions.

    Its latents then have zero mean and unit variance with a scaling factor of 1, and its reconstructions stay.
    """
    mean = torch.from_numpy(latents.mean((0, 2, 3), dtype=np.float64)).float()
    std = torch.from_numpy(latents.std((0, 2, 3), dtype=np.float64)).float()
    inner = vae.quant_conv  # gives means, then logarithms of variances
    inner.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
    inner.bias[:LATENT_CHANNELS] = (inner.bias[:LATENT_CHANNELS] - mean) / std
    inner.bias[LATENT_CHANNELS:] -= 2 * std.log()
    outer = vae.post_quant_conv
    outer.bias += (outer.weight[:, :, 0, 0] * mean).sum(1)
    outer.weight *= std[None, :, None, None]


def load_vae(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
