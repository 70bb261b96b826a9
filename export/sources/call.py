"""How the pipeline will be called: what changes a transformer's predictions, and stands in no configuration."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memedge.engine.errors import ExportError
from memedge.export.sources import weights
from memedge.export.sources.architectures import Architecture
from memedge.export.sources.checkpoint import VAE_SCALE


@dataclass(frozen=True)
class Call:
    """The arguments of a pipeline's call that an engine is for; None: as where nobody says.

    Attributes:
        size: height and width of the pictures, in pixels. UNets have one size.
        max_sequence_length: the most tokens that T5 or a language model is given.
        guidance: the scale that a distilled model is told.
    """

    size: tuple[int, int] | None = None
    max_sequence_length: int | None = None
    guidance: float | None = None

    def settings(self, architecture: Architecture, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Return what Parts has of it.

        Args:
            architecture: the family.
            config: the denoiser's configuration.
            folder: of the model.

        Raises:
            ExportError: the model has no use for one of them.
        """
        name = architecture.name
        if self.size is not None and not architecture.denoiser.flow:
            raise ExportError(f"A size is for transformers, and {name} has a UNet of one size: leave --size out.")
        if self.max_sequence_length is not None and not architecture.denoiser.flow:
            raise ExportError(f"{name} reads as many tokens as CLIP does: leave --max-sequence-length out.")
        if self.max_sequence_length is not None and self.max_sequence_length < 1:
            raise ExportError(f"--max-sequence-length is {self.max_sequence_length}: give at least 1.")
        told = bool(config.get("guidance_embeds") or config.get("time_cond_proj_dim"))
        if self.guidance is not None and not told:
            raise ExportError(f"This {name} is not told a guidance scale: leave --guidance out.")
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise ExportError(f"--guidance is {self.guidance}: give the pipeline's guidance_scale, at least 0.")
        scale = _vae_scale(folder) if architecture.denoiser.flow else VAE_SCALE
        lengths = (encoder.length and (self.max_sequence_length or encoder.length) for encoder in architecture.encoders)
        return {
            "lengths": tuple(lengths),
            "max_sequence_length": self.max_sequence_length,
            "latent_size": None if self.size is None else _latent_size(self.size, scale),
            "vae_scale": scale,
            "guidance": (self.guidance if self.guidance is not None else architecture.guidance) if told else None,
        }


AS_PUBLISHED = Call()


def _latent_size(size: tuple[int, int], scale: int) -> tuple[int, int]:
    height, width = size
    if min(size) < 1 or height % scale or width % scale:
        raise ExportError(f"--size is {width}x{height}: give multiples of {scale} pixels.")
    return height // scale, width // scale


def _vae_scale(folder: Path) -> int:
    """Return how many pixels a latent pixel stands for in each direction, by the VAE's configuration if it is there."""
    path = folder / "vae" / "config.json"
    config = weights.read_json(path) if path.is_file() else {}
    if isinstance(stages := config.get("temperal_downsample"), list):  # Qwen-Image's, in its library's spelling
        return int(2 ** len(stages))
    stages = config.get("block_out_channels")
    return int(2 ** (len(stages) - 1)) if isinstance(stages, list) else VAE_SCALE
