"""A tally's distribution as lines of a terminal: a bar a bin, on a logarithmic scale.

A few memorized prompts among millions are what is looked for, and a linear bar of them would be no bar at all.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from memedge.scoring.distribution import Bins
    from memedge.scoring.tally import Tally

BINS = 14
WIDEST = 100  # columns
EIGHTHS = " ▏▎▍▌▋▊▉"


def print_histogram(tally: "Tally") -> None:
    """Print how scores are distributed, on stderr; nothing if no row has one."""
    from rich.console import Console

    if tally.valued:
        console = Console(stderr=True, highlight=False)
        for line in _lines(tally, min(WIDEST, console.width), console.options.ascii_only):
            console.print(line, no_wrap=True, overflow="crop", crop=True)


def _lines(tally: "Tally", width: int, ascii_only: bool) -> Iterator["Text"]:
    from rich.text import Text

    bins = tally.distribution.bins(BINS)
    labels = [bins.words(place) for place in range(len(bins.rows))]
    counts = [f"{rows:,}" for rows in bins.rows]
    left, middle = max(map(len, [tally.kind, *labels])), max(map(len, ["rows", *counts]))
    room = max(1, width - left - middle - 4)
    longest = _length(max(bins.rows))
    yield Text(f"{tally.kind:>{left}}  {'rows':>{middle}}  bars are logarithmic", style="dim")
    for place, rows in enumerate(bins.rows):
        if place == bins.split:
            yield _threshold(tally, bins, width, ascii_only)
        line = Text(f"{labels[place]:>{left}}  {counts[place]:>{middle}}  ")
        memorized = bins.split is not None and place >= bins.split
        yield line.append(_bar(room * _length(rows) / longest, ascii_only), "red" if memorized else "cyan")
    if bins.split == len(bins.rows):
        yield _threshold(tally, bins, width, ascii_only)


def _length(rows: int) -> float:
    return math.log(1 + rows)


def _bar(length: float, ascii_only: bool) -> str:
    """Return a bar of so many columns; one that is not 0 is seen."""
    if ascii_only:
        return "#" * (max(1, round(length)) if length else 0)
    whole, eighths = divmod(max(1, round(8 * length)) if length else 0, 8)
    return "█" * whole + EIGHTHS[eighths].strip()


def _threshold(tally: "Tally", bins: "Bins", width: int, ascii_only: bool) -> "Text":
    from rich.text import Text

    reach, rows = sum(bins.rows[bins.split :]), "rows with a score" if tally.early else "rows"
    text = f"threshold {tally.threshold:.4g}: {reach:,} of {tally.valued:,} {rows} reach it "
    stroke = "-" if ascii_only else "─"
    return Text(f"{2 * stroke} {text}".ljust(width, stroke), style="bold")
