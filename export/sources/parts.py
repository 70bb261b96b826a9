"""What a checkpoint is made of, wherever it comes from."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from memedge.export.sources.architectures import Architecture
from memedge.export.sources.checkpoint import VAE_SCALE
from memedge.export.sources.templates import Template


@dataclass
class Parts:
    """What a diffusers pipeline is made of, as far as prompts are concerned.

    Modules are fp32, in evaluation mode, without gradients.
    """

    id: str  # folder name, "org/name@commit" or file name; with " + FILE:scale" for each LoRA
    sha256: str  # over names and hashes of all files read
    architecture: Architecture
    denoiser: Any  # the architecture's: a UNet2DConditionModel or a transformer
    text_encoders: list[Any]  # the architecture's
    tokenizers: list[Any]  # transformers' fast tokenizers, as many
    scheduler: dict[str, Any]  # scheduler_config.json
    zeros_for_empty: bool  # whether ε_0 is of zeros, not of the empty prompt's states
    notes: tuple[str, ...]  # what is unusual, in sentences
    templates: tuple[Template | None, ...] = ()  # what stands around prompts for each text encoder; left out: nothing
    lengths: tuple[int | None, ...] = ()  # the most tokens for each text encoder; None or left out: its tokenizer's own
    max_sequence_length: int | None = None  # what those lengths were said to be
    latent_size: tuple[int, int] | None = None  # height and width of the latents; None: the model's own
    vae_scale: int = VAE_SCALE  # how many pixels a latent pixel stands for in each direction
    guidance: float | None = None  # the scale that a distilled model is told

    @property
    def modules(self) -> dict[str, Any]:
        """The denoiser and the text encoders, by their names in a pipeline."""
        return dict(zip(self.architecture.modules, [self.denoiser, *self.text_encoders], strict=True))

    def size(self, height: int, width: int) -> str:
        """Return what --size is for latents of that many pixels."""
        return f"{width * self.vae_scale}x{height * self.vae_scale}"


def hash_of(files: Iterable[tuple[str, str]]) -> str:
    """Return the SHA-256 over (name, SHA-256) of files, whatever their order."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(files)).encode()).hexdigest()
