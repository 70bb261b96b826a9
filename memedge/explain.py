"""Which words carry a prompt's score: by masking them (forward passes only, on any engine), or by the gradient."""

import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import numpy.typing as npt

from memedge.engine.arrays import Floats
from memedge.engine.tokenizer import PromptTokenizer, TokenSpan

ExplanationMethod = Literal["mask", "gradient"]
ScoreKind = Literal["calibrated", "published", "norm"]
Span = tuple[int, int]
APOSTROPHES = "'’"


@dataclass(frozen=True)
class Token:
    """The smallest part of a prompt that can be masked: mostly one token, or all tokens that share a character.

    Attributes:
        text: the user's own characters, prompt[start:end].
        start, end: where they are.
        significance: that of this part alone, defined as a word's; None if the text encoder does not read it.
    """

    text: str
    start: int
    end: int
    significance: float | None


@dataclass(frozen=True)
class Word:
    """A word or a run of punctuation of a prompt.

    Attributes:
        text: the user's own characters, prompt[start:end].
        start, end: where they are.
        significance: by method "mask", how much the score falls when all tokens of the word are masked at once, which
            is not the sum of what each of them makes; negative if the score rises. By method "gradient", the L2 norm of
            ∂(norm) / ∂(the tokens' embeddings). None if the text encoder reads none of the word.
        tokens: its tokens, in order; empty if the tokenizer drops all its characters.
    """

    text: str
    start: int
    end: int
    significance: float | None
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Explanation:
    """The words that carry the score of one prompt.

    Attributes:
        prompt: the prompt.
        score: its score; `detect` gives the verdict.
        kind: what the score is. "calibrated": by the engine's calibration. "published": by the published γ of its model
            family, which was not fitted here. "norm": the norm, because there is no γ or the method is "gradient".
        threshold: the calibrated threshold of scores, or None: a norm has none.
        words: all words of the prompt, in order, with nothing but space between them.
        method: how significance was found.
        passes: conditional UNet evaluations; with method "gradient" there are as many backward passes.
    """

    prompt: str
    score: float
    kind: ScoreKind
    threshold: float | None
    words: tuple[Word, ...]
    method: ExplanationMethod
    passes: int


class Words:
    """The words of a prompt and their tokens, as spans of its characters.

    Attributes:
        spans: the spans of all words and of all tokens.
    """

    def __init__(self, found: Sequence[TokenSpan], prompt: str):
        """`found` are the prompt's tokens (PromptTokenizer.tokens)."""
        self._prompt, self._found = prompt, found
        self._tokens = list(_merge((token.start, token.end) for token in found))
        self._words = list(_merge([*_runs(prompt), *self._tokens]))
        self.spans = {*self._tokens, *self._words}

    def places(self, span: Span) -> set[int]:
        """Return the places in the ids [T · L] that the text encoders read a span from."""
        start, end = span
        return {t.place for t in self._found if t.place is not None and start <= t.start and t.end <= end}

    def rate(self, significance: Callable[[Span], float | None]) -> tuple[Word, ...]:
        """Return the words, given the significance of each of the spans."""
        tokens: list[list[Token]] = [[] for _ in self._words]
        starts = [start for start, _ in self._words]
        for span in self._tokens:
            word = bisect_right(starts, span[0]) - 1
            tokens[word].append(Token(self._prompt[slice(*span)], *span, significance(span)))
        return tuple(
            Word(self._prompt[slice(*span)], *span, significance(span), tuple(own))
            for span, own in zip(self._words, tokens, strict=True)
        )


