"""A checkpoint of torch modules, as diffusers holds them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from memedge.engine.errors import ExportError
from memedge.export.sources import checkpoint, text_encoders
from memedge.export.sources.attention import FusedAttention
from memedge.export.sources.parts import Parts
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
        self.unet_config: Mapping[str, Any] = parts.unet.config
        self.tokenizers, self.tokens = padding_tokenizers(parts.tokenizers)
        parts.unet.set_attn_processor(AttnProcessor2_0())
        empty = empty_ids(self.tokenizers) if parts.zeros_for_empty else None
        wrapper = getattr(text_encoders, self.architecture.wrapper)
        self._text_encoders: text_encoders.TextEncoders = wrapper(parts.text_encoders, empty).eval()
        self.state_width, self.pooled_width = self._text_encoders.state_width, self._text_encoders.pooled_width
        self._unet = UNet(parts, self.tokens, self.pooled_width)
        expected = parts.unet.config.cross_attention_dim
        if self.state_width != expected:
            raise ExportError(
                f"The text encoder gives states of width {self.state_width}, and the UNet takes {expected}: these are "
                "parts of different models."
            )

    @torch.inference_mode()
    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        states: npt.NDArray[np.float32] = self._text_encoders(torch.from_numpy(ids)).numpy()
        return states

    @torch.inference_mode()
    def predict(
        self, sample: npt.NDArray[np.float32], timestep: int, states: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        prediction: npt.NDArray[np.float32] = self._unet(
            torch.from_numpy(sample[None]), torch.tensor([timestep]), torch.from_numpy(states[None])
        )[0].numpy()
        return prediction

    def text_encoder_graph(self) -> ir.Model:
        self._text_encoders.make_exportable()
        example = {"ids": torch.zeros(2, len(self.tokenizers) * self.tokens, dtype=torch.int64)}
        return trace(self._text_encoders, example, {"ids": "prompts"}, "states")

    def unet_graph(self) -> ir.Model:
        self._unet.make_exportable()
        shape = checkpoint.latent_shape(self.unet_config)
        example = {
            "sample": torch.zeros(3, *shape),
            "timestep": torch.tensor([1, 2, 3]),
            "states": torch.zeros(2, self.tokens + (self.pooled_width > 0), self.state_width),
            "prompt": torch.tensor([0, 1, 1]),
        }
        axes = {"sample": "rows", "timestep": "rows", "states": "prompts", "prompt": "rows"}
        return trace(self._unet, example, axes, "prediction")


class UNet(nn.Module):
    """sample [R, C, H, W], timestep int64 [R], states [B, K, D], prompt int64 [R] → prediction [R, C, H, W].

    Row r is for the states of prompt[r]. Call it without `prompt`; R is B then. After `make_exportable` it can be
    exported, with `prompt`, and no longer be called.
    """

    time_ids: torch.Tensor  # [1, 6]

    def __init__(self, parts: Parts, tokens: int, pooled_width: int):
        """Take the UNet of parts whose states have `tokens` rows, and one more if there is a pooled state.

        Raises:
            ExportError: it takes something else besides than its family's UNets.
        """
        super().__init__()
        self.unet = parts.unet
        self._tokens, self._pooled_width = tokens, pooled_width
        config = parts.unet.config
        if config.addition_embed_type != parts.architecture.addition_embed_type:
            raise ExportError(
                f"The UNet of {parts.id} takes additional embeddings of type {config.addition_embed_type!r}, and its "
                f"text encoders are those of {parts.architecture.name}: a part is missing, so get it again."
            )
        if pooled_width:
            ids = checkpoint.time_ids(config)
            width = pooled_width + len(ids) * config.addition_time_embed_dim
            if width != config.projection_class_embeddings_input_dim:
                family = parts.architecture.name
                raise ExportError(f"This UNet is not told sizes and crop as {family}'s base model is: give that one.")
            self.register_buffer("time_ids", torch.tensor([ids], dtype=torch.float32))

    def make_exportable(self) -> None:
        """Take attention that exports well, and can't be called."""
        self.unet.set_attn_processor(FusedAttention())

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor, prompt: torch.Tensor | None = None
    ) -> torch.Tensor:
        more: dict[str, Any] = {} if prompt is None else {"cross_attention_kwargs": {"prompt": prompt}}
        if self._pooled_width:
            states, pooled = states[:, : self._tokens], states[:, self._tokens, : self._pooled_width]
            pooled = pooled if prompt is None else pooled.index_select(0, prompt)
            times = self.time_ids.expand(sample.shape[0], -1)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": times}
        prediction: torch.Tensor = self.unet(sample, timestep, states, return_dict=False, **more)[0]
        return prediction


def _check_finite(module: Any) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            kind = type(module).__name__
            raise ExportError(f"The {kind} holds NaN or infinity in {name!r}: the checkpoint is damaged.")
