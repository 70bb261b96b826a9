"""A checkpoint of torch modules, as diffusers holds them: Stable Diffusion 1.x, 2.x and SDXL."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from tokenizers import Tokenizer
from torch import nn

from memedge.engine.errors import ExportError
from memedge.export.sources import checkpoint
from memedge.export.sources.attention import CAUSAL, FusedAttention
from memedge.export.sources.parts import Parts
from memedge.export.sources.tokenizers import padding_tokenizers
from memedge.export.sources.trace import trace


class TorchCheckpoint(checkpoint.Checkpoint):
    """See Checkpoint; the graphs are traced from the very modules that `encode` and `predict` run."""

    def __init__(self, parts: Parts):
        """Take the modules over.

        Raises:
            ExportError: a weight is not finite, the UNet is not a text-to-image model's, or the parts don't fit.
        """
        for module in (parts.unet, *parts.text_encoders):
            _check_finite(module)
        self.id, self.sha256 = parts.id, parts.sha256
        self.scheduler: Mapping[str, Any] = parts.scheduler
        self.unet_config: Mapping[str, Any] = parts.unet.config
        self.tokenizers, self.tokens = padding_tokenizers(parts.tokenizers)
        parts.unet.set_attn_processor(AttnProcessor2_0())
        self._text_encoder = _make_text_encoder(parts, self.tokenizers)
        self.state_width, self.pooled_width = self._text_encoder.state_width, self._text_encoder.pooled_width
        self._unet = UNet(parts.unet, self.tokens, self.pooled_width)
        expected = parts.unet.config.cross_attention_dim
        if self.state_width != expected:
            raise ExportError(
                f"The text encoder gives states of width {self.state_width}, and the UNet takes {expected}: these are "
                "parts of different models."
            )

    @torch.inference_mode()
    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        states: npt.NDArray[np.float32] = self._text_encoder(torch.from_numpy(ids)).numpy()
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
        self._text_encoder.make_exportable()
        example = {"ids": torch.zeros(2, len(self.tokenizers) * self.tokens, dtype=torch.int64)}
        return trace(self._text_encoder, example, {"ids": "prompts"}, "states")

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


class TextEncoder(nn.Module):
    """ids int64 [B, L] → states float32 [B, L, D], the text encoder's last."""

    pooled_width = 0

    def __init__(self, text_encoder: Any):
        super().__init__()
        self.text_encoder = text_encoder
        self.state_width = int(text_encoder.config.hidden_size)

    def make_exportable(self) -> None:
        """Take attention that exports well."""
        self.text_encoder.set_attn_implementation(CAUSAL)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.text_encoder(input_ids=ids, return_dict=False)[0]
        return states


class PairOfTextEncoders(nn.Module):
    """SDXL's: ids int64 [B, 2 L], L for each of both → states float32 [B, L + 1, D].

    Rows 0 … L − 1 hold the last but one states of both text encoders side by side; row L the pooled state of the
    second one, padded with zeros.
    """

    empty: torch.Tensor  # ids [1, 2 L]

    def __init__(self, parts: Parts, empty: npt.NDArray[np.int64]):
        """`empty` are the empty prompt's ids, [1, 2 L]."""
        super().__init__()
        self.first, self.second = parts.text_encoders
        self.pooled_width = int(self.second.config.projection_dim)
        self.state_width = int(self.first.config.hidden_size) + int(self.second.config.hidden_size)
        self.zeros_for_empty = parts.zeros_for_empty
        self.register_buffer("empty", torch.from_numpy(empty))

    def make_exportable(self) -> None:
        """Take attention that exports well."""
        for text_encoder in (self.first, self.second):
            text_encoder.set_attn_implementation(CAUSAL)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        first_ids, second_ids = ids.chunk(2, dim=1)
        first = self.first(input_ids=first_ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(input_ids=second_ids, output_hidden_states=True)
        pooled = nn.functional.pad(second.text_embeds, (0, self.state_width - self.pooled_width))
        states = torch.cat([torch.cat([first, second.hidden_states[-2]], dim=-1), pooled[:, None]], dim=1)
        if self.zeros_for_empty:
            # What the pipeline takes for ε_0: zeros, and not what the encoders make of an empty text.
            states = states * (ids != self.empty).any(dim=1)[:, None, None]
        return states


class UNet(nn.Module):
    """sample [R, C, H, W], timestep int64 [R], states [B, K, D], prompt int64 [R] → prediction [R, C, H, W].

    Row r is for the states of prompt[r]. Call it without `prompt`; R is B then. After `make_exportable` it can be
    exported, with `prompt`, and no longer be called.
    """

    time_ids: torch.Tensor  # [1, 6]

    def __init__(self, unet: Any, tokens: int, pooled_width: int):
        super().__init__()
        self.unet = unet
        self._tokens, self._pooled_width = tokens, pooled_width
        kind = "text_time" if pooled_width else None
        if unet.config.addition_embed_type != kind:
            raise ExportError("SDXL needs both its text encoders, and other models have one: a part is missing.")
        if pooled_width:
            ids = checkpoint.time_ids(unet.config)
            width = pooled_width + len(ids) * unet.config.addition_time_embed_dim
            if width != unet.config.projection_class_embeddings_input_dim:
                raise ExportError("This UNet is not told sizes and crop as SDXL's base model is: give that one.")
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


def _make_text_encoder(parts: Parts, tokenizers: Sequence[Tokenizer]) -> TextEncoder | PairOfTextEncoders:
    if len(parts.text_encoders) == 1:
        return TextEncoder(parts.text_encoders[0]).eval()
    empty = np.concatenate([tokenizer.encode("").ids for tokenizer in tokenizers])
    return PairOfTextEncoders(parts, empty[None].astype(np.int64)).eval()


def _check_finite(module: Any) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            kind = type(module).__name__
            raise ExportError(f"The {kind} holds NaN or infinity in {name!r}: the checkpoint is damaged.")
