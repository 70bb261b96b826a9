"""Prompt files in: `.txt`, `.csv`, `.jsonl` and `.parquet`, told apart by suffix and read as streams.

- `.txt`: a prompt per line, as it stands.
- `.csv`: RFC 4180 with a header; the prompts are in the column `prompt`, other columns are ignored.
- `.jsonl`: per line an object with the key `prompt` (other keys are ignored), or the prompt itself as a JSON string.
- `.parquet`: the prompts are in the string column `prompt`. Needs the extra `eval`.

Text is UTF-8, with or without a byte order mark; lines end in `\\n` or `\\r\\n`. What other encodings and line ends
look like is refused: NUL characters, a carriage return within a line, a mark within the text. An empty line is no
prompt in any of them; the empty prompt is an empty cell (`""` where it is the only column), `{"prompt": ""}` or an
empty string.
`memedge.scoring.score_files` writes the same four formats.
"""

import csv
import json
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from memedge.engine.errors import InputError, not_installed
from memedge.prompts.cells import SCORE_COLUMNS, unguarded

# No prompt comes near these; they keep memory bounded when a file is not what its suffix says.
LONGEST_PROMPT = 131_072  # characters; also the longest cell Python's csv module reads by default
LONGEST_LINE = 16 * 1024 * 1024  # bytes
PARQUET_BATCH = 1024  # rows

_LONE_CR = "{path}, {place}, has a carriage return that ends no line here: end lines in LF or CR LF."
Placed = tuple[str, object]  # where a value stands in its file ("line 3"), and the value that should be a prompt


def check_format(path: Path) -> str:
    """Return the format of `path`: its suffix in lower case. The file need not exist.

    Raises:
        InputError: the suffix is not one of the four, or it is `.parquet` and pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise InputError(f"{path} has an unknown file type: use a name that ends in .txt, .csv, .jsonl or .parquet.")
    if suffix == ".parquet":
        import_pyarrow()
    return suffix


def read_prompts(path: Path) -> Iterator[str]:
    """Yield the prompts of a file in its order. One line, or one batch of parquet rows, is in memory.

    Raises:
        InputError: when iterated: the file is missing, unreadable, empty, or not what its suffix says. Lines are
            counted from 1 with the header, parquet rows from 1.
    """
    read = _READERS[check_format(path)]
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist: check the name of the prompt file.") from None
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long or holds a NUL
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', error)}): check the name.") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a directory: name a prompt file in it.")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is a pipe or device, which can be read only once: save the prompts to a file first.")
    empty = True
    try:
        for place, prompt in read(path):
            if not isinstance(prompt, str):
                kind = "null" if prompt is None else f"of type {type(prompt).__name__}"
                raise InputError(f"{path}, {place}, has a prompt that is {kind}: make every prompt a string.")
            if len(prompt) > LONGEST_PROMPT:
                raise InputError(
                    f"{path}, {place}, has a prompt of more than {LONGEST_PROMPT} characters: "
                    "check that the file holds one prompt per row."
                )
            if "\0" in prompt:
                raise InputError(f"{path}, {place}, has a prompt with a NUL character, which is no text: remove it.")
            empty = False
            yield prompt
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): check the file.") from error
    if empty:
        raise InputError(f"{path} holds no prompts: put at least one in it.")


def import_pyarrow() -> tuple[Any, Any]:
    """Return the modules `pyarrow` and `pyarrow.parquet`; raise InputError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(not_installed("A .parquet file", "pyarrow", "eval")) from error
    return pyarrow, pyarrow.parquet


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbers from 1 and lines with their ends. Only `\\n` ends one: prompts may hold U+2028 and its kin."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise InputError(
                    f"{path}, line {number}, is longer than {LONGEST_LINE} bytes: check that it is a text file."
                )
            if b"\0" in line:
                raise InputError(
                    f"{path}, line {number}, holds a NUL character, as text in UTF-16 does: save the file as UTF-8."
                )
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, line {number}, is not valid UTF-8: save the file as UTF-8.") from error


