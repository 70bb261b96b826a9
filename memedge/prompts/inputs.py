"""What a command is given as its input: files, patterns, folders, or standard input; and the files they stand for."""

import glob
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from memedge.engine.errors import InputError, shown
from memedge.prompts.files import PromptFile, check_readable
from memedge.prompts.kinds import FileKind, file_kind, known_kind

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
    names begin with `.` or `_`, as writers' marks do. Names of folders such as `lang=en` give columns wherever they
    stand in a path as it is given, so that it is the same who expands a pattern.

    Raises:
        InputError: there is nothing; a file cannot be used; a folder holds a file of an unknown kind; files are of
            different formats, or lie in folders of different columns; a file is named twice.
    """
    found = [
        InputFile(PromptFile.at(path), _partition(path.parts[:-1])) for source in sources for path in _paths_of(source)
    ]
    places: set[str] = set()
    for one in found:
        check_readable(one.file)
        _check_name(one.file.name)
        real = os.path.realpath(one.file.path)
        if real in places:
            raise InputError(f"{one.file.name} is named twice: name each file once.")
        places.add(real)
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
        InputError: standard input is closed or cannot be read, or there is no room for it.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise InputError("Standard input is closed: name a file of prompts.")
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="memedge-"))
            path = Path(folder, f"stdin{kind.suffix}")
            with path.open("wb") as file:
                while block := _block():
                    file.write(block)
        except OSError as error:
            raise InputError(
                f"Standard input cannot be kept in a file ({error.strerror or error}): make room for temporary files, "
                "or name another folder for them in the variable TMPDIR."
            ) from error
        yield (InputFile(PromptFile(path, kind, "Standard input")),)


def _block() -> bytes:
    try:
        return sys.stdin.buffer.read(1 << 20)
    except OSError as error:
        raise InputError(f"Standard input cannot be read ({error.strerror or error}): name a file.") from error


def _paths_of(source: str) -> list[Path]:
    if not source:
        raise InputError("A name of an input is empty: name a file, a pattern or a folder.")
    path = Path(source)
    if path.is_dir():
        return _paths_in(path)
    if not os.path.lexists(source) and glob.has_magic(source):
        # Not Path.glob, which knows no pattern that begins at the root.
        found = [Path(one) for one in glob.glob(source, recursive=True)]  # noqa: PTH207
        if matches := sorted(one for one in found if not one.is_dir()):
            return matches
        raise InputError(f"No file matches {source}: check the pattern.")
    return [path]


def _paths_in(folder: Path) -> list[Path]:
    found, strange = [], []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            raise InputError(f"{place} and another folder in {folder} are the same by a link: remove the link.")
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] not in "._")
        paths = [Path(place, name) for name in names if name[0] not in "._"]
        found += [path for path in paths if known_kind(path)]
        strange += [path for path in paths if not known_kind(path)]
    if not found and strange:
        file_kind(min(strange))  # raises, for it is none of ours
    if not found:
        raise InputError(f"{folder} holds no prompt files: put some in it, or name another folder.")
    if strange:
        pattern = f"{glob.escape(str(folder))}/**/*{min(found).suffix}"
        raise InputError(
            f"{min(strange)} is of an unknown file type: take it out of the folder, or give a pattern such as "
            f"'{pattern}'."
        )
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.")


def _check_name(name: str) -> None:
    """Raise InputError if a name cannot stand in an output or its record."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{shown(name)} has a name that is not UTF-8: rename the file or its folder.") from None


def _partition(folders: Sequence[str]) -> dict[str, str | None]:
    pairs = [folder.partition("=") for folder in folders]
    return {
        unquote(name): None if value == _HIVE_NULL else unquote(value) for name, found, value in pairs if found and name
    }


def _keys(one: InputFile) -> str:
    return ", ".join(one.partition) or "none"
