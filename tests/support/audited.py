"""A whole random checkpoint, with a VAE; and training pictures with their captions in files."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from models import make_checkpoint
from PIL import Image

SIDE = 16  # of its pictures: its latents are 8 × 8


def make_whole_checkpoint(folder: Path, prediction_type: str = "epsilon", poison: float | None = None) -> Path:
    """Write models.make_checkpoint's, and a VAE that halves the sides, with a scaling factor of its own."""
    make_checkpoint(folder, prediction_type, poison=poison)
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    vae.save_pretrained(folder / "vae")
    return folder


def write_pairs(folder: Path, captions: Sequence[str], memorized: Sequence[str] = (), side: int = SIDE) -> Path:
    """Write a random picture for each caption, and captions.csv; return that file."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "caption", "memorized"))
        for place, caption in enumerate(captions):
            picture = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"{place}.png")
            table.writerow((f"{place}.png", caption, memorized[place] if memorized else ""))
    return folder / "captions.csv"
