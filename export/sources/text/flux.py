"""Flux.1's text encoders: T5, and CLIP for the pooled state alone."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from memedge.export.sources.attention import CAUSAL, WHOLE
from memedge.export.sources.parts import Parts
from memedge.export.sources.text.text_encoders import TextEncoders


class FluxTextEncoders(TextEncoders):
    """Rows 0 … L − 1 hold T5's states, row L the state that CLIP has at EOS."""

    def __init__(self, parts: Parts, lengths: Sequence[int], empty: npt.NDArray[np.int64] | None):
        super().__init__(empty)
        self.clip, self.t5 = parts.text_encoders
        self._clip_tokens, self.tokens = lengths
        self.state_width = int(self.t5.config.d_model)
        self.pooled_width = int(self.clip.config.hidden_size)

    def make_exportable(self) -> None:
        self.clip.set_attn_implementation(CAUSAL)
        self.t5.set_attn_implementation(WHOLE)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        clip_ids, t5_ids = ids[:, : self._clip_tokens], ids[:, self._clip_tokens :]
        pooled = self.clip(input_ids=clip_ids).pooler_output
        pooled = nn.functional.pad(pooled, (0, self.state_width - self.pooled_width))
        return torch.cat([self.t5(input_ids=t5_ids).last_hidden_state, pooled[:, None]], dim=1)
