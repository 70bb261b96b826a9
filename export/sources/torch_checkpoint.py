"""A checkpoint of torch modules, as diffusers holds them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from memedge.engine.errors import ExportError
from memedge.export.graphs import permutations
from memedge.export.sources import checkpoint
from memedge.export.sources.architectures import wrapper
from memedge.export.sources.denoisers.denoiser import Denoiser
from memedge.export.sources.parts import Parts
from memedge.export.sources.text.text_encoders import TextEncoders
from memedge.export.sources.tokenizers import empty_ids, padding_tokenizers
from memedge.export.sources.trace import trace


class TorchCheckpoint(checkpoint.Checkpoint):
    """See Checkpoint; the graphs are traced from the very modules that `encode` and `predict` run."""

    def __init__(self, parts: Parts):
        """Take the modules over.

        Raises:
            ExportError: a weight is not finite, or the parts don't fit.
        """
        for module in parts.modules.values():
            _check_finite(module)
        self.id, self.sha256, self.architecture = parts.id, parts.sha256, parts.architecture
        self.scheduler: Mapping[str, Any] = parts.scheduler
        self.notes = parts.notes
        self.tokenizers, self.lengths = padding_tokenizers(parts.tokenizers, parts.lengths, parts.templates)
        empty = empty_ids(self.tokenizers) if parts.zeros_for_empty else None
        text = wrapper("text", self.architecture.wrapper)
        self._text_encoders: TextEncoders = text(parts, self.lengths, empty).eval()
        self.tokens = self._text_encoders.tokens
        self.state_width, self.pooled_width = self._text_encoders.state_width, self._text_encoders.pooled_width
        self.masked, self.guidance = self._text_encoders.masked, parts.guidance
        denoiser = wrapper("denoisers", self.architecture.denoiser.wrapper)
        self._denoiser: Denoiser = denoiser(parts, self.tokens, self.pooled_width).eval()
        self.latent_shape = self._denoiser.latent_shape
        if self.state_width != self._denoiser.state_width:
            raise ExportError(
                f"The text encoder gives states of width {self.state_width}, and the {self.architecture.network} "
                f"takes {self._denoiser.state_width}: these are parts of different models."
            )

    @torch.inference_mode()
    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        states: npt.NDArray[np.float32] = self._text_encoders(torch.from_numpy(ids)).numpy()
        return states

    @torch.inference_mode()
    def predict(
        self, sample: npt.NDArray[np.float32], timestep: int, states: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        prediction: npt.NDArray[np.float32] = self._denoiser(
            torch.from_numpy(sample[None]), torch.tensor([timestep]), torch.from_numpy(states[None])
        )[0].numpy()
        return prediction

    def text_encoder_graph(self) -> ir.Model:
        self._text_encoders.make_exportable()
        example = {"ids": torch.zeros(2, sum(self.lengths), dtype=torch.int64)}
        return trace(self._text_encoders, example, {"ids": "prompts"}, "states")

    def unet_graph(self) -> ir.Model:
        self._denoiser.make_exportable()
        example = {
            "sample": torch.zeros(3, *self.latent_shape),
            "timestep": torch.tensor([1, 2, 3]),
            "states": torch.zeros(2, self.tokens + (self.pooled_width > 0), self.state_width),
            "prompt": torch.tensor([0, 1, 1]),
        }
        if self.guidance is not None:
            example["guidance"] = torch.full((3,), self.guidance, dtype=torch.float64)
        axes = dict.fromkeys(example, "rows") | {"states": "prompts"}
        graph = trace(self._denoiser, example, axes, "prediction")
        permutations.rewrite(graph)
        return graph


def _check_finite(module: Any) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            kind = type(module).__name__
            raise ExportError(f"The {kind} holds NaN or infinity in {name!r}: the checkpoint is damaged.")
