"""What a diffusers pipeline is made of, as far as prompts are concerned."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from memedge.engine.directory import sha256
from memedge.engine.errors import ExportError

PARTS = ("unet", "text_encoder", "tokenizer", "scheduler")


@dataclass
class Parts:
    """Modules are float32, in evaluation mode, without gradients."""

    id: str
    sha256: str
    unet: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler: dict[str, Any]
    zeros_for_empty: bool


def load_parts(model: str) -> Parts:
    folder = Path(model)
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a directory: give the folder of a diffusers-format model.")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise ExportError(f"{folder} holds no {missing[0]} folder, so it is not a diffusers-format model.")
    second = (folder / "text_encoder_2").is_dir()
    try:
        local = {"local_files_only": True}
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, **local)
        encoders = [CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32, **local)]
        tokenizers = [AutoTokenizer.from_pretrained(folder / "tokenizer", use_fast=True, **local)]
        if second:
            encoders.append(
                CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32, **local)
            )
            tokenizers.append(AutoTokenizer.from_pretrained(folder / "tokenizer_2", use_fast=True, **local))
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    except Exception as error:  # diffusers, transformers and safetensors raise what they please for a broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"{folder} cannot be loaded ({reason}): check that it is complete.") from error
    for module in (unet, *encoders):
        module.eval().requires_grad_(False)
    index = folder / "model_index.json"
    zeros = bool(json.loads(index.read_text()).get("force_zeros_for_empty_prompt")) if index.is_file() else False
    return Parts(folder.resolve().name, _weights_hash(folder), unet, encoders, tokenizers, scheduler, zeros)


def _weights_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for part in PARTS for p in (folder / part).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()
