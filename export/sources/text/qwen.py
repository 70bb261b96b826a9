"""Language models of Qwen's as text encoders: that of Qwen2.5-VL, which Qwen-Image reads, and Qwen3, Z-Image's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memedge.export.sources.attention import CAUSAL
from memedge.export.sources.constant import Constant
from memedge.export.sources.parts import Parts
from memedge.export.sources.text.text_encoders import TextEncoders


class _Qwen(TextEncoders):
    """States [B, L, D] of the tokens that are there, zeros behind them, and whether they are there in a last column.

    Ids are a template's start, the prompt, the template's end and padding (templates.py). Tokens read what stands
    before them and nothing else: so neither padding nor what is cut off behind row L changes a state, and no mask is
    needed here.

    Attributes:
        axes: of positions: time, height and width, which are alike in text; 0: positions are plain numbers.
    """

    masked = True
    axes = 0

    def __init__(self, parts: Parts, lengths: Sequence[int], empty: npt.NDArray[np.int64] | None):
        super().__init__(empty)
        (self.text_encoder,), (tokenizer,), (template,) = parts.text_encoders, parts.tokenizers, parts.templates
        assert template is not None  # the family's row names one
        self._first, self._padding = template.dropped, int(tokenizer.pad_token_id)
        self.tokens = template.rows(lengths[0])
        self.state_width = int(self.text_encoder.config.get_text_config().hidden_size) + 1

    def make_exportable(self) -> None:
        self.text_encoder.set_attn_implementation(CAUSAL)
        model, length = self.language_model, self._first + self.tokens
        places = torch.arange(length).expand(self.axes, 1, -1) if self.axes else torch.arange(length)[None]
        model.rotary_emb = Constant(model.rotary_emb(torch.zeros(1, length, 1), places))

    @property
    def language_model(self) -> Any:
        """The module that reads ids."""
        raise NotImplementedError

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

    axes = 3

    @property
    def language_model(self) -> Any:
        return self.text_encoder.model.language_model

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.language_model(input_ids=ids, use_cache=False).last_hidden_state
        return found


class Qwen3(_Qwen):
    """The last but one states of Qwen3."""

    @property
    def language_model(self) -> Any:
        return self.text_encoder

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.language_model(input_ids=ids, use_cache=False, output_hidden_states=True)
        states: torch.Tensor = found.hidden_states[-2]
        return states