def _filled_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield where each line stands that is not empty, and the line without its end."""
    for number, line in _lines(path):
        if text := line.removesuffix("\n").removesuffix("\r"):
            if "\r" in text:
                raise InputError(_LONE_CR.format(path=path, place=f"line {number}"))
            if number > 1 and text.startswith("\ufeff"):
                raise InputError(
                    f"{path}, line {number}, begins with a byte order mark, as joined files do: remove the mark."
                )
            yield f"line {number}", text


def _read_csv(path: Path) -> Iterator[Placed]:
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] = []
    column = end = 0
    ours = False
    try:
        for row in rows:
            first, end = end + 1, rows.line_num  # cells may hold line ends; a row is named by its first line
            if not row:
                continue
            if not header:
                column, header = _prompt_column(path, row), row
                ours = tuple(header) == SCORE_COLUMNS
            elif len(row) != len(header):
                raise InputError(
                    f"{path}, line {first}, has {len(row)} cells where the header has {len(header)}: "
                    "put prompts that hold commas in double quotes."
                )
            else:
                yield f"line {first}", unguarded(row[column]) if ours else row[column]
    except csv.Error as error:
        place, reason = f"line {end + 1}", str(error)
        if reason.startswith("new-line character"):
            raise InputError(_LONE_CR.format(path=path, place=place)) from error
        if reason.startswith("field larger") and rows.line_num <= end + 1:  # else a quote may have swallowed lines
            raise InputError(
                f"{path}, {place}, has a cell of more than {LONGEST_PROMPT} characters: shorten it."
            ) from error
        raise InputError(f"{path}, {place}, is broken CSV ({reason}): check the double quotes.") from error


def _read_jsonl(path: Path) -> Iterator[Placed]:
    for place, text in _filled_lines(path):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or a number too long"
            raise InputError(
                f'{path}, {place}, is broken JSON ({reason}): write one {{"prompt": "..."}} per line.'
            ) from error
        if isinstance(value, dict):
            if "prompt" not in value:
                raise InputError(f"{path}, {place}, has no key 'prompt', only {_names(value)}: name it so.")
            value = value["prompt"]
        if isinstance(value, str) and not _is_text(value):
            raise InputError(
                f"{path}, {place}, has a prompt with half a surrogate pair (\\ud800 to \\udfff): remove it."
            )
        yield place, value


def _read_parquet(path: Path) -> Iterator[Placed]:
    pyarrow, parquet = import_pyarrow()
    row = 0
    try:
        # With a buffer size pages are read as needed; without it a whole row group's column is.
        with parquet.ParquetFile(path, buffer_size=1024 * 1024, pre_buffer=False) as file:
            schema = file.schema_arrow
            kind = schema.field(_prompt_column(path, schema.names)).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise InputError(f"{path} has {kind} in its column 'prompt': make every prompt a string.")
            for batch in file.iter_batches(PARQUET_BATCH, columns=["prompt"]):
                for prompt in batch.column(0).to_pylist():
                    row += 1
                    yield f"row {row}", prompt
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} has a prompt after row {row} that is not valid UTF-8: write it again as UTF-8."
        ) from error
    except InputError:
        raise
    except Exception as error:  # pyarrow's own, and whatever else a damaged file makes it raise
        raise InputError(f"{path} is not a parquet file or is damaged: write it again.") from error


def _prompt_column(path: Path, names: list[str]) -> int:
    if names.count("prompt") != 1:
        raise InputError(f"{path} needs exactly one column 'prompt', but has {_names(names)}: name it so.")
    return names.index("prompt")


def _names(names: Iterable[str]) -> str:
    """Return names for an error message, cut where they would make the sentence too long."""
    text = ", ".join(map(repr, names)) or "none"
    return text if len(text) <= 200 else text[:200] + "..."


def _is_text(value: str) -> bool:
    """Return whether UTF-8 can write it: JSON's escapes can spell lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".txt": _filled_lines,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
