"""Two lists of prompts, memorized and clean, and what of them can be used."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memedge.engine.arrays import Bools
from memedge.engine.directory import sha256
from memedge.engine.engine import Engine
from memedge.engine.errors import InputError
from memedge.prompts.files import read_prompts
from memedge.prompts.text import checked_prompts

FEWEST = 5  # prompts of either kind: one for each fold of the cross-validation


@dataclass(frozen=True)
class Prompts:
    """Prompts of one kind, with the name and SHA-256 that a manifest is to know them by."""

    texts: tuple[str, ...]
    name: str
    sha256: str

    @staticmethod
    def read(path: Path) -> "Prompts":
        """Return the prompts of a file (memedge/prompts/files.py); raises InputError."""
        return Prompts(tuple(read_prompts(path)), path.name, sha256(path))

    @staticmethod
    def given(texts: Iterable[str], name: str = "a list") -> "Prompts":
        """Return prompts given in Python; their SHA-256 is that of the .txt file with a prompt on each line.

        Raises:
            InputError: something is not text.
        """
        texts = tuple(checked_prompts(texts))
        return Prompts(texts, name, hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest())

    @staticmethod
    def of(source: "str | PathLike[str] | Iterable[str] | Prompts") -> "Prompts":
        """Return the prompts of a file, named by its path, or given."""
        if isinstance(source, Prompts):
            return source
        return Prompts.read(Path(source)) if isinstance(source, str | PathLike) else Prompts.given(source)


@dataclass(frozen=True)
class Sample:
    """Prompts that are all different to the model.

    Attributes:
        texts: the B prompts.
        ids: int64 [B, T · L], their token ids.
        truncated: bool [B], which are longer than the text encoder reads.
        memorized: bool [B], which are from the list of memorized ones; they come first.
        warnings: what was left out of the lists, and what else their owner should know, in sentences.
    """

    texts: tuple[str, ...]
    ids: npt.NDArray[np.int64]
    truncated: Bools
    memorized: Bools
    warnings: tuple[str, ...]


def select(engine: Engine, memorized: Prompts, clean: Prompts) -> Sample:
    """Return what can be calibrated on or evaluated. Prompts whose token ids are equal are the same prompt.

    A prompt counts once; one that is in both lists has no answer, and the empty one is never memorized: they are left
    out.

    Raises:
        InputError: fewer than FEWEST prompts of either kind are left.
    """
    empty = engine.tokenize([""])[0].tobytes()
    lists, warnings = [], []
    for prompts in (memorized, clean):
        ids, truncated = engine.tokenize(prompts.texts)
        rows = {row.tobytes(): index for index, row in reversed(list(enumerate(ids)))}  # the first of each
        if repeated := len(ids) - len(rows):
            warnings.append(f"Repetitions in {prompts.name}: {repeated}; each prompt counts once.")
        if rows.pop(empty, None) is not None:
            warnings.append(f"{prompts.name} holds the empty prompt, which is never memorized: it was left out.")
        lists.append((prompts, ids, truncated, rows))
    shared = lists[0][3].keys() & lists[1][3].keys()
    if shared:
        example = memorized.texts[min(lists[0][3][key] for key in shared)]
        warnings.append(f"Prompts in both lists: {len(shared)}, such as {example!r}; they were left out of both.")
    texts: list[str] = []
    parts = []
    for kind, (prompts, ids, truncated, rows) in zip(("memorized", "clean"), lists, strict=True):
        kept = sorted(index for key, index in rows.items() if key not in shared)
        if len(kept) < FEWEST:
            both = f" (prompts in both lists do not count: {len(shared)})" if shared else ""
            raise InputError(
                f"{prompts.name} leaves {len(kept)} {kind} prompts{both}, and at least {FEWEST} different ones are "
                "needed: add some."
            )
        texts += (prompts.texts[index] for index in kept)
        parts.append((ids[kept], truncated[kept], np.full(len(kept), kind == "memorized")))
    ids, cut, answer = (np.concatenate(column) for column in zip(*parts, strict=True))
    if cut.any():
        warnings.append(
            f"Prompts longer than the {engine.directory.manifest.tokens} tokens that the text encoder reads: "
            f"{cut.sum()}; what is beyond is not in their scores."
        )
    return Sample(tuple(texts), ids, cut, answer, tuple(warnings))
