"""`memedge merge PART… -o OUTPUT`: the outputs of shards."""

from typing import Annotated

import typer

from memedge.commands import terminal
from memedge.commands.options import JsonOption, OverwriteOption, app
from memedge.commands.score_output import (
    STREAM,
    FormatOption,
    OutputOption,
    ReportOption,
    SortOption,
    TopOption,
    check_stdout,
    opened_output,
    say_at_the_end,
)

PartsArgument = Annotated[list[str], typer.Argument(metavar="PART...", help="What each shard wrote, in any order.")]


@app.command()
def merge(
    parts: PartsArgument,
    output: OutputOption,
    format: FormatOption = None,
    sort: SortOption = None,
    top: TopOption = None,
    report: ReportOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Join the outputs of all shards in the input's order.

    All N of one job, which `memedge score --shard` wrote, are needed, each with the record beside or in it (job.json).
    """
    from memedge.scoring.merge import Shards
    from memedge.scoring.ordering import Order
    from memedge.scoring.report import check_report
    from memedge.scoring.tally import Tally

    check_stdout(output, json)
    if report:
        check_report(report)
    shards = Shards.open(parts)
    judge = shards.record.judge
    tally = Tally(judge.threshold, judge.kind)
    with opened_output(output, format) as place:
        with terminal.progress_of_rows() as progress:
            summary = shards.merge(
                place,
                order=Order(bool(sort), top),
                overwrite=overwrite,
                progress=progress,
                each=lambda row: tally.add(row.scores, row.number),
            )
        say_at_the_end(
            summary, judge, tally, shards.record.files, f"{len(parts)} shards merged", report, json, output != STREAM
        )
