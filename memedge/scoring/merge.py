"""The outputs of a job's shards, joined in the input's order: what one job would have written."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from memedge.engine.errors import InputError, shown
from memedge.prompts.cells import SCORE_COLUMNS
from memedge.prompts.columns import Columns
from memedge.prompts.corpus import Corpus
from memedge.prompts.files import PromptFile, PromptRow
from memedge.prompts.inputs import InputFile
from memedge.scoring.job import JobSummary, Progress, ignore
from memedge.scoring.ordering import INPUT, Order
from memedge.scoring.output import PART_ROWS, Output, no_room
from memedge.scoring.record import Record
from memedge.scoring.score_files import NUMBER, Layout, OutputRow, ScoreRow
from memedge.scoring.shard import Shard

_TRUTHS = {"true": True, "false": False, "": None}


@dataclass(frozen=True)
class _Part:
    """A shard's output: its files, how it was made, and which shard it is."""

    output: Output
    record: Record
    shard: Shard

    @property
    def corpus(self) -> Corpus:
        """Its files as prompts with all that stands beside them."""
        place = self.output.place
        paths = [place / part.name for part in self.record.parts] if self.output.folder else [place]
        files = tuple(InputFile(PromptFile(path, self.output.kind, str(path))) for path in paths)
        return Corpus(files, Columns("prompt", None))

    def rows(self) -> Iterator[OutputRow]:
        """Yield its rows, as they were scored."""
        count = 0
        if self.record.rows:
            for row in self.corpus.rows():
                count += 1
                yield self._scored(row)
        if count != self.record.rows:
            raise InputError(f"{self.output.place} has {count} rows, and had {self.record.rows}: score it again.")

    def _scored(self, row: PromptRow) -> OutputRow:
        kept = dict(row.kept)
        try:
            number, values = kept.pop(NUMBER), [kept.pop(name) for name in SCORE_COLUMNS[1:]]
            if self.output.kind.format in ("csv", "tsv"):
                number = int(number)
                floats = [float(value) if value else None for value in values[:3]]
                values = [*floats, *(_TRUTHS[value] for value in values[3:])]
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{self.output.place} has no such columns as a shard's output: score the shard again ({error})."
            ) from None
        return OutputRow(number, ScoreRow(row.prompt, *values), kept)


def merge(
    parts: Sequence[str],
    output: Output,
    *,
    order: Order = INPUT,
    overwrite: bool = False,
    part_rows: int = PART_ROWS,
    progress: Progress = ignore,
    each: Callable[[OutputRow], None] = ignore,
) -> JobSummary:
    """Join the outputs of all shards of one job.

    Args:
        parts: their files and folders, in any order.
        output: where the rows go.
        order: of the output's rows.
        overwrite: replace an output that is there.
        part_rows: rows of each file of a folder.
        progress: called with what is going on, rows done, and rows in all.
        each: called with every row in the input's order, before the output is there.

    Raises:
        InputError: an output has no record, is damaged, or is of another job; a shard is missing or there twice; the
            output cannot be written.
    """
    shards = sorted((_open(place) for place in parts), key=lambda part: part.shard.index)
    first = shards[0]
    _check(shards)
    output.check([path for part in shards for path in _paths(part)], overwrite=overwrite)
    total = first.record.input_rows
    layout = _layout(shards, output)
    layout.check(output.kind, str(first.output.place))
    tally = Counter[str]()

    def rows() -> Iterator[OutputRow]:
        expected = 0
        for row in heapq.merge(*(part.rows() for part in shards), key=lambda row: row.number):
            expected += 1
            if row.number != expected:
                raise InputError(f"Row {expected} is in no part, or row {row.number} in two: score the shards again.")
            scores = row.scores
            judged = scores.memorized is not None
            tally.update(judged=judged, memorized=bool(scores.memorized), truncated=scores.truncated)
            each(row)
            if expected % 1000 == 0:
                progress("merging", expected, total)
            yield row
        if expected != total:
            raise InputError(f"The parts have {expected} rows, and the input had {total}: score the shards again.")

    try:
        written = output.write(layout, order.arrange(rows()), part_rows)
        record = msgspec.structs.replace(
            first.record,
            columns=layout.names,
            unique=sum(part.record.unique for part in shards),
            memorized=tally["memorized"] if tally["judged"] else None,
            truncated=tally["truncated"],
            parts=written,
            shard=None,
            order=str(order),
        )
        if output.folder:
            output.place_record(record)
        output.finish()
        if not output.folder:
            output.place_record(record)
    except OSError as error:
        raise no_room(output.place, error, "merge again") from error
    return JobSummary.of(record, output.place, 0)


def _open(place: str) -> _Part:
    output = Output.at(Path(place), slash=place.endswith("/"))
    if not output.exists:
        raise InputError(f"{place} does not exist: name the output of a shard.")
    record = output.record()
    if record is None:
        raise InputError(f"{output.record_path} is missing, which says how {place} was made: put it back beside it.")
    if record.shard is None:
        raise InputError(f"{place} is no shard but a whole output: give what --shard wrote.")
    if missing := output.missing(record):
        raise InputError(
            f"{place} lacks {record.parts[missing[0] - 1].name} as it was written: run that shard again with --resume."
        )
    if output.folder and record.parts:
        output = Output(output.place, PromptFile.at(output.place / record.parts[0].name).kind, True)
    return _Part(output, record, Shard.parse(record.shard))


def _check(parts: list[_Part]) -> None:
    """Raise InputError unless these are all shards of one job, each of them once."""
    first = parts[0]
    for part in parts[1:]:
        if differing := first.record.differing(part.record, but=("shard",)):
            raise InputError(
                f"{first.output.place} and {part.output.place} are of jobs with another "
                f"{' and another '.join(differing)}: merge shards of one job."
            )
        if part.output.kind.format != first.output.kind.format:
            raise InputError(
                f"{first.output.place} and {part.output.place} are of different formats: score the shards again, to "
                "the same one."
            )
        if part.shard.count != first.shard.count:
            raise InputError(
                f"{first.output.place} is one of {first.shard.count} shards, and {part.output.place} one of "
                f"{part.shard.count}: merge shards of one job."
            )
    for before, part in pairwise(parts):
        if before.shard == part.shard:
            raise InputError(
                f"{before.output.place} and {part.output.place} are both shard {part.shard}: give each shard once."
            )
    there = {part.shard.index for part in parts}
    missing = [str(i) for i in range(1, first.shard.count + 1) if i not in there]
    if missing:
        raise InputError(
            f"Of {first.shard.count} shards {shown(', '.join(missing), 60)} are missing: score them, and give them too."
        )


def _paths(part: _Part) -> list[Path]:
    return [one.file.path for one in part.corpus.files]


def _layout(parts: list[_Part], output: Output) -> Layout:
    """Return the columns of the parts without the rows' numbers; their types where the output needs them."""
    names = [name for name in parts[0].record.columns if name not in (NUMBER, *SCORE_COLUMNS)]
    front = parts[0].record.columns[1]
    types: dict[str, Any] = dict.fromkeys(names, str)
    filled = [part for part in parts if part.record.rows]
    if parts[0].output.kind.format == "parquet":
        types |= filled[0].corpus.declared_types()
    elif parts[0].output.kind.format == "jsonl" and output.kind.format == "parquet":
        found = [part.corpus.inspect(ignore).columns for part in filled]
        types |= {name: set().union(*(one.get(name, ()) for one in found)) for name in names}
    return Layout({name: types[name] for name in names}, front if front in names else None)
