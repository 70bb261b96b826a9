"""Lines and bars that say how far a long job is."""

import io
import sys

import pytest

from memedge.commands import terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that goes when it is told to."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(clock, capsys):
    with terminal.progress_of_rows() as progress:
        for second in range(26):
            clock[0] = float(second)
            progress("scoring", 20 * second, 100_000)
        progress("writing", 7, None)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "scoring: 200 of 100000 rows, 20/s, 83 minutes left",
        "scoring: 400 of 100000 rows, 20/s, 83 minutes left",
    ]
    assert (progress.phase, progress.so_far) == ("writing", "7 rows")


def test_the_rate_is_that_of_the_last_minute(clock, capsys):
    """Rows that a resumed job skips in no time do not promise an early end."""
    with terminal.progress_of_rows() as progress:
        progress("scoring", 0, 100_000)
        clock[0] = 1.0
        progress("scoring", 90_000, 100_000)
        for second in range(2, 90):
            clock[0] = float(second)
            progress("scoring", 90_000 + second, 100_000)
    assert capsys.readouterr().err.splitlines()[-1] == "scoring: 90080 of 100000 rows, 1/s, 3 hours left"


def test_a_terminal_gets_a_bar(clock, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with terminal.progress_of_rows() as progress:
        progress("reading", 5, None)
        clock[0] = 1.0
        progress("scoring", 0, 50)
        clock[0] = 2.0
        progress("scoring", 40, 50)
    assert "scoring" in stream.getvalue() and "40 of 50" in stream.getvalue()
