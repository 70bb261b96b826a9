"""`memedge merge PART… -o OUTPUT`: the outputs of shards."""

from typing import Annotated

import typer

from memedge.commands import terminal
from memedge.commands.options import JsonOption, OverwriteOption, app
from memedge.commands.score import FormatOption, OutputOption, SortOption, TopOption, opened_output
from memedge.engine.errors import InputError

PartsArgument = Annotated[list[str], typer.Argument(metavar="PART...", help="What each shard wrote, in any order.")]


@app.command()
def merge(
    parts: PartsArgument,
    output: OutputOption,
    format: FormatOption = None,
    sort: SortOption = None,
    top: TopOption = None,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Join the outputs of `memedge score --shard` in the input's order.

    All N shards of one job are needed, each with the record beside or in it (job.json).
    """
    from memedge.scoring.merge import merge as join
    from memedge.scoring.ordering import Order

    if output == "-" and json:
        raise InputError("The scores and --json cannot both go to stdout: name a file, or leave out --json.")
    order = Order(bool(sort), top)
    with opened_output(output, format) as place, terminal.progress_of_rows() as progress:
        summary = join(parts, place, order=order, overwrite=overwrite, progress=progress)
    if json:
        terminal.print_json(summary)
    elif output != "-":
        verdict = "no verdicts" if summary.memorized is None else f"{summary.memorized} memorized"
        terminal.say(
            f"{summary.output}: {summary.rows} rows of {len(parts)} shards, {verdict}, {summary.truncated} truncated."
        )
