"""Prompt → token ids, with truncation reported instead of hidden."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memedge.engine.errors import IntegrityError


class PromptTokenizer:
    """Wraps tokenizer.json, which carries its own padding and truncation. Safe to share between threads."""

    def __init__(self, path: Path, tokens: int):
        """Load the tokenizer; `tokens` is the length L every prompt is padded or cut to.

        Raises:
            IntegrityError: the file is no tokenizer, or pads to another length than L.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for a file it cannot parse
            raise IntegrityError(f"{path} is not a tokenizer ({error}): export the engine again.") from None
        if len(self._tokenizer.encode("").ids) != tokens:
            raise IntegrityError(f"{path} does not pad prompts to {tokens} tokens: export the engine again.")

    def __call__(self, prompts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return ids, int64 [B, L], and whether each prompt was cut, bool [B]."""
        encodings = self._tokenizer.encode_batch_fast(list(prompts))
        ids = np.array([e.ids for e in encodings], dtype=np.int64)
        return ids, np.array([bool(e.overflowing) for e in encodings])
