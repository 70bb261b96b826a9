"""Train the VAE on all pictures. Run the same command again after a kill (SIGTERM saves first).

    python bench/tiny/train_vae.py DATA_DIR

Prints samples, mean absolute error (of pictures in [-1, 1]), throughput and time left. Writes DATA_DIR/vae (diffusers'
format, half precision), DATA_DIR/latents.npy (float16 [N, 4, 16, 16], of all pictures) and DATA_DIR/vae.png, pictures
above their reconstructions.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from loop import Training, run
from PIL import Image
from vae import LATENT_CHANNELS, LATENT_SIZE, decode, encode, load_vae, make_vae, standardise, to_unit

BATCH = 16
LEARNING_RATE = 1e-3
AVERAGE = 0.998
SQUARED = 4.0  # weight of the squared error: L1 alone leaves small areas grey whose colour is hard to tell
EDGES = 1.0  # weight of the error of differences between neighbours: L1 alone leaves outlines soft
KL = 1e-4  # keeps latents from growing, and the decoder steady where latents are a little off
JUDGED = 2000  # pictures that the PSNR is of
SHOWN, COLUMNS = 96, 24  # of the sheet


class VaeTraining(Training):
    def __init__(self, pictures: np.ndarray, vae: AutoencoderKL, seed: int, workers: int):
        for_cpu(vae)
        parameters = list(vae.parameters())
        super().__init__(parameters, parameters, seed, BATCH, LEARNING_RATE, AVERAGE, workers)
        self.pictures, self.vae = torch.from_numpy(pictures), vae

    def draw(self) -> tuple[torch.Tensor, ...]:
        """Return pictures [B, 64, 64, 3] and the latents' noise [B, 4, 16, 16]."""
        index = torch.randint(len(self.pictures), (self.batch,), generator=self.generator)
        shape = (self.batch, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
        return self.pictures[index], torch.randn(shape, generator=self.generator)

    def loss(self, *part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pictures, noise = part
        unit = to_unit(pictures).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latent = self.vae.encode(unit).latent_dist
            made = self.vae.decode(latent.mean + latent.std * noise).sample.float()
        error = made - unit
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        mean, log_variance = latent.mean.float(), latent.logvar.float()
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        absolute = error.abs().mean((1, 2, 3))
        return absolute.mean() + SQUARED * error.square().mean() + EDGES * edges + KL * kl, absolute


def for_cpu(module: torch.nn.Module) -> None:
    """Lay a module out with channels last, as the CPU's convolutions are fastest, but for group norms.

    Their backward pass in bf16 is seven times slower with channels last than two copies and the plain one.
    """
    module.to(memory_format=torch.channels_last)
    for norm in module.modules():
        if isinstance(norm, torch.nn.GroupNorm):
            norm.forward = _planar(norm)


def _planar(norm: torch.nn.GroupNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        planar = F.group_norm(x.contiguous(), norm.num_groups, norm.weight, norm.bias, norm.eps)
        return planar.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else planar

    return forward


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratios [N], in decibels, of uint8 pictures [N, 64, 64, 3]."""
    squared = (a.astype(np.float32) - b).reshape(len(a), -1)
    return 10 * np.log10(255**2 / np.square(squared).mean(1).clip(1e-3))


def sheet(pictures: np.ndarray, made: np.ndarray) -> Image.Image:
    """Return rows of pictures, each above the row of their reconstructions."""
    rows = [
        np.concatenate(list(part[start : start + COLUMNS]), axis=1)
        for start in range(0, len(pictures), COLUMNS)
        for part in (pictures, made)
    ]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=int, default=70_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="threads, each with a part of the batch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    pictures = np.load(arguments.data / "pictures.npz")["pictures"]
    training = VaeTraining(pictures, make_vae(), arguments.seed, arguments.workers)
    if not run(training, arguments.samples, arguments.data / "vae.pt"):
        return
    torch.set_num_threads(arguments.workers)
    training.set_parameters(training.average)
    standardise(training.vae, encode(training.vae, pictures))
    training.vae.half().save_pretrained(arguments.data / "vae")

    vae = load_vae(arguments.data / "vae")  # what half precision has left
    latents = encode(vae, pictures)
    np.save(arguments.data / "latents.npy", latents.astype(np.float16))
    some = np.random.default_rng(0).choice(len(pictures), JUDGED, replace=False)
    made = decode(vae, torch.from_numpy(latents[some]))
    quality = psnr(pictures[some], made)
    print(f"{sum(p.numel() for p in vae.parameters())} parameters")
    print(f"PSNR {quality.mean():.1f} dB, of the worst twentieth under {np.quantile(quality, 0.05):.1f}")
    print(f"latents: mean {latents.mean((0, 2, 3)).round(3)}, standard deviation {latents.std((0, 2, 3)).round(3)}")
    sheet(pictures[some[:SHOWN]], made[:SHOWN]).save(arguments.data / "vae.png", optimize=True)


if __name__ == "__main__":
    main()
