"""Score files out: the formats that `memedge.prompts.files` reads, a row per prompt.

The columns are `prompt, norm, alignment, score, memorized, truncated`, and behind them those that are kept of the
input. In front stand the column of ids, if one is named, and in a shard's file before it `row`, the number of the
prompt in the input from 1, by which `memedge merge` restores its order. Where passes may be left out, `passes, reason`
stand behind `truncated`, and norm, alignment and score are empty or null if they were not computed. Floats read back
exactly; truth values are `true` and `false`. Without a calibration `memorized` and, unless γ was published for the
model, `score` are empty in `.csv`, `.tsv` and `.txt`, null in `.jsonl` and `.parquet`.

- `.csv`: RFC 4180, so lines end in `\\r\\n` and prompts are quoted where they must be. A prompt that a spreadsheet
  would run as a formula has an apostrophe in front (memedge/prompts/cells.py), which `read_prompts` takes away again;
  kept columns are as they were. `.tsv`: the same with tabs between the cells.
- `.txt`: tab-separated with a header and always one line per prompt: backslash, tab, newline and carriage return are
  written `\\\\`, `\\t`, `\\n` and `\\r`.
- `.jsonl`: an object per line, in UTF-8 without escapes where JSON needs none; a kept key that a row lacks stays out.
- `.parquet`: string, three float64, two bool, and float64 and string of `passes, reason`; kept columns have the type
  they had in parquet, string if they come from cells, and bool, int64, float64 or string if they come from JSON. Where
  JSON mixes integers and floats they are float64; a column of several other types, of lists, of objects, or with an
  integer beyond 64 bits is strings that hold its JSON. Needs the extra `eval`.

In text a kept value of parquet is written as ISO 8601 if it is a date, a time or a duration (memedge/prompts/arrow.py),
as a string if it is a decimal, as JSON if it is a list, a struct (an object) or a map (a list of pairs), and as null in
JSON if it is no finite number. Bytes are refused.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from memedge.engine.errors import InputError
from memedge.prompts.arrow import as_text, holds_bytes, to_array
from memedge.prompts.cells import EARLY_COLUMNS, SCORE_COLUMNS, guarded
from memedge.prompts.kinds import FileKind, create_bytes, import_pyarrow

ROW_GROUP = 8192  # rows of a parquet file written, and held in memory, at once
NUMBER = "row"  # the column of a row's number in the input


class ScoreRow(NamedTuple):
    """A prompt and its results; `score` and `memorized` may be None (see results.Scores).

    Where passes may be left out, norm and alignment may be None too, and `passes` and `reason` are there (see
    results.Verdict).
    """

    prompt: str
    norm: float | None
    alignment: float | None
    score: float | None
    memorized: bool | None
    truncated: bool
    passes: float | None = None
    reason: str | None = None


class OutputRow(NamedTuple):
    """One row of a score file: the number that it has in the input, from 1; its results; its kept columns by name."""

    number: int
    scores: ScoreRow
    kept: dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """The columns of a score file.

    Attributes:
        kept: the columns that are kept, and their types as `corpus.Contents` has them.
        id: the one of them that stands in front.
        numbered: whether there is a column `row`.
        early: whether there are columns `passes` and `reason`.
    """

    kept: dict[str, Any] = field(default_factory=dict)
    id: str | None = None
    numbered: bool = False
    early: bool = False

    @property
    def ours(self) -> tuple[str, ...]:
        """The columns that a ScoreRow begins with."""
        return (*SCORE_COLUMNS, *EARLY_COLUMNS) if self.early else SCORE_COLUMNS

    @property
    def front(self) -> list[str]:
        """The kept columns in front of ours."""
        return [self.id] if self.id is not None else []

    @property
    def back(self) -> list[str]:
        """The kept columns behind ours."""
        return [name for name in self.kept if name != self.id]

    @property
    def names(self) -> list[str]:
        """All columns in their order."""
        return [*([NUMBER] if self.numbered else []), *self.front, *self.ours, *self.back]

    def check(self, kind: FileKind, source: str) -> None:
        """Raise InputError if a kept column is named like one of ours, or cannot be written as such a file."""
        ours = {*self.ours, *([NUMBER] if self.numbered else [])}
        if clash := [name for name in self.kept if name in ours]:
            raise InputError(
                f"{source} has a column {clash[0]!r}, which is the name of one of the output's: rename it, or leave "
                "it out with --keep none or --keep and the names of others."
            )
        if self.id is not None and self.id not in self.kept:
            raise InputError(f"{source} has no column {self.id!r} of ids: correct --id-column.")
        binary = [name for name, one in self.kept.items() if _from_parquet(one) and holds_bytes(one)]
        if binary and kind.format != "parquet":
            raise InputError(
                f"{source} has bytes in its column {binary[0]!r}, which text cannot hold: write .parquet, or leave "
                "it out with --keep none or --keep and the names of others."
            )

    def values(self, row: OutputRow) -> list[Any]:
        """Return the values of a row in the order of `names`."""
        kept = row.kept
        return [
            *([row.number] if self.numbered else []),
            *(kept.get(name) for name in self.front),
            *row.scores[: len(self.ours)],
            *(kept.get(name) for name in self.back),
        ]


def write_scores(path: Path, kind: FileKind, layout: Layout, rows: Iterable[OutputRow]) -> int:
    """Write rows to the new file `path`; return how many.

    Raises:
        OSError: the file exists or cannot be written; what was written of it stays.
    """
    written = 0

    def counted() -> Iterator[OutputRow]:
        nonlocal written
        for written, row in enumerate(rows, start=1):  # noqa: B007 - read at the end
            yield row

    if kind.format == "parquet":
        _write_parquet(path, layout, counted())
    else:
        with (
            create_bytes(path, kind.compression) as stream,
            io.TextIOWrapper(stream, encoding="utf-8", newline="") as file,
        ):
            _WRITERS[kind.format](file, layout, _as_text(layout, counted()))
    return written


def _as_text(layout: Layout, rows: Iterator[OutputRow]) -> Iterator[OutputRow]:
    """Yield the rows with text for the times in kept columns of parquet."""
    makers = {name: make for name, kind in layout.kept.items() if _from_parquet(kind) and (make := as_text(kind))}
    if not makers:
        yield from rows
    for row in rows:
        texts = {name: make(value) for name, make in makers.items() if (value := row.kept.get(name)) is not None}
        yield row._replace(kept=row.kept | texts) if texts else row


def _write_txt(file: io.TextIOBase, layout: Layout, rows: Iterator[OutputRow]) -> None:
    escapes = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    for values in (layout.names, *map(layout.values, rows)):
        file.write("\t".join(_cell(value).translate(escapes) for value in values) + "\n")


def _write_csv(file: io.TextIOBase, layout: Layout, rows: Iterator[OutputRow], dialect: Any = csv.excel) -> None:
    writer = csv.writer(file, dialect)
    writer.writerow(layout.names)
    for row in rows:
        guarded_row = row._replace(scores=row.scores._replace(prompt=guarded(row.scores.prompt)))
        writer.writerow(map(_cell, layout.values(guarded_row)))


def _write_tsv(file: io.TextIOBase, layout: Layout, rows: Iterator[OutputRow]) -> None:
    _write_csv(file, layout, rows, csv.excel_tab)


def _write_jsonl(file: io.TextIOBase, layout: Layout, rows: Iterator[OutputRow]) -> None:
    for row in rows:
        number = {NUMBER: row.number} if layout.numbered else {}
        front = {name: row.kept[name] for name in layout.front if name in row.kept}
        back = {name: row.kept[name] for name in layout.back if name in row.kept}
        ours = dict(zip(layout.ours, row.scores, strict=False))
        file.write(_json({**number, **front, **ours, **back}) + "\n")


def _write_parquet(path: Path, layout: Layout, rows: Iterator[OutputRow]) -> None:
    pyarrow, parquet = import_pyarrow()
    text, real, truth = pyarrow.string(), pyarrow.float64(), pyarrow.bool_()
    ours = dict(zip(ScoreRow._fields, (text, real, real, real, truth, truth, real, text), strict=True))
    ours[NUMBER] = pyarrow.int64()
    as_json = {name for name, kind in layout.kept.items() if isinstance(kind, set) and _of_json(kind) is None}
    as_float = {name for name, kind in layout.kept.items() if isinstance(kind, set) and _of_json(kind) is float}
    types = ours | {name: _arrow(pyarrow, kind) for name, kind in layout.kept.items()}
    schema = pyarrow.schema([(name, types[name]) for name in layout.names])
    with path.open("xb") as file, parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            columns = dict(zip(layout.names, zip(*map(layout.values, group), strict=True), strict=True))
            for name in as_json:
                columns[name] = tuple(None if value is None else _json(value) for value in columns[name])
            for name in as_float:
                columns[name] = tuple(None if value is None else float(value) for value in columns[name])
            arrays = [to_array(columns[field.name], field.type) for field in schema]
            writer.write_table(pyarrow.table(arrays, schema=schema))


def _from_parquet(kind: Any) -> bool:
    """Return whether a kept column comes from parquet."""
    return not isinstance(kind, set | type)


def _arrow(pyarrow: Any, kind: Any) -> Any:
    """Return the Arrow type of a kept column."""
    if isinstance(kind, set):
        kind = _of_json(kind) or str
    names = {str: pyarrow.string, bool: pyarrow.bool_, int: pyarrow.int64, float: pyarrow.float64}
    return names[kind]() if kind in names else kind


def _of_json(kinds: set[type]) -> type | None:
    """Return the one type that a column of such JSON values has, or None."""
    kinds = kinds - {type(None)}
    if kinds == {int, float}:
        return float
    return next(iter(kinds)) if len(kinds) == 1 and kinds <= {str, bool, int, float} else None


def _cell(value: Any) -> str:
    """Return a value as text; `repr` gives the shortest digits that read back as the same float64."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict | list | tuple):
        return _json(value)
    return str(value)


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:  # a kept number that JSON does not have
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    """Return JSON values with null for every number that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_WRITERS: dict[str, Callable[[io.TextIOBase, Layout, Iterator[OutputRow]], None]] = {
    "txt": _write_txt,
    "csv": _write_csv,
    "tsv": _write_tsv,
    "jsonl": _write_jsonl,
}
