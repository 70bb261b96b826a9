"""Reading a diffusers-format directory: modules, tokenizer, noise schedule, and a hash of what was read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from transformers import AutoTokenizer, CLIPTextModel

from memedge.engine.directory import sha256
from memedge.engine.errors import ExportError
from memedge.engine.manifest import PredictionType

INFERENCE_STEPS = 50  # the published detector's DDIM run, from which both timesteps are taken (METHODS.md, notation)
PARTS = ("unet", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; modules are fp32 and in evaluation mode."""

    id: str
    sha256: str
    unet: Any
    text_encoder: Any
    tokenizer: Any
    prediction_type: PredictionType
    timesteps: tuple[int, int]
    alphas_cumprod: tuple[float, float]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.unet.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @property
    def tokens(self) -> int:
        return int(self.tokenizer.model_max_length)

    @property
    def state_width(self) -> int:
        return int(self.text_encoder.config.hidden_size)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a diffusers-format directory (unet, text_encoder, tokenizer, scheduler).

    Raises:
        ExportError: no such directory, a part is missing or cannot be loaded, or a weight is not finite.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a directory: give the folder of a diffusers-format model.")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise ExportError(f"{folder} holds no {missing[0]} folder, so it is not a diffusers-format model.")
    try:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, local_files_only=True)
        text_encoder = CLIPTextModel.from_pretrained(
            folder / "text_encoder", dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", use_fast=True, local_files_only=True)
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    except Exception as error:  # diffusers, transformers and safetensors raise what they please for a broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"{folder} cannot be loaded ({reason}): check that it is complete.") from error
    unet.set_attn_processor(AttnProcessor2_0())
    for part, module in (("unet", unet), ("text_encoder", text_encoder)):
        module.eval().requires_grad_(False)
        for name, value in module.state_dict().items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ExportError(f"{folder / part} holds NaN or infinity in {name!r}: the checkpoint is damaged.")
    prediction_type: PredictionType = scheduler.config.prediction_type
    if prediction_type not in get_args(PredictionType):
        raise ExportError(f"{folder} predicts {prediction_type!r}: memedge knows epsilon and v_prediction.")
    scheduler.set_timesteps(INFERENCE_STEPS)
    timesteps = (int(scheduler.timesteps[0]), int(scheduler.timesteps[-3]))
    alphas = tuple(float(scheduler.alphas_cumprod[t]) for t in timesteps)
    return Checkpoint(
        id=folder.resolve().name,
        sha256=_weights_hash(folder),
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        prediction_type=prediction_type,
        timesteps=timesteps,
        alphas_cumprod=(alphas[0], alphas[1]),
    )


def _weights_hash(folder: Path) -> str:
    """Return the SHA-256 over names and hashes of all files of the four parts, in sorted order."""
    digest = hashlib.sha256()
    for path in sorted(p for part in PARTS for p in (folder / part).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()
