"""The order of an output's rows: that of `sorted`, equal scores as in the input, in bounded memory."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge.engine.errors import InputError
from memedge.scoring import ordering
from memedge.scoring.ordering import INPUT, Order
from memedge.scoring.score_files import OutputRow, ScoreRow

scores = st.sampled_from([0.0, -0.0, 1.5, -1.5, 5e-324, 1e308]) | st.floats(allow_nan=False, allow_infinity=False)


def rows_of(values: list[float | None], verdict: bool | None = True) -> list[OutputRow]:
    return [
        OutputRow(number, ScoreRow(f"prompt {number}", 1.0, -0.0, value, verdict, False), {"id": number, "é": [None]})
        for number, value in enumerate(values, start=1)
    ]


def key(row: OutputRow) -> Any:
    return row.scores.score is None, -(row.scores.score or 0.0), row.number


@pytest.mark.parametrize("held", [0, 10_000])
@pytest.mark.parametrize("at_once", [1, 3, 1000])
@settings(deadline=None, max_examples=25)
@given(values=st.lists(scores | st.none(), max_size=9), top=st.integers(1, 12))
def test_rows_are_sorted_as_sorted_does(values: list[float | None], top: int, held: int, at_once: int) -> None:
    """Those that were decided without a score come after all others."""
    rows = rows_of(values)
    expected = sorted(rows, key=key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "HELD", held)
        patch.setattr(ordering, "AT_ONCE", at_once)
        for order, wanted in (
            (Order(True), expected),
            (Order(top=top), expected[:top]),
            (Order(True, top), expected[:top]),
        ):
            assert repr(list(order.arrange(iter(rows)))) == repr(wanted)  # repr: -0.0 is not 0.0
    assert list(INPUT.arrange(iter(rows))) == rows


def test_many_equal_scores_stay_as_they_were() -> None:
    random = Random(0)
    rows = rows_of([random.choice([0.0, -0.0, 1.0]) for _ in range(5000)])
    expected = sorted(rows, key=key)
    assert list(Order(True).arrange(iter(rows))) == expected
    assert list(Order(top=100).arrange(iter(rows))) == expected[:100]


@pytest.mark.parametrize("order", [Order(True), Order(top=1), Order(True, 20_000)])
def test_rows_without_scores_are_not_sorted(order: Order) -> None:
    with pytest.raises(InputError, match=r"There are no scores to sort by: calibrate the engine, or leave out --sort"):
        list(order.arrange(iter(rows_of([1.0, None], None))))


def test_no_room_to_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def execute(self, statement: str) -> None:
            if statement.startswith("SELECT"):
                raise sqlite3.OperationalError("database or disk is full")

        def executemany(self, *_: object) -> None:
            pass

        def close(self) -> None:
            pass

    monkeypatch.setattr(sqlite3, "connect", lambda _: Full())
    with pytest.raises(
        InputError, match=r"The rows cannot be sorted on the disk \(database or disk is full\): make room"
    ):
        list(Order(True).arrange(iter(rows_of([1.0]))))


def test_what_the_rows_raise_passes() -> None:
    def broken() -> Iterator[OutputRow]:
        yield from rows_of([1.0])
        raise sqlite3.OperationalError("of the journal")

    with pytest.raises(sqlite3.OperationalError, match="of the journal"):
        list(Order(True).arrange(broken()))


CHILD = """
import resource, sys
from memedge.scoring.ordering import Order
from memedge.scoring.score_files import OutputRow, ScoreRow

def rows(count):
    for number in range(1, count + 1):
        score = number * 7919 % 100_003 / 7
        kept = {"text": f"{number:>300}"}
        yield OutputRow(number, ScoreRow("a star", 1.0, 0.5, score, True, False), kept)

list(Order(True).arrange(rows(9)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count, last = 0, (float("inf"), 0)
for row in ORDER.arrange(rows(300_000)):
    here = row.scores.score, -row.number
    assert here < last
    last = here
    count += 1
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("order", "rows"), [("Order(True)", 300_000), ("Order(top=200_000)", 200_000)])
def test_sorting_does_not_hold_all_rows(order: str, rows: int) -> None:
    """300 000 rows with kept columns of 300 bytes are some 400 MB as Python objects, and 130 MB on the disk."""
    done = subprocess.run([sys.executable, "-c", CHILD.replace("ORDER", order)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, mebibytes = done.stdout.split()
    assert int(count) == rows
    assert float(mebibytes) < 180, done.stdout
