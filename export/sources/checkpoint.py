"""A model to export: what the export needs of it, whatever form it came in."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tokenizers import Tokenizer

from memedge.export.sources.architectures import Architecture

VAE_SCALE = 8  # pixels per latent pixel in each direction, of every Stable Diffusion, and where no VAE says otherwise


class Checkpoint(Protocol):
    """A checkpoint whose weights are float32.

    `encode` and `predict` are the truth that the engine is compared with: the model as its authors' own libraries run
    it. They are not called any more once `unet_graph` was.

    Attributes:
        architecture: its family.
        id: what people call it.
        sha256: over the names and hashes of all files that were read.
        tokenizers: T of them, one for each text encoder.
        lengths: those that each pads and cuts prompts to.
        tokens: L, the rows of states.
        pooled_width: P, of the pooled states; 0 in models that have none.
        state_width: D.
        latent_shape: C, H, W.
        scheduler: scheduler_config.json as it stands.
        masked: whether the last column of the states is 1 at tokens that are there, and 0 behind them.
        guidance: the scale that a distilled model is told; None: it isn't.
        notes: what is unusual about it, in sentences.
    """

    architecture: Architecture
    id: str
    sha256: str
    tokenizers: Sequence[Tokenizer]
    lengths: tuple[int, ...]
    tokens: int
    pooled_width: int
    state_width: int
    latent_shape: tuple[int, int, int]
    scheduler: Mapping[str, Any]
    masked: bool = False
    guidance: float | None = None
    notes: tuple[str, ...]

    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the states [B, K, D] of ids [B, I]; K is L, and one more with pooled states, in the last row."""

    def predict(
        self, sample: npt.NDArray[np.float32], timestep: int, states: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Return the denoiser's output [C, H, W] for latents [C, H, W] and states [K, D]."""

    def text_encoder_graph(self) -> ir.Model:
        """Return the graph ids int64 [prompts, I] → states float32 [prompts, K, D]."""

    def unet_graph(self) -> ir.Model:
        """Return the graph of the UNet in float32, all shapes static but for their first dimensions.

        sample [rows, C, H, W], timestep, states [prompts, K, D], prompt int64 [rows] → prediction [rows, C, H, W]: row
        r is for states[prompt[r]]. Of a model that is told a guidance scale also guidance, float64 [rows].
        """


def latent_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return C, H, W of a UNet's latents; its configuration was checked (check_traits.py)."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(config["in_channels"]), int(height), int(width)


def time_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return what a UNet is told about the picture by its time ids: original size, no cropping, size; all in pixels."""
    _, height, width = latent_shape(config)
    pixels = (VAE_SCALE * height, VAE_SCALE * width)
    return (*pixels, 0, 0, *pixels)
