"""Prompt files in, read as streams: `.txt`, `.csv`, `.tsv`, `.jsonl` and `.parquet`, told apart by their names.

- `.txt`: a prompt per line, as it stands.
- `.csv`: RFC 4180 with a header; the prompts are in the column `prompt`, or in the only one named prompt, caption or
  text in any case of letters. `.tsv`: the same with tabs between the cells.
- `.jsonl`: per line an object with such a key, or the prompt itself as a JSON string.
- `.parquet`: the prompts are in such a column, of strings. Needs the extra `eval`.

All but parquet, which is compressed in itself, may be compressed: `.jsonl.gz`, `.csv.zst` (needs the extra `eval`).

Text is UTF-8, with or without a byte order mark; lines end in `\\n` or `\\r\\n`. What other encodings and line ends
look like is refused: NUL characters, a carriage return within a line, a mark within the text. An empty line is no
prompt in any of them; the empty prompt is an empty cell (`""` where it is the only column), `{"prompt": ""}` or an
empty string.
`memedge.scoring.score_files` writes the same formats.
"""

import csv
import json
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from memedge.engine.errors import InputError
from memedge.prompts.arrow import to_rows
from memedge.prompts.cells import SCORE_COLUMNS, unguarded
from memedge.prompts.columns import Columns
from memedge.prompts.kinds import FileKind, file_kind, import_pyarrow, open_bytes

# No prompt comes near these; they keep memory bounded when a file is not what its suffix says.
LONGEST_PROMPT = 131_072  # characters; also the longest cell Python's csv module reads by default
LONGEST_LINE = 16 * 1024 * 1024  # bytes
PARQUET_BATCH = 1024  # rows

_LONE_CR = "{path}, {place}, has a carriage return that ends no line here: end lines in LF or CR LF."
_UNREADABLE = "{path} cannot be read ({reason}): check the file."
_DAMAGED = "{path} is not a {suffix} file or is damaged: write it again."


class PromptRow(NamedTuple):
    """A prompt, and the values of the columns that are kept beside it, by their names."""

    prompt: str
    kept: dict[str, Any]


