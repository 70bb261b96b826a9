"""Where a job's scores go: one file, or a folder of parts; written beside its place and moved there whole."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from memedge.engine.errors import InputError
from memedge.engine.places import check_folder_of
from memedge.prompts.kinds import NAMES, FileKind, file_kind, known_kind
from memedge.scoring.record import Part, Record
from memedge.scoring.score_files import Layout, OutputRow, write_scores

PART_ROWS = 100_000
BESIDE = ".partial"  # the journal's suffix
UNFINISHED = f"{BESIDE}-output"
RECORD = "job.json"  # what says how an output was made: in a folder `_job.json`, beside a file `FILE.job.json`


@dataclass(frozen=True)
class Output:
    """A score file, or a folder of them.

    Attributes:
        place: its path.
        kind: what its files are.
        folder: whether it is a folder of parts.
    """

    place: Path
    kind: FileKind
    folder: bool

    @staticmethod
    def at(place: Path, format: str | None = None, *, slash: bool = False) -> "Output":
        """Return what a path stands for: a name with a known suffix is a file, one without a suffix a folder.

        Args:
            place: the path.
            format: of a folder's parts, "parquet" or "jsonl"; default: parquet. A file's must be that of its name.
            slash: whether the path was given with a slash at its end: then it is a folder, whatever its name is.

        Raises:
            InputError: no name, an unknown suffix, another format than the name says, or the folder that it lies in is
                missing or cannot be written to.
        """
        if place.name in ("", ".."):
            raise InputError(f"{place} is no name of an output: name a file, or a folder to make.")
        check_folder_of(place, "write the output elsewhere")
        named = known_kind(place)
        if named and not slash and not place.is_dir():
            kind = file_kind(place)
            if format not in (None, kind.format):
                raise InputError(f"{place} is no name of a {format} file: end it in .{format}, or leave out --format.")
            return Output(place, kind, False)
        if place.suffix and not slash and not place.is_dir():
            raise InputError(f"{place} has an unknown file type: use {NAMES}, or end the name of a folder in a slash.")
        if format not in (None, "parquet", "jsonl"):
            raise InputError(f"A folder's parts cannot be {format}: use --format parquet or jsonl, or name one file.")
        return Output(place, file_kind(Path(f"part.{format or 'parquet'}")), True)

    @property
    def journal(self) -> Path:
        """Where the results are kept until the output is whole."""
        return self.place.with_name(f"{self.place.name}{BESIDE}")

    @property
    def unfinished(self) -> Path:
        """Where the output is written before it is moved to its place."""
        return self.place.with_name(f"{self.place.name}{UNFINISHED}")

    @property
    def record_path(self) -> Path:
        """Where the record of how it was made is."""
        return self.place / f"_{RECORD}" if self.folder else self.place.with_name(f"{self.place.name}.{RECORD}")

    @property
    def exists(self) -> bool:
        """Whether there is something in its place; an empty folder is nothing."""
        return self.place.is_file() or (self.place.is_dir() and any(self.place.iterdir()))

    def record(self) -> Record | None:
        """Return how what is there was made, or None if nothing says so."""
        return Record.read(self.record_path)

    def check(self, inputs: list[Path], *, overwrite: bool) -> None:
        """Check that it can be written where it is.

        Args:
            inputs: the files that are read, and the folders whose files are read.
            overwrite: whether what is there may be replaced.

        Raises:
            InputError: it cannot; or it is one of the inputs, or holds one; or something is there.
        """
        place = self.place
        if self.folder and place.is_symlink():
            raise InputError(f"{place} is a link: name the folder that it leads to, or another output.")
        longest = os.pathconf(place.resolve().parent, "PC_NAME_MAX") - len(f"{UNFINISHED}-journal")
        if len(os.fsencode(place.name)) > longest:
            raise InputError(f"The name of {place} is too long for files beside it: use {longest} bytes at most.")
        for path in inputs:
            if place.exists() and path.exists() and place.samefile(path):
                raise InputError(f"{place} is the input file too: name another file for the output.")
            if path.resolve() in place.resolve().parents:
                raise InputError(f"{place} lies in the input folder {path}: write the output elsewhere.")
            if self.folder and place.resolve() in path.resolve().parents:
                raise InputError(f"{place} holds the input {path}: name another folder for the output.")
        if place.exists() and not (place.is_dir() if self.folder else place.is_file()):
            raise InputError(f"{place} is neither a file nor a folder: name another output.")
        if self.folder and self.exists:
            self._check_ours()
        if self.exists and not overwrite:
            raise InputError(f"{place} is there already: replace it with --overwrite, or name another output.")

    def _check_ours(self) -> None:
        """Raise InputError if the folder holds what memedge did not write: replacing it would lose that."""
        record = self.record()
        if record is None:
            raise InputError(f"{self.place} is a folder that memedge did not write: name another, or empty it.")
        ours = {self.record_path.name, *(part.name for part in record.parts)}
        if others := sorted(path.name for path in self.place.iterdir() if path.name not in ours):
            raise InputError(
                f"{self.place} holds {others[0]}, which memedge did not write: move it away, or name another output."
            )

    def part_name(self, number: int) -> str:
        """Return the name of a part, counted from 1."""
        return f"part-{number:05}{self.kind.suffix}" if self.folder else self.place.name

    def missing(self, record: Record) -> list[int]:
        """Return which of the parts on record are not there as they were written, counted from 1."""
        paths = [self.place / part.name if self.folder else self.place for part in record.parts]
        return [
            number
            for number, (path, part) in enumerate(zip(paths, record.parts, strict=True), start=1)
            if not path.is_file() or path.stat().st_size != part.bytes
        ]

    def write(self, layout: Layout, rows: Iterator[OutputRow], part_rows: int) -> list[Part]:
        """Write all rows beside its place, and wait until they are on the disk; return the parts.

        Raises:
            OSError: there is no room, or another fault; nothing is left of it.
        """
        remove(self.unfinished)  # of a job that was killed here; the journal's lock says it is not alive
        try:
            if not self.folder:
                return [self.write_part(self.unfinished, 1, layout, rows)]
            self.unfinished.mkdir()
            parts = []
            for number, some in enumerate(_pieces(rows, part_rows), start=1):
                parts.append(self.write_part(self.unfinished / self.part_name(number), number, layout, some))
            sync(self.unfinished)
            return parts
        except BaseException:
            remove(self.unfinished)
            raise

    def write_part(self, path: Path, number: int, layout: Layout, rows: Iterator[OutputRow]) -> Part:
        """Write rows to the new file `path`, which is to be the part of this number; raises OSError."""
        written = write_scores(path, self.kind, layout, rows)
        sync(path)
        return Part(self.part_name(number), written, path.stat().st_size)

    def complete(self, record: Record) -> None:
        """Put all that belongs to it into what was written: a folder holds its record; raises OSError."""
        if self.folder:
            record.write(self.unfinished / f"_{RECORD}")

    def finish(self, record: Record) -> None:
        """Move what was written to its place, and a file's record beside it; raises OSError."""
        old = self.place.with_name(f"{self.place.name}{BESIDE}-old")
        remove(old)
        if self.folder and self.exists:  # a folder can replace an empty one only
            self.place.rename(old)
        self.unfinished.replace(self.place)
        sync(self.place.resolve().parent)
        remove(old)
        if not self.folder:
            record.write(self.record_path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when the file's content, or the folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_room(place: Path, error: OSError, then: str) -> InputError:
    """Return the error for an output that cannot be written."""
    return InputError(f"{place} cannot be written ({error.strerror or error}): make room, then {then}.")


def _pieces(rows: Iterator[OutputRow], size: int) -> Iterator[Iterator[OutputRow]]:
    """Yield iterators of `size` rows each, which must be used up one after the other."""
    for first in rows:
        yield islice(chain([first], rows), size)
