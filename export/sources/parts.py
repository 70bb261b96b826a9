"""What a checkpoint is made of, wherever it comes from."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class Parts:
    """What a diffusers pipeline is made of, as far as prompts are concerned.

    Modules are fp32, in evaluation mode, without gradients.
    """

    id: str  # folder name, "org/name@commit" or file name; with " + FILE:scale" for each LoRA
    sha256: str  # over names and hashes of all files read
    unet: Any  # UNet2DConditionModel
    text_encoders: list[Any]  # CLIPTextModel; SDXL: and CLIPTextModelWithProjection
    tokenizers: list[Any]  # transformers' fast tokenizers, as many
    scheduler: dict[str, Any]  # scheduler_config.json
    zeros_for_empty: bool  # of SDXL: model_index.json's force_zeros_for_empty_prompt


def hash_of(files: Iterable[tuple[str, str]]) -> str:
    """Return the SHA-256 over (name, SHA-256) of files, whatever their order."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(files)).encode()).hexdigest()
