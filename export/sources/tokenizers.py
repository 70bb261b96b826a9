"""A checkpoint's tokenizers as engines hold them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memedge.engine.errors import ExportError

LONGEST = 1 << 16  # tokens; transformers gives 10³⁰ where a tokenizer names no length


def padding_tokenizers(
    sources: Sequence[Any], given: Sequence[int | None] = ()
) -> tuple[list[Tokenizer], tuple[int, ...]]:
    """Return transformers' fast tokenizers with their padding and truncation in themselves, and the length of each.

    Run time then knows neither. `given` are lengths in place of the tokenizers' own, where they are not None.

    Raises:
        ExportError: one names no length or no padding, or two that give states side by side cut prompts differently.
    """
    lengths = []
    for source, length in zip(sources, given or (None,) * len(sources), strict=True):
        if (length is None and source.model_max_length > LONGEST) or source.pad_token_id is None:
            raise ExportError(f"{source.name_or_path} names no length or no padding token: check that it is complete.")
        lengths.append(int(source.model_max_length) if length is None else length)
    own = {length for length, told in zip(lengths, given or (None,) * len(sources), strict=True) if told is None}
    if len(own) > 1:
        raise ExportError(
            "The tokenizers of the two text encoders cut prompts at different lengths: check their files."
        )
    return [_padding(source, length) for source, length in zip(sources, lengths, strict=True)], tuple(lengths)


def empty_ids(tokenizers: Sequence[Tokenizer]) -> npt.NDArray[np.int64]:
    """Return the ids of the empty prompt, [T · L] of T tokenizers."""
    return np.concatenate([np.array(tokenizer.encode("").ids, np.int64) for tokenizer in tokenizers])


def _padding(source: Any, tokens: int) -> Tokenizer:
    backend: Tokenizer = source.backend_tokenizer
    backend.enable_truncation(tokens)
    backend.enable_padding(length=tokens, pad_id=source.pad_token_id, pad_token=source.pad_token)
    return backend
