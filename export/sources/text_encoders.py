"""Text encoders as one torch module: from a prompt's ids to all that a UNet takes of the prompt."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from memedge.export.sources.attention import CAUSAL


class TextEncoders(nn.Module):
    """All T text encoders of a model: ids int64 [B, T · L], L for each → states float32 [B, K, D].

    Attributes:
        state_width: D.
        pooled_width: P, of the pooled state in the last row, which zeros follow; 0 where there is none.
        empty: ids [1, T · L] of the prompt whose states are all zero; None: of none.
    """

    state_width: int
    pooled_width = 0
    empty: torch.Tensor | None

    def __init__(self, empty: npt.NDArray[np.int64] | None):
        """`empty` are ids [T · L]."""
        super().__init__()
        self.register_buffer("empty", None if empty is None else torch.from_numpy(empty[None]))

    def make_exportable(self) -> None:
        """Take attention that exports well."""
        text_encoder: Any
        for text_encoder in self.children():
            text_encoder.set_attn_implementation(CAUSAL)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what the text encoders make of ids, whatever the prompt."""
        raise NotImplementedError

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.encode(ids)
        return states if self.empty is None else states * (ids != self.empty).any(dim=1)[:, None, None]


class OneTextEncoder(TextEncoders):
    """CLIP's: its last states [B, L, D]."""

    def __init__(self, text_encoders: Sequence[Any], empty: npt.NDArray[np.int64] | None):
        super().__init__(empty)
        (self.text_encoder,) = text_encoders
        self.state_width = int(self.text_encoder.config.hidden_size)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.text_encoder(input_ids=ids, return_dict=False)[0]
        return states


class PairOfTextEncoders(TextEncoders):
    """Two of CLIP's: rows 0 … L − 1 hold the last but one states of both side by side, row L the second's pooled."""

    def __init__(self, text_encoders: Sequence[Any], empty: npt.NDArray[np.int64] | None):
        super().__init__(empty)
        self.first, self.second = text_encoders
        self.pooled_width = int(self.second.config.projection_dim)
        self.state_width = int(self.first.config.hidden_size) + int(self.second.config.hidden_size)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        first_ids, second_ids = ids.chunk(2, dim=1)
        first = self.first(input_ids=first_ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(input_ids=second_ids, output_hidden_states=True)
        pooled = nn.functional.pad(second.text_embeds, (0, self.state_width - self.pooled_width))
        return torch.cat([torch.cat([first, second.hidden_states[-2]], dim=-1), pooled[:, None]], dim=1)
