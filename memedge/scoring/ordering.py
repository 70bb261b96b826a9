"""The order of an output's rows: that of the input, or by score, in bounded memory."""

import heapq
import math
import pickle
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice

from memedge.engine.errors import InputError
from memedge.scoring.score_files import OutputRow

CACHE = 65_536  # KiB of sorted rows in memory, at most
AT_ONCE = 1000  # rows that go to the disk, and come back, together
HELD = 10_000  # rows that are held in memory to find the highest; more of them are sorted on the disk


@dataclass(frozen=True)
class Order:
    """Which rows an output has, and in what order.

    Attributes:
        by_score: the highest score first; equal ones as in the input. Rows that were decided without a score come last,
            as in the input.
        top: only so many of the first, which are always by score.
    """

    by_score: bool = False
    top: int | None = None

    def __str__(self) -> str:
        if self.top is not None:
            return f"score, top {self.top}"
        return "score" if self.by_score else "input"

    def arrange(self, rows: Iterator[OutputRow]) -> Iterator[OutputRow]:
        """Yield the rows that are wanted in the order that is wanted.

        Raises:
            InputError: when iterated: they are to be sorted, and one has no score, or there is no room to sort them.
        """
        if self.top is not None and self.top > HELD:
            return islice(_sorted(_scored(rows)), self.top)
        if self.top is not None:
            return iter(heapq.nlargest(self.top, _scored(rows), key=_place))
        return _sorted(_scored(rows)) if self.by_score else rows


INPUT = Order()


def _scored(rows: Iterator[OutputRow]) -> Iterator[OutputRow]:
    for row in rows:
        if row.scores.score is None and row.scores.memorized is None:
            raise InputError("There are no scores to sort by: calibrate the engine, or leave out --sort and --top.")
        yield row


def _place(row: OutputRow) -> tuple[float, int]:
    """Return what is greater the further in front a row belongs."""
    return -math.inf if row.scores.score is None else row.scores.score, -row.number


def _sorted(rows: Iterator[OutputRow]) -> Iterator[OutputRow]:
    # A database without a name is a temporary file, of which SQLite keeps a part in memory.
    with closing(sqlite3.connect("")) as db:
        db.execute(f"PRAGMA cache_size = -{CACHE}")
        db.execute("CREATE TABLE rows (score, number INTEGER PRIMARY KEY, row)")
        while some := list(islice(rows, AT_ONCE)):
            packed = [(row.scores.score, row.number, pickle.dumps(row, pickle.HIGHEST_PROTOCOL)) for row in some]
            with _room():
                db.executemany("INSERT INTO rows VALUES (?, ?, ?)", packed)
        with _room():
            ordered = db.execute("SELECT row FROM rows ORDER BY score DESC, number")  # NULL is below all
            back = ordered.fetchmany(AT_ONCE)
        while back:
            yield from (pickle.loads(row) for (row,) in back)
            with _room():
                back = ordered.fetchmany(AT_ONCE)


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise InputError(
            f"The rows cannot be sorted on the disk ({error}): make room for temporary files, or name another folder "
            "for them in the variable TMPDIR, and go on with --resume."
        ) from error
