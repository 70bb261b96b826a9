"""How commands print: results to stdout, as tables for people and JSON for machines; all else to stderr.

Prompts and file names may hold anything: all text that is not ours goes through `plain` on its way to a terminal. What
the terminal's encoding lacks is replaced in text (memedge/cli.py) and escaped in JSON.

rich is imported when something is printed: `memedge --help` does not need it.
"""

import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memedge.plain import plain

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

LINE_SECONDS = 10.0  # between lines that say how far a job is, where there is no terminal
RATE_SECONDS = 60.0  # over which a rate is measured


def print_json(value: Any) -> None:
    """Print any of our results; files and folders become their path.

    What a terminal would act on, and what the output's encoding lacks, is escaped as JSON can: values stay the same.
    """
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(value, enc_hook=_path), indent=2).decode()
    print(re.sub(r"[^\n -~]", _in_json, text))


def _in_json(found: re.Match[str]) -> str:
    char = found[0]
    try:
        char.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(char)[1:-1]
    return char if plain(char) == char else json.dumps(char)[1:-1]


def _path(path: Path) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")  # a name that is no UTF-8 is no text in JSON either


def say(text: str) -> None:
    """Tell the person at the terminal something that is not the result: on stderr.

    A terminal gets lines that break between words; a file or another program gets one line.
    """
    from rich.console import Console

    console = Console(stderr=True, emoji=False, highlight=False)
    console.print(plain(text), markup=False, soft_wrap=not sys.stderr.isatty())


def cell(text: str) -> str:
    """Return text that is not ours as a cell of a table: no markup, and nothing that a terminal would act on."""
    from rich.markup import escape

    return escape(plain(text))


def new_table(*words: str, numbers: Sequence[str] = ()) -> "Table":
    """Return a table without rows. Its first column is folded where there is no room, `numbers` stand to the right."""
    from rich.table import Table

    table = Table(*words, box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_table(table: "Table") -> None:
    from rich.console import Console

    Console().print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print a table of names and what is known of them."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts:
        table.add_row(f"[bold]{name}[/]", cell(value))
    print_table(table)


def short(value: float) -> str:
    """Return at least three digits, and no power of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@contextmanager
def phases() -> Iterator[Callable[[str], None]]:
    """Yield a callback that begins a phase of the work: what is going on, and how long each took, on stderr."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = SpinnerColumn(finished_text="·"), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        phase: tuple[str, float] | None = None

        def end() -> None:
            if phase and console.is_terminal:
                progress.update(progress.task_ids[-1], completed=1)
            elif phase:
                say(f"{phase[0]}: {time.perf_counter() - phase[1]:.1f} s")

        def begin(name: str) -> None:
            nonlocal phase
            end()
            phase = name, time.perf_counter()
            progress.add_task(cell(name), total=1)

        yield begin
        end()


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) that draws a bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(description), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class RowProgress:
    """How far a long job is, in rows or another unit; call it with what is going on, those done, and all or None.

    A terminal shows a bar. Elsewhere a line comes every LINE_SECONDS, so that a log says how it goes.
    """

    def __init__(self, progress: "Progress", terminal: bool, unit: str):
        self.phase, self.so_far = "", ""
        self._progress, self._terminal, self._unit = progress, terminal, unit
        self._times: deque[tuple[float, int]] = deque()  # when how many rows were done, over the last RATE_SECONDS
        self._said = time.monotonic()

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if phase != self.phase:
            self.phase = phase
            self._times.clear()
            if self._terminal:
                for task in self._progress.task_ids:
                    self._progress.remove_task(task)
                self._progress.add_task(phase, total=total, rate="")
        self.so_far = f"{done} {self._unit}" if total is None else f"{done} of {total} {self._unit}"
        self._times.append((now, done))
        while now - self._times[0][0] > RATE_SECONDS:
            self._times.popleft()
        if self._terminal:
            self._progress.update(self._progress.task_ids[-1], completed=done, total=total, rate=self._rate(total))
        elif now - self._said >= LINE_SECONDS:
            self._said = now
            say(f"{phase}: {self.so_far}{self._rate(total)}")

    def _rate(self, total: int | None) -> str:
        (then, before), (now, done) = self._times[0], self._times[-1]
        if now - then < 0.5 or done == before:
            return ""
        speed = (done - before) / (now - then)
        left = "" if total is None else f", {duration((total - done) / speed)} left"
        return f", {speed:.0f}/s{left}" if speed >= 10 else f", {speed:.2g}/s{left}"


def duration(seconds: float) -> str:
    """Return a time in the largest unit that gives at least two."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@contextmanager
def progress_of_rows(unit: str = "rows") -> Iterator[RowProgress]:
    """Yield a callback that says on stderr how far a long job is; `unit` is what is counted."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total}{task.fields[rate]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield RowProgress(progress, console.is_terminal, unit)
