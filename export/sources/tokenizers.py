"""A checkpoint's tokenizers as engines hold them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memedge.engine.errors import ExportError
from memedge.export.sources.templates import Template

LONGEST = 1 << 16  # tokens; transformers gives 10³⁰ where a tokenizer names no length


def padding_tokenizers(
    sources: Sequence[Any], given: Sequence[int | None] = (), templates: Sequence[Template | None] = ()
) -> tuple[list[Tokenizer], tuple[int, ...]]:
    """Return transformers' fast tokenizers with their padding and truncation in themselves, and the length of each.

    Run time then knows neither. `given` are lengths in place of the tokenizers' own, where they are not None: the rows
    of states, where there is a template, which is then in the tokenizer, too.

    Raises:
        ExportError: one names no length or no padding, a template leaves no room for prompts, or two that give states
            side by side cut prompts differently.
    """
    templates = templates or (None,) * len(sources)
    lengths = []
    for source, length, template in zip(sources, given or (None,) * len(sources), templates, strict=True):
        if (length is None and source.model_max_length > LONGEST) or source.pad_token_id is None:
            raise ExportError(f"{source.name_or_path} names no length or no padding token: check that it is complete.")
        rows = int(source.model_max_length) if length is None else length
        lengths.append(rows if template is None else template.length(rows))
        if template is not None and lengths[-1] <= len(template.before) + len(template.behind):
            raise ExportError(
                f"--max-sequence-length {rows} has no room for a prompt beside the {len(template.before)} tokens of "
                f"the template before it: give at least {len(template.before) - template.dropped + 1}."
            )
    own = {length for length, told in zip(lengths, given or (None,) * len(sources), strict=True) if told is None}
    if len(own) > 1:
        raise ExportError(
            "The tokenizers of the two text encoders cut prompts at different lengths: check their files."
        )
    each = zip(sources, lengths, templates, strict=True)
    return [_padding(source, length, template) for source, length, template in each], tuple(lengths)


def empty_ids(tokenizers: Sequence[Tokenizer]) -> npt.NDArray[np.int64]:
    """Return the ids of the empty prompt, [T · L] of T tokenizers."""
    return np.concatenate([np.array(tokenizer.encode("").ids, np.int64) for tokenizer in tokenizers])


def _padding(source: Any, tokens: int, template: Template | None) -> Tokenizer:
    backend: Tokenizer = source.backend_tokenizer
    if template is not None:
        template.put(backend)
    backend.enable_truncation(tokens)
    backend.enable_padding(length=tokens, pad_id=source.pad_token_id, pad_token=source.pad_token)
    return backend
