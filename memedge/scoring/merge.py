"""The outputs of a job's shards, joined in the input's order: what one job would have written."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from memedge.engine.errors import InputError, shown
from memedge.scoring.counts import Counts
from memedge.scoring.job import JobSummary, Progress, ignore
from memedge.scoring.journal import Journal
from memedge.scoring.ordering import INPUT, Order
from memedge.scoring.output import PART_ROWS, Output, no_room
from memedge.scoring.reading import Finished
from memedge.scoring.record import Record
from memedge.scoring.score_files import Layout, OutputRow
from memedge.scoring.shard import Shard

BETWEEN = 1000  # rows between calls of `progress`


@dataclass(frozen=True)
class _Part:
    """A shard's output, and which shard it is."""

    finished: Finished
    shard: Shard

    @property
    def place(self) -> Path:
        return self.finished.output.place

    @property
    def paths(self) -> list[Path]:
        return [one.file.path for one in self.finished.corpus.files]


@dataclass(frozen=True)
class Shards:
    """The outputs of all shards of one job, in the shards' order."""

    parts: tuple[_Part, ...]

    @staticmethod
    def open(places: Sequence[str]) -> "Shards":
        """Return the outputs at these places, which are files and folders in any order.

        Raises:
            InputError: an output has no record, is damaged, or is of another job; a shard is missing or there twice.
        """
        parts = sorted((_open(place) for place in places), key=lambda part: part.shard.index)
        _check(parts)
        return Shards(tuple(parts))

    @property
    def record(self) -> Record:
        """How the first was made. But for the rows and their counts all are made so."""
        return self.parts[0].finished.record

    def merge(
        self,
        output: Output,
        *,
        order: Order = INPUT,
        overwrite: bool = False,
        part_rows: int = PART_ROWS,
        progress: Progress = ignore,
        each: Callable[[OutputRow], None] = ignore,
    ) -> JobSummary:
        """Join them.

        Args:
            output: where the rows go.
            order: of the output's rows.
            overwrite: replace an output that is there.
            part_rows: rows of each file of a folder.
            progress: called with what is going on, rows done, and rows in all.
            each: called with every row in the input's order, before the output is there.

        Raises:
            InputError: rows are missing, or the output cannot be written.
        """
        output.check([path for part in self.parts for path in part.paths], overwrite=overwrite)
        layout = self._layout(output)
        layout.check(output.kind, str(self.parts[0].place))
        header = {"input": self.record.input, "engine": self.record.engine, "shard": "merged"}
        with closing(Journal(output.journal, header, resume=True)) as lock:  # so that an output has one job at a time
            try:
                return self._write(output, layout, order, part_rows, progress, each)
            except OSError as error:
                raise no_room(output.place, error, "merge again") from error
            finally:
                lock.delete()

    def _write(
        self,
        output: Output,
        layout: Layout,
        order: Order,
        part_rows: int,
        progress: Progress,
        each: Callable[[OutputRow], None],
    ) -> JobSummary:
        counts = Counts()
        written = output.write(layout, order.arrange(self._rows(counts, progress, each)), part_rows)
        record = msgspec.structs.replace(
            self.record,
            columns=layout.names,
            unique=sum(part.finished.record.unique for part in self.parts),
            memorized=counts.memorized,
            truncated=counts.truncated,
            parts=written,
            shard=None,
            order=str(order),
        )
        output.complete(record)
        output.finish(record)
        return JobSummary.of(record, output.place, 0)

    def _rows(self, counts: Counts, progress: Progress, each: Callable[[OutputRow], None]) -> Iterator[OutputRow]:
        """Yield the rows of all shards in the input's order, and count them."""
        expected, total = 0, self.record.input_rows
        for row in heapq.merge(*(part.finished.rows() for part in self.parts), key=lambda row: row.number):
            expected += 1
            if row.number != expected:
                raise InputError(f"Row {expected} is in no part, or row {row.number} in two: score the shards again.")
            counts.add(row.scores)
            each(row)
            if expected % BETWEEN == 0 or expected == total:
                progress("merging", expected, total)
            yield row
        if expected != total:
            raise InputError(f"The parts have {expected} rows, and the input had {total}: score the shards again.")

    def _layout(self, output: Output) -> Layout:
        """Return the columns without the rows' numbers; their types where the output needs them."""
        columns, format = self.record.columns, self.parts[0].finished.output.kind.format
        ours = Layout(early=self.record.early is not None, numbered=True).names
        names = [name for name in columns if name not in ours]
        types: dict[str, Any] = dict.fromkeys(names, str)
        corpora = [part.finished.corpus for part in self.parts if part.finished.record.rows]
        if format == "parquet":
            types |= corpora[0].declared_types()
        elif format == "jsonl" and output.kind.format == "parquet":
            found = [corpus.inspect(ignore).columns for corpus in corpora]
            types |= {name: set().union(*(one.get(name, ()) for one in found)) for name in names}
        id_column = columns[1] if columns[1] in names else None
        return Layout({name: types[name] for name in names}, id_column, early=self.record.early is not None)


def _open(place: str) -> _Part:
    finished = Finished.at(Output.at(Path(place), slash=place.endswith("/")))
    if finished.record.shard is None:
        raise InputError(f"{place} is no shard but a whole output: give what --shard wrote.")
    return _Part(finished, Shard.parse(finished.record.shard))


def _check(parts: list[_Part]) -> None:
    """Raise InputError unless these are all shards of one job, each of them once."""
    first = parts[0]
    for part in parts[1:]:
        if differing := first.finished.record.differing(part.finished.record, but=("shard",)):
            raise InputError(
                f"{first.place} and {part.place} are of jobs with another "
                f"{' and another '.join(differing)}: merge shards of one job."
            )
        if part.finished.output.kind.format != first.finished.output.kind.format:
            raise InputError(
                f"{first.place} and {part.place} are of different formats: score the shards again, to the same one."
            )
        if part.shard.count != first.shard.count:
            raise InputError(
                f"{first.place} is one of {first.shard.count} shards, and {part.place} one of "
                f"{part.shard.count}: merge shards of one job."
            )
    for before, part in pairwise(parts):
        if before.shard == part.shard:
            raise InputError(f"{before.place} and {part.place} are both shard {part.shard}: give each shard once.")
    there = {part.shard.index for part in parts}
    missing = [str(i) for i in range(1, first.shard.count + 1) if i not in there]
    if missing:
        raise InputError(
            f"Of {first.shard.count} shards {shown(', '.join(missing), 60)} are missing: score them, and give them too."
        )
