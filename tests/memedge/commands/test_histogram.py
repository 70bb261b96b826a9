"""The histogram at a run's end: on stderr, in the columns there are, in characters that the encoding has."""

import io
import sys

import pytest

from memedge.commands.histogram import print_histogram
from memedge.scoring.score_files import ScoreRow
from memedge.scoring.tally import Tally

VALUES = {0.5: 90_000, 1.5: 20_000, 2.5: 300, 4.5: 7, 5.5: 1}


class Terminal(io.TextIOWrapper):
    """A stderr of some encoding that may be a terminal."""

    def __init__(self, encoding: str, terminal: bool):
        super().__init__(io.BytesIO(), encoding=encoding)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def printed(monkeypatch):
    """A function: what is printed of so many rows of each value."""

    def run(values, threshold=2.5, encoding="utf-8", columns=80, terminal=False) -> str:
        tally = Tally(threshold, "score")
        for value, rows in values.items():
            verdict = None if threshold is None else value is not None and value >= threshold
            row = ScoreRow("a", 1.0, 0.0, value, verdict, False)
            for number in range(rows):
                tally.add(row, number)
        stream = Terminal(encoding, terminal)
        with monkeypatch.context() as patch:
            for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
                patch.delenv(name, raising=False)
            patch.setenv("COLUMNS", str(columns))
            patch.setenv("TERM", "xterm-256color")
            patch.setattr(sys, "stderr", stream)
            print_histogram(tally)
        return stream.text()

    return run


def test_every_row_is_in_a_bar_and_the_threshold_has_its_place(printed):
    head, *lines = printed(VALUES).splitlines()
    assert head.split() == ["score", "rows", "bars", "are", "logarithmic"]
    at = next(place for place, line in enumerate(lines) if line.startswith("── threshold"))
    assert "threshold 2.5: 308 of 110,308 rows reach it" in lines[at]
    counts = [int(line.split()[3].replace(",", "")) for line in lines if line[0] != "─"]
    assert sum(counts[:at]) == 110_000
    assert sum(counts[at:]) == 308
    assert 8 <= len(counts) <= 16
    assert max(map(len, lines)) == 80
    lengths = [line.count("█") for line in lines if line[0] != "─"]
    assert [bool(length) for length in lengths] == [bool(count) for count in counts]
    assert sorted(lengths) == [length for _, length in sorted(zip(counts, lengths, strict=True))]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_encodings_without_blocks(printed, encoding):
    text = printed(VALUES, encoding=encoding)
    assert text.isascii()
    assert "-- threshold 2.5" in text
    assert text.count("#") > 100


def test_a_terminal_gets_colours_and_no_more_than_its_width(printed):
    plain = printed(VALUES, columns=50)
    assert max(map(len, plain.splitlines())) == 50
    assert "\x1b" not in plain
    assert "\x1b[31m" in printed(VALUES, columns=50, terminal=True)
    assert max(map(len, printed(VALUES, columns=300).splitlines())) == 100
    assert max(map(len, printed(VALUES, columns=12).splitlines())) <= 12


@pytest.mark.parametrize(("threshold", "place", "reach"), [(9.0, -1, "0"), (-9.0, 1, "110,308")])
def test_a_threshold_beyond_all_rows(printed, threshold, place, reach):
    lines = printed(VALUES, threshold).splitlines()
    assert lines[place].startswith(f"── threshold {threshold:g}: {reach} of 110,308 rows reach it")


def test_no_threshold(printed):
    assert "threshold" not in printed(VALUES, None)


def test_one_row_and_equal_rows(printed):
    for rows in (1, 3):
        _, line, _ = printed({2.0: rows}).splitlines()
        assert line.split()[:2] == ["2", str(rows)]
        assert "█" in line


def test_rows_without_a_score_are_in_no_bar(printed):
    lines = printed({1.5: 20, None: 3, 2.5: 1}).splitlines()
    assert any("threshold 2.5: 1 of 21 rows with a score reach it" in line for line in lines)
    assert sum(int(line.split()[3]) for line in lines[1:] if line[0] != "─") == 21


def test_nothing_is_printed_of_no_rows(printed):
    assert printed({}) == printed({None: 3}) == ""
