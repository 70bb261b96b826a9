"""`memedge doctor`: what works here."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from memedge.commands import terminal
from memedge.commands.options import EngineOption, JsonOption, PrecisionOption, ProviderOption, ThreadsOption, app

if TYPE_CHECKING:
    from memedge.doctor import Finding

COLOURS = {"active": "green", "missing": "yellow", "broken": "bold red"}


@app.command()
def doctor(
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Say what is active, what is missing, and how to get it."""
    from memedge.doctor import examine

    findings = examine(engine, provider, precision, threads)
    terminal.print_json(findings) if json else print_findings(findings)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


def print_findings(findings: Sequence["Finding"]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for f in findings:
        table.add_row(f"[bold]{f.part}[/]", f"[{COLOURS[f.state]}]{f.state}[/]", terminal.cell(f.detail))
    terminal.print_table(table)