Placed = tuple[str, object, dict[str, Any]]  # where a row stands ("line 3"), what should be its prompt, what is kept


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts.

    Attributes:
        path: where it is.
        kind: what is in it.
        name: what messages call it.
    """

    path: Path
    kind: FileKind
    name: str

    @staticmethod
    def at(path: Path) -> "PromptFile":
        """Return the file of this path; raises InputError if its name says no kind. It need not exist."""
        return PromptFile(path, file_kind(path), str(path))


def read_prompts(path: Path) -> Iterator[str]:
    """Yield the prompts of a file in its order.

    Raises:
        InputError: when iterated: as `read_rows`, or the file is empty.
    """
    empty = True
    for row in read_rows(PromptFile.at(path), Columns()):
        empty = False
        yield row.prompt
    if empty:
        raise InputError(f"{path} holds no prompts: put at least one in it.")


def read_rows(file: PromptFile, columns: Columns) -> Iterator[PromptRow]:
    """Yield the rows of a file in its order. One line, or one batch of parquet rows, is in memory.

    Raises:
        InputError: when iterated: the file is missing, unreadable, not what its suffix says, or has other columns.
            Lines are counted from 1 with the header, parquet rows from 1.
    """
    check_readable(file)
    name = file.name
    try:
        for place, prompt, kept in _READERS[file.kind.format](file, columns):
            if not isinstance(prompt, str):
                kind = "null" if prompt is None else f"of type {type(prompt).__name__}"
                raise InputError(f"{name}, {place}, has a prompt that is {kind}: make every prompt a string.")
            if len(prompt) > LONGEST_PROMPT:
                raise InputError(
                    f"{name}, {place}, has a prompt of more than {LONGEST_PROMPT} characters: "
                    "check that the file holds one prompt per row."
                )
            if "\0" in prompt:
                raise InputError(f"{name}, {place}, has a prompt with a NUL character, which is no text: remove it.")
            yield PromptRow(prompt, kept)
    except (EOFError, zlib.error) as error:  # gzip's own
        raise InputError(_DAMAGED.format(path=name, suffix=file.kind.suffix)) from error
    except OSError as error:
        if file.kind.compression and error.errno is None:  # what a library says of damaged data
            raise InputError(_DAMAGED.format(path=name, suffix=file.kind.suffix)) from error
        raise InputError(_UNREADABLE.format(path=name, reason=error.strerror or error)) from error


def check_readable(file: PromptFile) -> None:
    """Raise InputError if there is no such file, or it is no plain file."""
    try:
        mode = file.path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{file.name} does not exist: check the name of the prompt file.") from None
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long or holds a NUL
        raise InputError(f"{file.name} cannot be read ({getattr(error, 'strerror', error)}): check the name.") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{file.name} is a directory: name a prompt file in it.")
    if not stat.S_ISREG(mode):
        raise InputError(f"{file.name} is a pipe or device, which can be read only once: save the prompts to a file.")


def parquet_types(file: PromptFile, columns: Columns) -> dict[str, Any]:
    """Return the Arrow types of the kept columns of a parquet file, by their names; raises InputError."""
    pyarrow, parquet = import_pyarrow()
    check_readable(file)
    try:
        schema = parquet.read_schema(file.path)
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(_UNREADABLE.format(path=file.name, reason=error.strerror)) from error
        raise InputError(_DAMAGED.format(path=file.name, suffix=".parquet")) from error
    prompt = columns.prompt_of(file.name, schema.names)
    return {name: schema.field(name).type for name in columns.kept_of(file.name, schema.names, prompt)}


def _lines(file: PromptFile) -> Iterator[tuple[int, str]]:
    """Yield numbers from 1 and lines with their ends. Only `\\n` ends one: prompts may hold U+2028 and its kin."""
    name = file.name
    with open_bytes(file.path, file.kind.compression) as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise InputError(
                    f"{name}, line {number}, is longer than {LONGEST_LINE} bytes: check that it is a text file."
                )
            if b"\0" in line:
                raise InputError(
                    f"{name}, line {number}, holds a NUL character, as text in UTF-16 does: save the file as UTF-8."
                )
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{name}, line {number}, is not valid UTF-8: save the file as UTF-8.") from error


def _filled_lines(file: PromptFile) -> Iterator[tuple[str, str]]:
    """Yield where each line stands that is not empty, and the line without its end."""
    for number, line in _lines(file):
        if text := line.removesuffix("\n").removesuffix("\r"):
            if "\r" in text:
                raise InputError(_LONE_CR.format(path=file.name, place=f"line {number}"))
            if number > 1 and text.startswith("\ufeff"):
                raise InputError(
                    f"{file.name}, line {number}, begins with a byte order mark, as joined files do: remove the mark."
                )
            yield f"line {number}", text


def _read_txt(file: PromptFile, columns: Columns) -> Iterator[Placed]:
    if columns.prompt is not None or columns.kept:
        raise InputError(f"{file.name} is plain text, which has no columns: leave out --column and --keep.")
    for place, text in _filled_lines(file):
        yield place, text, {}


def _read_csv(file: PromptFile, columns: Columns) -> Iterator[Placed]:
    suffix = file.kind.format.upper()
    dialect = csv.excel_tab if suffix == "TSV" else csv.excel
    rows = csv.reader((line for _, line in _lines(file)), dialect, strict=True)
    header: list[str] = []
    kept: list[tuple[str, int]] = []
    column = end = 0
    ours = False
    try:
        for row in rows:
            first, end = end + 1, rows.line_num  # cells may hold line ends; a row is named by its first line
            if not row:
                continue
            if not header:
                header = row
                prompt = columns.prompt_of(file.name, header)
                column = header.index(prompt)
                kept = [(name, header.index(name)) for name in columns.kept_of(file.name, header, prompt)]
                ours = set(SCORE_COLUMNS) <= set(header)
            elif len(row) != len(header):
                raise InputError(
                    f"{file.name}, line {first}, has {len(row)} cells where the header has {len(header)}: "
                    f"put prompts that hold {'tabs' if suffix == 'TSV' else 'commas'} in double quotes."
                )
            else:
                text = unguarded(row[column]) if ours else row[column]
                yield f"line {first}", text, {name: row[index] for name, index in kept}
    except csv.Error as error:
        place, reason = f"line {end + 1}", str(error).replace("\t", "tab")
        if reason.startswith("new-line character"):
            raise InputError(_LONE_CR.format(path=file.name, place=place)) from error
        if reason.startswith("field larger") and rows.line_num <= end + 1:  # else a quote may have swallowed lines
            raise InputError(
                f"{file.name}, {place}, has a cell of more than {LONGEST_PROMPT} characters: shorten it."
            ) from error
        raise InputError(f"{file.name}, {place}, is broken {suffix} ({reason}): check the double quotes.") from error


def _read_jsonl(file: PromptFile, columns: Columns) -> Iterator[Placed]:
    prompt = columns.prompt
    for place, text in _filled_lines(file):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or a number too long"
            raise InputError(
                f'{file.name}, {place}, is broken JSON ({reason}): write one {{"prompt": "..."}} per line.'
            ) from error
        if "\\u" in text and not _is_text(value):
            raise InputError(f"{file.name}, {place}, has half a surrogate pair (\\ud800 to \\udfff): remove it.")
        kept: dict[str, Any] = {}
        if isinstance(value, dict):
            if prompt not in value:  # the first row's name is that of all, so that no prompt is taken from elsewhere
                columns = replace(columns, prompt=prompt)
                prompt = columns.prompt_of(f"{file.name}, {place},", list(value))
            columns.check_given(f"{file.name}, {place},", value)
            wanted = value if columns.kept is None else columns.kept
            kept = {name: value[name] for name in wanted if name != prompt and name in value}
            value = value[prompt]
        yield place, value, kept


def _read_parquet(file: PromptFile, columns: Columns) -> Iterator[Placed]:
    pyarrow, parquet = import_pyarrow()
    row = 0
    try:
        # With a buffer size pages are read as needed; without it a whole row group's column is.
        with parquet.ParquetFile(file.path, buffer_size=1024 * 1024, pre_buffer=False) as opened:
            schema = opened.schema_arrow
            prompt = columns.prompt_of(file.name, schema.names)
            kept = columns.kept_of(file.name, schema.names, prompt)
            kind = schema.field(prompt).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise InputError(f"{file.name} has {kind} in its column {prompt!r}: make every prompt a string.")
            for batch in opened.iter_batches(PARQUET_BATCH, columns=[prompt, *kept]):
                beside = to_rows(batch.select(kept)) if kept else [{}] * batch.num_rows
                for text, values in zip(batch.column(prompt).to_pylist(), beside, strict=True):
                    row += 1
                    yield f"row {row}", text, values
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file.name} has text after row {row} that is not valid UTF-8: write it again as UTF-8."
        ) from error
    except InputError:
        raise
    except Exception as error:  # pyarrow's own, and whatever else a damaged file makes it raise
        if isinstance(error, OSError) and error.errno is not None:  # the system's
            raise
        raise InputError(_DAMAGED.format(path=file.name, suffix=".parquet")) from error


def _is_text(value: object) -> bool:
    """Return whether UTF-8 can write what JSON holds: its escapes can spell lone surrogates."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


_READERS: dict[str, Callable[[PromptFile, Columns], Iterator[Placed]]] = {
    "txt": _read_txt,
    "csv": _read_csv,
    "tsv": _read_csv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
