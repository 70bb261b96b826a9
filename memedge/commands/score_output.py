"""What `memedge score` and `memedge merge` share: options of the output, and what is said at the end."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from memedge.commands import terminal
from memedge.engine.errors import InputError

if TYPE_CHECKING:
    from memedge.scoring.job import JobSummary
    from memedge.scoring.output import Output
    from memedge.scoring.record import Judge
    from memedge.scoring.tally import Tally

STREAM = "-"
OutputOption = Annotated[
    str,
    typer.Option(
        "--output", "-o", metavar="OUTPUT", help="Scores: a file in any of these formats, a folder of parts, or -."
    ),
]
TopOption = Annotated[
    int | None, typer.Option("--top", metavar="K", min=1, help="Only the K rows with the highest scores.")
]
SortOption = Annotated[
    Literal["score"] | None, typer.Option("--sort", help="The highest score first, in place of the input's order.")
]
FormatOption = Annotated[
    Literal["txt", "csv", "tsv", "jsonl", "parquet"] | None,
    typer.Option("--format", help="Of a folder's parts or of stdout.", show_default="parquet; jsonl on stdout"),
]
ReportOption = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="A page on the scores: how they lie, and lists."),
]


def check_stdout(output: str, json: bool) -> None:
    """Raise InputError if two things are to go to stdout."""
    if output == STREAM and json:
        raise InputError("The scores and --json cannot both go to stdout: name a file, or leave out --json.")


@contextmanager
def opened_output(place: str, format: str | None) -> Iterator["Output"]:
    """Yield the output; what is for stdout is written to a file first, and copied at the end."""
    from memedge.scoring.output import Output

    if place != STREAM:
        yield Output.at(Path(place), format, slash=place.endswith("/"))
        return
    with tempfile.TemporaryDirectory(prefix="memedge-") as folder:
        output = Output.at(Path(folder, f"stdout.{format or 'jsonl'}"))
        yield output
        with output.place.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)


def say_at_the_end(
    summary: "JobSummary",
    judge: "Judge",
    tally: "Tally",
    inputs: list[str],
    now: str,
    report: Path | None,
    json: bool,
    named: bool,
) -> None:
    """Print the summary and the histogram, and write the report.

    Args:
        summary: what the job did.
        judge: what scored and judged.
        tally: of all rows.
        inputs: what was scored.
        now: what was done in this run, in words.
        report: where the report goes, or None.
        json: whether the summary goes to stdout, for machines.
        named: whether the output has a name to say.
    """
    from memedge.commands.histogram import print_histogram
    from memedge.scoring.report import About, write_report

    output = str(summary.output) if named else "stdout"
    if json:
        terminal.print_json(summary)
    else:
        print_histogram(tally)
        verdict = "no verdicts (not calibrated)"
        if summary.memorized is not None:
            verdict = f"{summary.memorized} memorized ({judge.point})"
        early = f", {tally.early} decided early, without a score" if tally.early else ""
        terminal.say(
            f"{output}: {summary.rows} rows, {summary.unique} different prompts, {now} on {judge.key}, {verdict}, "
            f"{summary.truncated} truncated{early}."
        )
    if report:
        fingerprint = judge.fingerprint
        about = About(judge.engine, judge.checkpoint, fingerprint, judge.key, judge.rule, inputs, output)
        write_report(report, tally, about)
