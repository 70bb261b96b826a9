"""CLIP's text encoders, alone or two beside each other: those of Stable Diffusion 1, 2 and XL."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from memedge.export.sources.attention import CAUSAL
from memedge.export.sources.parts import Parts
from memedge.export.sources.text.text_encoders import TextEncoders


class _CLIP(TextEncoders):
    def make_exportable(self) -> None:
        text_encoder: Any
        for text_encoder in self.children():
            text_encoder.set_attn_implementation(CAUSAL)


class OneTextEncoder(_CLIP):
    """CLIP's: its last states [B, L, D]."""

    def __init__(self, parts: Parts, lengths: Sequence[int], empty: npt.NDArray[np.int64] | None):
        super().__init__(empty)
        (self.text_encoder,), (self.tokens,) = parts.text_encoders, lengths
        self.state_width = int(self.text_encoder.config.hidden_size)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.text_encoder(input_ids=ids, return_dict=False)[0]
        return states


class PairOfTextEncoders(_CLIP):
    """Two of CLIP's: rows 0 … L − 1 hold the last but one states of both side by side, row L the second's pooled."""

    def __init__(self, parts: Parts, lengths: Sequence[int], empty: npt.NDArray[np.int64] | None):
        super().__init__(empty)
        (self.first, self.second), (self.tokens, _) = parts.text_encoders, lengths
        self.pooled_width = int(self.second.config.projection_dim)
        self.state_width = int(self.first.config.hidden_size) + int(self.second.config.hidden_size)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        first_ids, second_ids = ids.chunk(2, dim=1)
        first = self.first(input_ids=first_ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(input_ids=second_ids, output_hidden_states=True)
        pooled = nn.functional.pad(second.text_embeds, (0, self.state_width - self.pooled_width))
        return torch.cat([torch.cat([first, second.hidden_states[-2]], dim=-1), pooled[:, None]], dim=1)
