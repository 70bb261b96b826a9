"""What a command is given as its input: files, patterns, folders, or standard input; and the files they stand for."""

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from memedge.engine.errors import InputError
from memedge.prompts.files import PromptFile
from memedge.prompts.kinds import FileKind, known_kind

STDIN = "-"
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class InputFile:
    """A prompt file, and the columns that its folders' names give each row, as in `lang=en/part-0.parquet`."""

    file: PromptFile
    partition: Mapping[str, str | None] = field(default_factory=dict)


def find_files(sources: Sequence[str]) -> tuple[InputFile, ...]:
    """Return the prompt files that paths, patterns (`*`, `?`, `[…]`, `**`) and folders stand for, in this order.

    Files of a pattern or a folder are sorted by name. Of a folder all files count, at any depth, but for those whose
    names begin with `.` or `_`, as writers' marks do.

    Raises:
        InputError: there is nothing; a folder holds a file of an unknown kind; files are of different formats, or lie
            in folders of different columns; a file is named twice.
    """
    found = [one for source in sources for one in _files_of(source)]
    places: dict[Path, str] = {}
    for one in found:
        path = one.file.path.resolve()
        if path in places:
            raise InputError(f"{one.file.name} is named twice: name each file once.")
        places[path] = one.file.name
        first = found[0]
        if one.file.kind.format != first.file.kind.format:
            raise InputError(
                f"{first.file.name} and {one.file.name} are of different formats: score those of each format alone."
            )
        if list(one.partition) != list(first.partition):
            raise InputError(
                f"{first.file.name} and {one.file.name} lie in folders of different columns "
                f"({_keys(first)}; {_keys(one)}): score them one after the other."
            )
    return tuple(found)


@contextmanager
def standard_input(kind: FileKind) -> Iterator[tuple[InputFile, ...]]:
    """Yield what comes from standard input as a file, for it is read more than once; the file is removed at the end.

    Raises:
        InputError: standard input is closed, or there is no room for it.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("Standard input is closed: name a file of prompts.")
    with tempfile.TemporaryDirectory(prefix="memedge-") as folder:
        path = Path(folder, f"stdin{kind.suffix}")
        stream: BinaryIO = sys.stdin.buffer
        try:
            with path.open("wb") as file:
                shutil.copyfileobj(stream, file)
        except OSError as error:
            raise InputError(
                f"Standard input cannot be kept in {tempfile.gettempdir()} ({error.strerror or error}): make room, or "
                "name another folder in the variable TMPDIR."
            ) from error
        yield (InputFile(PromptFile(path, kind, "Standard input")),)


def _files_of(source: str) -> list[InputFile]:
    path = Path(source)
    if path.is_dir():
        return _files_in(path)
    if not os.path.lexists(source) and glob.has_magic(source):
        # Not Path.glob, which knows no pattern that begins at the root.
        matches = sorted(one for one in glob.glob(source, recursive=True) if not Path(one).is_dir())  # noqa: PTH207
        if not matches:
            raise InputError(f"No file matches {source}: check the pattern.")
        return [InputFile(PromptFile.at(Path(one)), _partition(Path(one).parts[:-1])) for one in matches]
    return [InputFile(PromptFile.at(path))]


def _files_in(folder: Path) -> list[InputFile]:
    found = []
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if name[0] not in "._")
        for name in names:
            path = Path(place, name)
            if name[0] in "._":
                continue
            if known_kind(path) is None:
                raise InputError(
                    f"{path} is of an unknown file type: take it out of the folder, or give a pattern such as "
                    f"'{folder}/**/*.parquet'."
                )
            found.append(path)
    if not found:
        raise InputError(f"{folder} holds no prompt files: put some in it, or name another folder.")
    return [InputFile(PromptFile.at(path), _partition(path.relative_to(folder).parts[:-1])) for path in sorted(found)]


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.")


def _partition(folders: Sequence[str]) -> dict[str, str | None]:
    pairs = [folder.partition("=") for folder in folders]
    return {name: None if value == _HIVE_NULL else unquote(value) for name, found, value in pairs if found and name}


def _keys(one: InputFile) -> str:
    return ", ".join(one.partition) or "none"
