"""Language models of Qwen's as text encoders: that of Qwen2.5-VL, which Qwen-Image reads, and Qwen3, Z-Image's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memedge.export.sources.attention import CAUSAL
from memedge.export.sources.parts import Parts
from memedge.export.sources.text.text_encoders import TextEncoders


class _Qwen(TextEncoders):
    """States [B, L, D] of the tokens that are there, zeros behind them, and whether they are there in a last column.

    Ids are a template's start, the prompt, the template's end and padding (templates.py). Tokens read what stands
    before them and nothing else: so neither padding nor what is cut off behind row L changes a state, and no mask is
    needed here.
    """

    masked = True

    def __init__(self, parts: Parts, lengths: Sequence[int], empty: npt.NDArray[np.int64] | None):
        super().__init__(empty)
        (self.text_encoder,), (tokenizer,), (template,) = parts.text_encoders, parts.tokenizers, parts.templates
        assert template is not None  # the family's row names one
        self._first, self._padding = template.dropped, int(tokenizer.pad_token_id)
        self.tokens = template.rows(lengths[0])
        self.state_width = int(self.text_encoder.config.get_text_config().hidden_size) + 1

    def make_exportable(self) -> None:
        self.text_encoder.set_attn_implementation(CAUSAL)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the states [B, I, D] that the pipeline takes, of ids [B, I]."""
        raise NotImplementedError

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        last = (places * (ids != self._padding)).amax(dim=1, keepdim=True)  # the padding's token may stand in prompts
        own = slice(self._first, self._first + self.tokens)
        there = (places[own] <= last).float()[..., None]
        return torch.cat([self.states(ids[:, : own.stop])[:, own] * there, there], dim=-1)


class Qwen25VL(_Qwen):
    """The last states of Qwen2.5-VL's language model; it is given no picture, so its eyes are not exported."""

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        model: Any = self.text_encoder.model.language_model
        places = torch.arange(ids.shape[1]).expand(3, 1, -1)  # in time, height and width, which text has alike
        found: torch.Tensor = model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
        return found


class Qwen3(_Qwen):
    """The last but one states of Qwen3."""

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.text_encoder(input_ids=ids, use_cache=False, output_hidden_states=True)
        states: torch.Tensor = found.hidden_states[-2]
        return states
