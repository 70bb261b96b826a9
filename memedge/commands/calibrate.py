"""`memedge calibrate ENGINE_DIR --memorized FILE --clean FILE`: γ and a threshold."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memedge.commands import descriptions, terminal
from memedge.commands.options import (
    CleanOption,
    JsonOption,
    MemorizedOption,
    PrecisionOption,
    ProviderOption,
    ResumeOption,
    ThreadsOption,
    app,
    one_engine,
)

if TYPE_CHECKING:
    from memedge.calibration.calibrate import Calibrated


@app.command()
def calibrate(
    memorized: MemorizedOption,
    clean: CleanOption,
    directory: Annotated[
        Path | None, typer.Argument(metavar="ENGINE_DIR", help="Engine directory.", show_default=False)
    ] = None,
    target_fpr: Annotated[
        float, typer.Option(metavar="SHARE", help="Most of the clean prompts that may be called memorized.")
    ] = 0.01,
    resume: ResumeOption = False,
    engine: Annotated[
        Path | None, typer.Option("--engine", metavar="DIR", help="Another way to say it.", show_default=False)
    ] = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Fit γ and a threshold to prompts whose answer is known, and keep them in the engine: then it gives verdicts.

    From 20 memorized prompts on; 100 clean ones for a false-positive rate of 0.01. Files as in `score`. It holds for
    one provider and precision, and is judged by cross-validation. Needs memedge[eval].
    """
    path = one_engine(directory, engine)
    if path is None:  # the embedded engine is calibrated
        raise typer.BadParameter("name the engine directory that is to be calibrated.", param_hint="ENGINE_DIR")
    from memedge.calibration.calibrate import calibrate as run

    with terminal.progress_bar("scoring") as progress:
        done = run(
            path,
            memorized,
            clean,
            target_fpr,
            provider=provider,
            precision=precision,
            threads=threads,
            resume=resume,
            progress=progress,
        )
    for warning in done.warnings:
        terminal.say(f"Warning: {warning}")
    terminal.print_json(done) if json else print_calibrated(done)


def print_calibrated(done: "Calibrated") -> None:
    terminal.print_facts(descriptions.calibration_facts(done.calibration))
    terminal.say(f"{done.engine} is calibrated for {done.key}.")
