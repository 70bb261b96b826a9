"""Prompt → token ids, with truncation reported instead of hidden."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memedge.engine.errors import IntegrityError, shown
from memedge.engine.tokenizer_file import read_tokenizer


@dataclass(frozen=True)
class TokenSpan:
    """One token of a prompt; those of a character that takes several bytes all stand for that character.

    Attributes:
        start, end: the characters prompt[start:end] that it stands for.
        place: its index in the ids, or None if the prompt was cut before it.
    """

    start: int
    end: int
    place: int | None


class PromptTokenizer:
    """The tokenizers of a model's text encoders; the files carry padding and truncation. Safe to share between threads.

    Two of one model may differ in more than padding: where "!" is the padding, it is never part of a word.

    Attributes:
        around: of each tokenizer, how many ids stand before a prompt's first word, BOS or a template, and behind its
            last one, EOS or a template's end.
    """

    def __init__(self, paths: Sequence[Path], lengths: Sequence[int]):
        """Load the files; `lengths` are those that each pads or cuts every prompt to.

        Raises:
            IntegrityError: a file is no tokenizer, not of a known shape, or pads to another length.
        """
        self._tokenizers = [_load(path, length) for path, length in zip(paths, lengths, strict=True)]
        self._ends = list(accumulate(lengths))  # of each tokenizer's ids, side by side
        self.around = [_around(tokenizer) for tokenizer in self._tokenizers]

    def __call__(self, prompts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return ids, int64 [B, T · L] of T tokenizers side by side, and whether each prompt was cut, bool [B].

        It was if no tokenizer read it whole: of Stable Diffusion 3's, CLIP's cut at 77 tokens, and T5's at 256.
        """
        texts = list(prompts)
        encodings = list(zip(*(tokenizer.encode_batch_fast(texts) for tokenizer in self._tokenizers), strict=True))
        ids = np.array([[i for e in one for i in e.ids] for one in encodings], dtype=np.int64)
        return ids, np.array([all(e.overflowing for e in one) for one in encodings])

    def tokens(self, prompt: str) -> list[TokenSpan]:
        """Return the tokens of one prompt, tokenizer after tokenizer, without BOS, EOS and padding."""
        found, first = [], 0
        for tokenizer in self._tokenizers:
            read = tokenizer.encode(prompt)
            for part in (read, *read.overflowing):
                for i, ((start, end), special) in enumerate(zip(part.offsets, part.special_tokens_mask, strict=True)):
                    if not special:
                        text = prompt[start:end]
                        if text.strip():  # Qwen's tokens have the space before a word, too
                            start += len(text) - len(text.lstrip())
                        found.append(TokenSpan(start, end, first + i if part is read else None))
            first += len(read.ids)
        return found

    def only(self, ids: npt.NDArray[np.int64], kept: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the ids [T · L] of one prompt with all tokens masked but those in the places `kept`.

        A masked token becomes padding, so that the others stay where they are; EOS, or a template's end, follows the
        last that is kept.
        """
        result: npt.NDArray[np.int64] = self([""])[0][0]  # BOS, EOS at the first word's place, padding
        begin = 0
        for end, (before, behind) in zip(self._ends, self.around, strict=True):
            own = [place for place in kept if begin <= place < end]
            if own:
                word = begin + before
                closing = result[word : word + behind].copy()
                result[word : word + behind] = result[end - 1]
                result[own] = ids[own]
                result[max(own) + 1 : max(own) + 1 + behind] = closing
            begin = end
        return result


def _around(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return how many ids stand before a prompt's words, and behind them."""
    special = sum(tokenizer.encode("").attention_mask)  # all of the empty prompt that is not padding
    word = tokenizer.encode("a")
    before = word.special_tokens_mask.index(0) if 0 in word.special_tokens_mask else max(0, special - 1)
    return before, special - before


def _load(path: Path, tokens: int) -> Tokenizer:
    text = read_tokenizer(path, tokens)
    try:
        tokenizer = Tokenizer.from_str(text)
        length = len(tokenizer.encode("").ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception, or a panic of the library's, which is none
        raise IntegrityError(f"{path} is not a tokenizer ({shown(str(error))}): export the engine again.") from None
    if length != tokens:
        raise IntegrityError(f"{path} does not pad prompts to {tokens} tokens: export the engine again.")
    return tokenizer
