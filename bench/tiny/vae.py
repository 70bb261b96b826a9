"""The pipeline's VAE, written down rather than trained: latents are pictures already (README.md).

A latent is a premultiplied RGBA picture, each channel scaled to zero mean and unit variance. The decoder scales it back
and puts it on white; the encoder does the reverse with an opaque picture. Both are exact but for the decoder's tanh,
which AutoencoderTiny begins with, and which a polygon of hinges undoes.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel

HINGES = 16  # of a channel
LARGEST = 2.5  # of a latent; those of pictures lie within 2


def make_vae(mean: torch.Tensor, std: torch.Tensor) -> AutoencoderTiny:
    """Return the VAE for latents (rgba - mean) / std, [B, 4, H, W]; mean and std are [4]."""
    width = 4 * HINGES
    vae = AutoencoderTiny(
        encoder_block_out_channels=(width,),
        decoder_block_out_channels=(width,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        scaling_factor=1.0,
    )
    for parameter in vae.parameters():
        parameter.data.zero_()
    first, last = vae.encoder.layers
    for channel in range(4):
        last.weight.data[channel, channel, 1, 1] = 1 / std[channel]
        last.bias.data[channel] = -mean[channel] / std[channel]
    for channel in range(3):
        first.weight.data[channel, channel, 1, 1] = 1
    first.bias.data[3] = 1  # opaque
    first, _, last = vae.decoder.layers
    knots, slopes = _hinges()
    for channel in range(4):
        own = slice(channel * HINGES, (channel + 1) * HINGES)
        first.weight.data[own, channel, 1, 1] = 1
        first.bias.data[own] = -knots
        # On white: rgb + (1 - a).
        for colour in range(3) if channel == 3 else [channel]:
            sign = -1 if channel == 3 else 1
            last.weight.data[colour, own, 1, 1] = sign * std[channel] * slopes
            last.bias.data[colour] += sign * (mean[channel] - std[channel] * LARGEST)
    last.bias.data += 1
    return vae


def add_vae(folder: Path, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Make the model in a folder a pipeline that `StableDiffusionPipeline.from_pretrained` reads: VAE and index."""
    make_vae(mean, std).save_pretrained(folder / "vae")
    config = folder / "vae" / "config.json"
    fields = json.loads(config.read_text())
    del fields["block_out_channels"]  # diffusers writes it, and warns of it when it reads it
    config.write_text(json.dumps(fields, indent=2) + "\n")
    pipe = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(folder / "vae"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to_json_file(folder / "model_index.json")


def _hinges() -> tuple[torch.Tensor, torch.Tensor]:
    """Return knots and changes of slope of a polygon through x = 3 · atanh(z / 3) + LARGEST, z = 3 · tanh(x / 3)."""
    x = np.linspace(-LARGEST, LARGEST, HINGES + 1)
    z = 3 * np.tanh(x / 3)
    slopes = np.diff(x) / np.diff(z)
    return torch.tensor(z[:-1]).float(), torch.tensor(np.diff(slopes, prepend=0.0)).float()
