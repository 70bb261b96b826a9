"""Stable Diffusion 3's text encoders: two of CLIP's beside each other, T5's behind them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from memedge.export.sources.attention import CAUSAL, WHOLE
from memedge.export.sources.parts import Parts
from memedge.export.sources.text.text_encoders import TextEncoders

ZEROS = 256  # rows in place of a T5 that is left out, where nobody says how many: the pipeline's own


class SD3TextEncoders(TextEncoders):
    """Rows 0 … 76: the last but one states of both of CLIP's, and zeros; then T5's; the last row: both pooled states.

    Where the model comes without T5, its pipeline has zeros in its place, which the transformer takes for tokens.
    """

    def __init__(self, parts: Parts, lengths: Sequence[int], empty: npt.NDArray[np.int64] | None):
        super().__init__(empty)
        self.first, self.second, *third = parts.text_encoders
        self.third = third[0] if third else None
        self._lengths = list(lengths)
        self._zeros = 0 if third else parts.max_sequence_length or ZEROS
        self.tokens = lengths[0] + (lengths[2] if third else self._zeros)
        self.state_width = int(parts.denoiser.config.joint_attention_dim)
        self.pooled_width = int(self.first.config.projection_dim) + int(self.second.config.projection_dim)

    def make_exportable(self) -> None:
        self.first.set_attn_implementation(CAUSAL)
        self.second.set_attn_implementation(CAUSAL)
        if self.third is not None:
            self.third.set_attn_implementation(WHOLE)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        first_ids, second_ids, *third_ids = torch.split(ids, self._lengths, dim=1)
        first = self.first(input_ids=first_ids, output_hidden_states=True)
        second = self.second(input_ids=second_ids, output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        clip = nn.functional.pad(clip, (0, self.state_width - clip.shape[-1], 0, self._zeros))
        rows = [clip] if self.third is None else [clip, self.third(input_ids=third_ids[0]).last_hidden_state]
        rows.append(nn.functional.pad(pooled, (0, self.state_width - self.pooled_width))[:, None])
        return torch.cat(rows, dim=1)
