"""The prompt files of one job, read as one table: the prompts, and the columns that are kept beside them."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from memedge.engine.errors import InputError, shown
from memedge.prompts.columns import Columns
from memedge.prompts.files import PromptRow, parquet_types, read_rows
from memedge.prompts.inputs import InputFile

ROWS_BETWEEN = 4096  # calls of `progress`
_EMPTY = "null"  # Arrow's type of a column without values, as pandas writes it


@dataclass(frozen=True)
class Contents:
    """What was found when all prompts were read.

    Attributes:
        rows: how many prompts there are.
        sha256: of all prompts in their order, each behind its length.
        columns: the columns that are kept, and their types: Arrow's of parquet files, `str` of .csv and .tsv, the set
            of Python types that a .jsonl's values have.
    """

    rows: int
    sha256: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """Files of one format, read in their order, as often as one likes; they must not change meanwhile."""

    files: tuple[InputFile, ...]
    columns: Columns

    @property
    def format(self) -> str:
        """The format of all files."""
        return self.files[0].file.kind.format

    @property
    def name(self) -> str:
        """What messages call the files together."""
        first = self.files[0].file.name
        return first if len(self.files) == 1 else f"{first} and {len(self.files) - 1} more"

    def rows(self) -> Iterator[PromptRow]:
        """Yield all rows, each with its kept columns; raises InputError as `read_rows`."""
        for one in self.files:
            partition = self._wanted(one)
            for row in read_rows(one.file, self._within(one)):
                yield PromptRow(row.prompt, {**partition, **row.kept}) if partition else row

    def bare(self) -> "Corpus":
        """Return the same prompts without the columns beside them."""
        return Corpus(self.files, replace(self.columns, kept=()))

    def inspect(self, progress: Callable[[int], None]) -> Contents:
        """Read all prompts once, so that what is wrong is found before anything is computed.

        Args:
            progress: called with the rows read so far, now and then.

        Raises:
            InputError: there are no prompts; a file is wrong, or its kept columns are of other types than another's.
        """
        types = self.declared_types()
        inferred = self.format == "jsonl"
        digest, rows = Digest(), 0
        for rows, row in enumerate((self if inferred else self.bare()).rows(), start=1):
            digest.add(row.prompt)
            if inferred:
                for name, value in row.kept.items():
                    types.setdefault(name, set()).add(_json_type(value))
            if rows % ROWS_BETWEEN == 0:
                progress(rows)
        if not rows:
            raise InputError(f"{self.name} holds no prompts: put at least one in it.")
        if inferred and (missing := [name for name in self.columns.kept or () if name not in types]):
            raise InputError(f"No row of {self.name} has a key {shown(missing[0])!r} to keep: correct --keep.")
        return Contents(rows, digest.hexdigest(), types)

    def declared_types(self) -> dict[str, Any]:
        """Return the kept columns that names of folders and headers give, and their types as Contents has them.

        Raises:
            InputError: a file cannot be read, or has another type than one before it.
        """
        types: dict[str, Any] = {}
        for one in self.files if self.columns.kept != () else ():
            found: dict[str, Any] = {name: {str} if self.format == "jsonl" else str for name in self._wanted(one)}
            if self.format == "parquet":
                found |= parquet_types(one.file, self._within(one))
            elif self.format != "jsonl":
                first = next(read_rows(one.file, self._within(one)), None)
                found |= dict.fromkeys(first.kept if first else (), str)
            for name, kind in found.items():
                before = types.setdefault(name, kind)
                if str(before) == _EMPTY:
                    types[name] = kind
                elif before != kind and str(kind) != _EMPTY:
                    raise InputError(
                        f"{one.file.name} has {shown(str(kind))} in its column {shown(name)!r}, and files before it "
                        f"{shown(str(before))}: convert it, or leave it out with --keep."
                    )
        return types

    def _wanted(self, one: InputFile) -> dict[str, str | None]:
        """Return the kept columns that a file's folders give."""
        kept = self.columns.kept
        return {name: value for name, value in one.partition.items() if kept is None or name in kept}

    def _within(self, one: InputFile) -> Columns:
        """Return what is read of the file itself."""
        if not one.partition:
            return self.columns
        kept = self.columns.kept
        if kept is not None:
            kept = tuple(name for name in kept if name not in one.partition)
        return replace(self.columns, kept=kept, given=tuple(self._wanted(one)))


def _json_type(value: object) -> type:
    """Return a JSON value's type; that of an integer beyond 64 bits is `object`."""
    return object if type(value) is int and not -(2**63) <= value < 2**63 else type(value)


class Digest:
    """The SHA-256 of prompts in their order."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, prompt: str) -> None:
        """Go on with the next prompt."""
        text = prompt.encode()
        self._sha256.update(b"%d " % len(text))
        self._sha256.update(text)

    def hexdigest(self) -> str:
        """Return the digest of those so far."""
        return self._sha256.hexdigest()
