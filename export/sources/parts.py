"""What a checkpoint is made of, wherever it comes from."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from memedge.export.sources.architectures import Architecture


@dataclass
class Parts:
    """What a diffusers pipeline is made of, as far as prompts are concerned.

    Modules are fp32, in evaluation mode, without gradients.
    """

    id: str  # folder name, "org/name@commit" or file name; with " + FILE:scale" for each LoRA
    sha256: str  # over names and hashes of all files read
    architecture: Architecture
    unet: Any  # UNet2DConditionModel
    text_encoders: list[Any]  # the architecture's
    tokenizers: list[Any]  # transformers' fast tokenizers, as many
    scheduler: dict[str, Any]  # scheduler_config.json
    zeros_for_empty: bool  # whether ε_0 is of zeros, not of the empty prompt's states
    notes: tuple[str, ...]  # what is unusual, in sentences

    @property
    def modules(self) -> dict[str, Any]:
        """The UNet and the text encoders, by their names in a pipeline."""
        return dict(zip(self.architecture.modules, [self.unet, *self.text_encoders], strict=True))


def hash_of(files: Iterable[tuple[str, str]]) -> str:
    """Return the SHA-256 over (name, SHA-256) of files, whatever their order."""
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(files)).encode()).hexdigest()