class Masks:
    """A prompt's ids, and its ids with each word and each token masked.

    To mask is to put padding in a token's place. Measured on 75 memorized captions of an earlier embedded engine,
    against leaving the token out, by which all later ones move up, and against the neutral tokens "a" and ",":

    | mask     | concept's share | words before it | same word on other noise | sum of falls / score |
    |----------|-----------------|-----------------|--------------------------|----------------------|
    | padding  | 0.94            | 0.03            | 0.97                     | 0.81                 |
    | left out | 0.83            | 0.18            | 0.92                     | 0.90                 |
    | "a"      | 0.92            |                 | 0.96                     | 0.82                 |
    | ","      | 0.70            |                 | 0.89                     | 1.41                 |

    63 of them name a concept in a template, as in "picture of a {}". The concept's share is its part of the sum of all
    |significance|. The second column is the mean |significance| / score of the words before it: leaving tokens out
    blames these words for moving the others. "a" is one of the templates' words. The most significant word is the
    concept's in 98 to 100 % (",": 79 %); the gradient of docs/methods.md §2 names it in 68 %. Within captions of three
    words or more the gradient correlates (Spearman) with padding by 0.34, and with leaving out by 0.31. Four noise
    draws rank the words alike by 0.93 with padding and 0.91 with leaving out, and over all 428 captions, memorized or
    not, by 0.73 and 0.76.

    If either of two words is enough for the score, neither is significant alone.

    Attributes:
        ids: int64 [V, T · L]: the prompt's own, then the masked ones; no two rows are equal.
    """

    def __init__(self, tokenizer: PromptTokenizer, prompt: str):
        found = tokenizer.tokens(prompt)
        self._words = Words(found, prompt)
        own = tokenizer([prompt])[0][0]
        read = [token.place for token in found if token.place is not None]
        variants = {own.tobytes(): (0, own)}
        self._variant: dict[Span, int] = {}  # of what is read
        for span in self._words.spans:
            if masked := self._words.places(span):
                ids = tokenizer.only(own, [place for place in read if place not in masked])
                self._variant[span] = variants.setdefault(ids.tobytes(), (len(variants), ids))[0]
        self.ids: npt.NDArray[np.int64] = np.stack([ids for _, ids in variants.values()])

    def words(self, scores: Floats) -> tuple[Word, ...]:
        """Return the words, given the score of each of the ids, float64 [V]."""

        def fall(span: Span) -> float | None:
            return float(scores[0] - scores[self._variant[span]]) if span in self._variant else None

        return self._words.rate(fall)


def by_gradient(tokenizer: PromptTokenizer, prompt: str, gradient: npt.NDArray[np.float32]) -> tuple[Word, ...]:
    """Return the words of a prompt, given ∂(norm) / ∂(its states), [L, D] (Wen et al., docs/methods.md §2).

    A token's significance is the L2 norm of its row: S_i = ‖∂(mean over draws of ‖Δ‖₂) / ∂e_c[i]‖₂. A word's is the L2
    norm of the rows of all its tokens. The text encoder carries a word into later rows too; that is not counted.
    """
    words = Words(tokenizer.tokens(prompt), prompt)

    def norm(span: Span) -> float | None:
        rows = sorted({place % len(gradient) for place in words.places(span)})  # SDXL's two tokenizers share them
        return float(np.linalg.norm(gradient[rows].astype(np.float64))) if rows else None

    return words.rate(norm)


def _merge(spans: Iterable[Span]) -> Iterator[Span]:
    """Yield the spans in order; overlapping ones become one."""
    last: Span | None = None
    for start, end in sorted(spans):
        if last and start < last[1]:
            last = last[0], max(last[1], end)
            continue
        if last:
            yield last
        last = start, end
    if last:
        yield last


def _runs(prompt: str) -> Iterator[Span]:
    """Yield the spans of words, "don't" and "long_hair" among them, and of runs of punctuation and symbols."""
    kinds: list[str] = []
    for i, character in enumerate(prompt):
        if kinds and unicodedata.category(character).startswith("M"):
            kinds.append(kinds[-1])  # an accent or a variation selector belongs to what it follows
        elif character.isspace():
            kinds.append("space")
        elif character.isalnum() or character == "_" or _joins(prompt, i):
            kinds.append("word")
        else:
            kinds.append("symbols")
    start = 0
    for kind, run in groupby(kinds):
        end = start + len(list(run))
        if kind != "space":
            yield start, end
        start = end


def _joins(prompt: str, i: int) -> bool:
    """Return whether there is an apostrophe within a word."""
    return prompt[i] in APOSTROPHES and prompt[i - 1 : i].isalnum() and prompt[i + 1 : i + 2].isalnum()
