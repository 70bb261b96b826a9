"""`memedge detect PROMPT...`: verdicts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from memedge.commands import terminal
from memedge.commands.options import (
    EarlyOption,
    EngineOption,
    JsonOption,
    PrecisionOption,
    ProviderOption,
    TargetFprOption,
    ThreadsOption,
    ThresholdOption,
    app,
    load_detector,
)

if TYPE_CHECKING:
    from memedge.detector import EngineInfo
    from memedge.results import Verdict

LABELS = {True: "[bold red]MEMORIZED[/]", False: "[green]ok[/]", None: "no verdict"}


@app.command()
def detect(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Prompts, each in quotes.")],
    early: EarlyOption = "proven",
    threshold: ThresholdOption = None,
    target_fpr: TargetFprOption = None,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Say whether each prompt is memorized."""
    detector = load_detector(engine, provider, precision, threads, threshold=threshold, target_fpr=target_fpr)
    verdicts = detector.detect(prompts, early)
    terminal.print_json(verdicts) if json else print_verdicts(verdicts, detector.info)


def print_verdicts(verdicts: Sequence["Verdict"], info: "EngineInfo") -> None:
    table = terminal.new_table("prompt", "verdict", numbers=("score", "norm", "alignment", "passes"))
    for v in verdicts:
        prompt = terminal.cell(v.prompt) if v.prompt else "[dim](empty)[/]"
        note = " [yellow](truncated)[/]" if v.truncated else ""
        numbers = ("—" if value is None else f"{value:.4f}" for value in (v.score, v.norm, v.alignment))
        table.add_row(prompt + note, LABELS[v.memorized], *numbers, f"{v.passes:.4g}")
    terminal.print_table(table)
    first = verdicts[0]
    if first.memorized is None:
        terminal.say(f"No verdicts: {first.reason}.")
    else:
        terminal.say(f"Memorized: a score of at least {first.threshold:.4g}, {_origin(first, info)}.")


def _origin(verdict: "Verdict", info: "EngineInfo") -> str:
    """Return where the threshold comes from, in words."""
    if verdict.operating_point == "calibrated":
        return f"the threshold calibrated for {info.key}"
    if verdict.operating_point == "threshold":
        return f"the threshold that was given, on {info.key}"
    return f"the threshold for {verdict.operating_point} by the clean prompts calibrated for {info.key}"
