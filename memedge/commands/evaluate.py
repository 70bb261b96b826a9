"""`memedge evaluate --memorized FILE --clean FILE -o DIR`: how good detectors are."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memedge.commands import terminal
from memedge.commands.options import (
    DrawsOption,
    EngineArgument,
    EngineOption,
    JsonOption,
    PrecisionOption,
    ProviderOption,
    ResumeOption,
    ThreadsOption,
    app,
    counts,
    one_engine,
)
from memedge.engine.errors import MemedgeError, not_installed

if TYPE_CHECKING:
    from memedge.evaluation.figures import Evaluation, Figure


@app.command()
def evaluate(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make for the report.")],
    directory: EngineArgument = None,
    memorized: Annotated[
        Path | None, typer.Option("--memorized", metavar="FILE", help="Prompts known to replicate training images.")
    ] = None,
    clean: Annotated[Path | None, typer.Option("--clean", metavar="FILE", help="Prompts known not to.")] = None,
    audit: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="In place of both: what `memedge audit` found of the same checkpoint."),
    ] = None,
    detectors: Annotated[
        list[str] | None,
        typer.Option(
            "--detector",
            metavar="NAME",
            help="A detector to measure; may be repeated. Others are compared with the first.",
            show_default="the score, anisotropy, and its terms",
        ),
    ] = None,
    draws: DrawsOption = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the noise.", show_default="the engine's own noise")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What the engine was exported from, for sharpness-exact.")
    ] = None,
    resume: ResumeOption = False,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Measure detectors on known prompts, and write a report.

    Known to be memorized, or not. Alignments are cosines as measured, as in `detect`.

    The folder gets report.html (one page, nothing else needed), report.json (everything) and prompts.csv. Files as in
    `score`; give 100 clean prompts at least, and none that the engine was calibrated on. Needs memedge[eval].
    """
    path = one_engine(directory, engine)
    several = counts(draws, "--draws") if draws is not None else None
    try:
        from memedge.evaluation.evaluate import evaluate as run
    except ImportError as error:
        raise MemedgeError(not_installed("Evaluating", error, "eval")) from None
    from memedge.embedded import EMBEDDED_ENGINE

    with terminal.progress_bar("UNet passes") as progress:
        done = run(
            path or EMBEDDED_ENGINE,
            memorized,
            clean,
            output,
            audit=audit,
            detectors=detectors,
            draws=several,
            seed=seed,
            checkpoint=checkpoint,
            provider=provider,
            precision=precision,
            threads=threads,
            resume=resume,
            command=shlex.join(["memedge", *sys.argv[1:]]),
            progress=progress,
        )
    print_evaluation(done, output, json)


def print_evaluation(evaluation: "Evaluation", output: Path, json: bool) -> None:
    """Print the figures, or all but the single prompts as JSON; then what to keep in mind, and where the report is."""
    if json:
        from msgspec import to_builtins

        everything = to_builtins(evaluation)
        del everything["prompts"]
        terminal.print_json(everything)
    else:
        numbers = ("n", "AUC", "TPR@1%FPR", "TPR@3%FPR", "passes", "s/prompt")
        table = terminal.new_table("detector", numbers=numbers)
        for line in evaluation.findings.lines:
            figures = (_figure(figure) for figure in (line.auc, line.tpr_1, line.tpr_3))
            table.add_row(line.detector, str(line.draws), *figures, f"{line.passes:.4g}", f"{line.seconds:.3g}")
        terminal.print_table(table)
        if evaluation.screen:
            from memedge.evaluation.page import screen_in_words

            terminal.say(screen_in_words(evaluation.screen))
    for caution in evaluation.cautions:
        terminal.say(f"Warning: {caution}")
    terminal.say(f"{output / 'report.html'}: the report; report.json and prompts.csv beside it.")


def _figure(figure: "Figure") -> str:
    return f"{figure.value:.3f}\n[dim]\\[{figure.low:.3f}, {figure.high:.3f}][/]"
