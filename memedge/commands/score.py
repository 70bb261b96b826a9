"""`memedge score INPUT -o OUTPUT`: a file of prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memedge.commands import terminal
from memedge.commands.options import (
    EngineOption,
    JsonOption,
    PrecisionOption,
    ProviderOption,
    ResumeOption,
    TargetFprOption,
    ThreadsOption,
    ThresholdOption,
    app,
    load_detector,
)

if TYPE_CHECKING:
    from memedge.detector import EngineInfo
    from memedge.scoring.job import JobSummary


def _batch_size(value: str) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not value.isdecimal() or int(value) < 1:
        raise typer.BadParameter(f"{value!r} is neither a number of at least 1 nor auto.")
    return int(value)


@app.command()
def score(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Prompts: .txt, .csv, .jsonl or .parquet.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUTPUT", help="Scores, in any of these formats.")],
    resume: ResumeOption = False,
    batch_size: Annotated[
        Any,
        typer.Option(
            metavar="N|auto",
            parser=_batch_size,
            help="UNet rows (prompt × timestep × draw) per call; auto measures what is fastest here.",
            show_default="what memory surely allows",
        ),
    ] = None,
    threshold: ThresholdOption = None,
    target_fpr: TargetFprOption = None,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Score a file of prompts, resumably.

    A run that was cut off loses nothing and is continued with --resume.

    Files need a column `prompt` (.txt: one prompt per line). The output has the columns prompt, norm, alignment, score,
    memorized and truncated, one row per input row.
    """
    from memedge.scoring.job import check_places, score_file

    check_places(source, output)  # before an engine is loaded for nothing
    detector = load_detector(
        engine, provider, precision, threads, batch_size, threshold=threshold, target_fpr=target_fpr
    )
    try:
        with terminal.progress_bar("scoring") as progress:
            summary = score_file(
                detector.score, source, output, engine_key=detector.info.fingerprint, resume=resume, progress=progress
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what is scored is kept: go on with --resume") from None
    terminal.print_json(summary) if json else print_summary(summary, detector.info)


def print_summary(summary: "JobSummary", info: "EngineInfo") -> None:
    from memedge.decision.reasons import threshold_in_words

    verdict = "no verdicts (not calibrated)"
    if summary.memorized is not None:
        verdict = f"{summary.memorized} memorized ({threshold_in_words(info.rule)})"
    terminal.say(
        f"{summary.output}: {summary.rows} rows, {summary.unique} different prompts, {summary.scored_now} scored in "
        f"this run on {info.key}, {verdict}, {summary.truncated} truncated."
    )
