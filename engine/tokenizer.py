"""Prompt → token ids, with truncation reported instead of hidden."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memedge.engine.errors import IntegrityError


class PromptTokenizer:
    """The tokenizers of a model's text encoders; the files carry padding and truncation. Safe to share between threads.

    SDXL has two that differ in more than padding: where "!" is the padding, it is never part of a word.
    """

    def __init__(self, paths: Sequence[Path], tokens: int):
        """Load the files; `tokens` is the length L that each pads or cuts every prompt to.

        Raises:
            IntegrityError: a file is no tokenizer, or pads to another length than L.
        """
        self._tokenizers = [_load(path, tokens) for path in paths]

    def __call__(self, prompts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return ids, int64 [B, T · L] of T tokenizers side by side, and whether each prompt was cut, bool [B]."""
        texts = list(prompts)
        encodings = list(zip(*(tokenizer.encode_batch_fast(texts) for tokenizer in self._tokenizers), strict=True))
        ids = np.array([[i for e in one for i in e.ids] for one in encodings], dtype=np.int64)
        return ids, np.array([any(e.overflowing for e in one) for one in encodings])


def _load(path: Path, tokens: int) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a file it cannot parse
        raise IntegrityError(f"{path} is not a tokenizer ({error}): export the engine again.") from None
    if len(tokenizer.encode("").ids) != tokens:
        raise IntegrityError(f"{path} does not pad prompts to {tokens} tokens: export the engine again.")
    return tokenizer
