"""`memedge calibrate ENGINE_DIR --memorized FILE --clean FILE`: γ and a threshold; or an earlier one, brought back."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memedge.commands import descriptions, terminal
from memedge.commands.options import (
    JsonOption,
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
    memorized: Annotated[
        Path | None, typer.Option("--memorized", metavar="FILE", help="Prompts known to replicate training images.")
    ] = None,
    clean: Annotated[Path | None, typer.Option("--clean", metavar="FILE", help="Prompts known not to.")] = None,
    directory: Annotated[
        Path | None, typer.Argument(metavar="ENGINE_DIR", help="Engine directory.", show_default=False)
    ] = None,
    target_fpr: Annotated[
        float, typer.Option(metavar="SHARE", help="Most of the clean prompts that may be called memorized.")
    ] = 0.01,
    all_providers: Annotated[
        bool, typer.Option("--all-providers", help="For every provider and precision that can run here.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Bring the calibration before this one back.")] = False,
    restore: Annotated[
        str | None, typer.Option("--restore", metavar="DATE", help="Bring that one back: `memedge info` lists them.")
    ] = None,
    screen_alpha: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Most of the memorized prompts, of those found, that --early screen may pass.",
            show_default="the least that they can promise",
        ),
    ] = None,
    resume: ResumeOption = False,
    engine: Annotated[
        Path | None, typer.Option("--engine", metavar="DIR", help="Engine directory.", show_default=False)
    ] = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Fit γ and a threshold, and keep them: then there are verdicts.

    To prompts whose answer is known: from 20 memorized ones on, and 100 clean ones for a false-positive rate of 0.01.
    Files as in `score`. It holds for one provider and precision, with auto for the first that can run here, and is
    judged by cross-validation. What it replaces is kept, for --undo and --restore. Needs memedge[eval].
    """
    path = one_engine(directory, engine)
    if path is None:  # the embedded engine is calibrated
        raise typer.BadParameter("name the engine directory that is to be calibrated.", param_hint="ENGINE_DIR")
    if all_providers and provider != "auto":
        raise typer.BadParameter("--provider names one: leave either out.", param_hint="--all-providers")
    if undo or restore is not None:
        if memorized or clean or all_providers or (undo and restore is not None):
            raise typer.BadParameter("it stands alone, but for --provider and --precision.", param_hint="--undo")
        _restore(path, restore, provider, precision, json)
        return
    if memorized is None or clean is None:
        raise typer.BadParameter("it is needed, to calibrate.", param_hint="--clean" if memorized else "--memorized")
    from memedge.calibration.calibrate import calibrate as run
    from memedge.calibration.calibrate import calibrate_all

    with terminal.progress_bar("scoring") as progress:
        if all_providers:
            done = calibrate_all(
                path,
                memorized,
                clean,
                target_fpr,
                precision=precision,
                threads=threads,
                resume=resume,
                screen_alpha=screen_alpha,
                progress=progress,
            )
        else:
            done = [
                run(
                    path,
                    memorized,
                    clean,
                    target_fpr,
                    provider=provider,
                    precision=precision,
                    threads=threads,
                    resume=resume,
                    screen_alpha=screen_alpha,
                    progress=progress,
                )
            ]
    for warning in dict.fromkeys(warning for one in done for warning in one.warnings):
        terminal.say(f"Warning: {warning}")
    if json:
        terminal.print_json(done if all_providers else done[0])
    else:
        print_calibrated(done)


def print_calibrated(done: Sequence["Calibrated"]) -> None:
    for one in done:
        terminal.print_facts(descriptions.calibration_facts(one.calibration))
        terminal.say(f"{one.engine} is calibrated for {one.key}.")
    if done[-1].uncalibrated:
        terminal.say(
            f"Without a calibration, and so without verdicts: {', '.join(done[-1].uncalibrated)}; --all-providers "
            "calibrates for all that can run here."
        )


def _restore(path: Path, date: str | None, provider: str, precision: str | None, json: bool) -> None:
    from memedge.calibration.history import restore

    key, calibration = restore(path, date, provider=provider, precision=precision)
    if json:
        terminal.print_json(calibration)
    else:
        terminal.print_facts(descriptions.calibration_facts(calibration))
    terminal.say(f"{path} has its calibration of {calibration.date} for {key} again.")
