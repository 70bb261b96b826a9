"""Score files out: the four formats `memedge.prompts.files` reads, a row per prompt.

The columns are always `prompt, norm, alignment, score, memorized, truncated`. Floats read back exactly; truth values
are `true` and `false`. Without a calibration `memorized` and, unless γ was published for the model, `score` are empty
in `.csv` and `.txt`, null in `.jsonl` and `.parquet`.

- `.csv`: RFC 4180, so lines end in `\\r\\n` and prompts are quoted where they must be. A prompt that a spreadsheet
  would run as a formula has an apostrophe in front (memedge/prompts/cells.py), which `read_prompts` takes away again.
- `.txt`: tab-separated with a header and always one line per prompt: backslash, tab, newline and carriage return in a
  prompt are written `\\\\`, `\\t`, `\\n` and `\\r`.
- `.jsonl`: an object per line, in UTF-8 without escapes where JSON needs none.
- `.parquet`: string, three float64, two bool. Needs the extra `eval`.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from memedge.prompts.cells import guarded
from memedge.prompts.files import import_pyarrow

ROW_GROUP = 8192  # rows of a parquet file written, and held in memory, at once


class ScoreRow(NamedTuple):
    """One row of a score file; `score` and `memorized` may be None (see results.Scores)."""

    prompt: str
    norm: float
    alignment: float
    score: float | None
    memorized: bool | None
    truncated: bool


def write_scores(path: Path, suffix: str, rows: Iterable[ScoreRow]) -> None:
    """Write `rows` to the new file `path` in the format of `suffix`, as `files.check_format` returned it.

    Raises:
        OSError: the file exists or cannot be written; what was written of it stays.
    """
    _WRITERS[suffix](path, rows)


def _write_txt(path: Path, rows: Iterable[ScoreRow]) -> None:
    escapes = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    with path.open("x", encoding="utf-8", newline="") as file:
        file.write("\t".join(ScoreRow._fields) + "\n")
        for row in rows:
            file.write("\t".join([row.prompt.translate(escapes), *_cells(row)]) + "\n")


def _write_csv(path: Path, rows: Iterable[ScoreRow]) -> None:
    with path.open("x", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(ScoreRow._fields)
        writer.writerows([guarded(row.prompt), *_cells(row)] for row in rows)


def _write_jsonl(path: Path, rows: Iterable[ScoreRow]) -> None:
    with path.open("x", encoding="utf-8", newline="") as file:
        for row in rows:
            file.write(json.dumps(row._asdict(), ensure_ascii=False, allow_nan=False) + "\n")


def _write_parquet(path: Path, rows: Iterable[ScoreRow]) -> None:
    pyarrow, parquet = import_pyarrow()
    kinds = [pyarrow.string(), *[pyarrow.float64()] * 3, *[pyarrow.bool_()] * 2]
    schema = pyarrow.schema(list(zip(ScoreRow._fields, kinds, strict=True)))
    with path.open("xb") as file, parquet.ParquetWriter(file, schema) as writer:
        rest: Iterator[ScoreRow] = iter(rows)
        while group := list(islice(rest, ROW_GROUP)):
            writer.write_table(pyarrow.table(list(zip(*group, strict=True)), schema=schema))


def _cells(row: ScoreRow) -> list[str]:
    """Return all but the prompt as text; `repr` gives the shortest digits that read back as the same float64."""
    floats = ["" if value is None else repr(value) for value in (row.norm, row.alignment, row.score)]
    truths = ["" if value is None else str(value).lower() for value in (row.memorized, row.truncated)]
    return floats + truths


_WRITERS: dict[str, Callable[[Path, Iterable[ScoreRow]], None]] = {
    ".txt": _write_txt,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
