"""What every family's text encoders are to the export."""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn


class TextEncoders(nn.Module):
    """All text encoders of a model: ids int64 [B, I], the tokenizers' side by side → states float32 [B, K, D].

    Attributes:
        tokens: the rows of states, K without that of the pooled state.
        state_width: D.
        pooled_width: P, of the pooled state in the last row, which zeros follow; 0 where there is none.
        masked: whether the last column is 1 at tokens that are there, and 0 behind them.
        empty: ids [1, I] of the prompt whose states are all zero; None: of none.
    """

    tokens: int
    state_width: int
    pooled_width = 0
    masked = False
    empty: torch.Tensor | None

    def __init__(self, empty: npt.NDArray[np.int64] | None):
        """`empty` are ids [I]."""
        super().__init__()
        self.register_buffer("empty", None if empty is None else torch.from_numpy(empty[None]))

    def make_exportable(self) -> None:
        """Take attention that exports well."""
        raise NotImplementedError

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what the text encoders make of ids, whatever the prompt."""
        raise NotImplementedError

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.encode(ids)
        return states if self.empty is None else states * (ids != self.empty).any(dim=1)[:, None, None]
