"""`memedge audit CHECKPOINT --images DIR -o DIR`: what a checkpoint still prints, by prompt or by any embedding."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memedge.commands import terminal
from memedge.commands.options import JsonOption, ResumeOption, app
from memedge.commands.training_options import (
    BatchSizeOption,
    CheckpointArgument,
    DryRunOption,
    GenerationsOption,
    GuidanceOption,
    InferenceStepsOption,
    SeedOption,
    SscdOption,
    StepsOption,
)
from memedge.engine.errors import InputError, MemedgeError

if TYPE_CHECKING:
    from memedge.audit.figures import Audit, Cost


@app.command()
def audit(
    checkpoint: CheckpointArgument,
    images: Annotated[Path, typer.Option(metavar="DIR", help="Training pictures.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to make for the report.")
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Which pictures: columns image, caption and, where known, memorized.",
            show_default="all, without captions",
        ),
    ] = None,
    steps: StepsOption = 50,
    generations: GenerationsOption = 4,
    guidance: GuidanceOption = 7.5,
    inference_steps: InferenceStepsOption = 50,
    batch_size: BatchSizeOption = 8,
    seed: SeedOption = 0,
    sscd: SscdOption = None,
    dry_run: DryRunOption = False,
    resume: ResumeOption = False,
    json: JsonOption = False,
) -> None:
    """Find out which training pictures a model still prints.

    Is a model cured, or do only its prompts fail? For each picture, embeddings are searched for that print it, from its
    caption and from random ones (DoRI). Give pictures that are not memorized too, as controls.

    The folder gets report.html, report.json, sheet.png and embeddings.safetensors. Needs memedge[train]; runs on a GPU
    where torch finds one, on several under `accelerate launch -m memedge audit ...`.
    """
    try:
        from memedge.audit import AuditSettings, estimate
        from memedge.audit import audit as run
    except ImportError as error:
        raise MemedgeError(str(error)) from None
    settings = AuditSettings(steps, generations, guidance, inference_steps, batch_size, seed)
    if dry_run:
        cost = estimate(checkpoint, images, captions=captions, settings=settings, sscd=sscd, told=terminal.say)
        terminal.print_json(cost) if json else print_cost(cost)
        return
    if output is None:
        raise InputError("There is no folder for the report: name one with --output, or give --dry-run.")
    with terminal.progress_of_rows("pictures") as progress:
        done = run(
            checkpoint,
            images,
            output,
            captions=captions,
            settings=settings,
            sscd=sscd,
            resume=resume,
            command=shlex.join(["memedge", *sys.argv[1:]]),
            progress=lambda done, total: progress("auditing", done, total),
            told=terminal.say,
        )
    if done is not None:
        print_audit(done, output, json)


def print_cost(cost: "Cost") -> None:
    terminal.print_facts(
        (
            ("pictures", str(cost.images)),
            ("UNet rows with gradients", f"{cost.backward:,}, at most"),
            ("UNet rows without", f"{cost.forward:,}, at most"),
            ("time", f"{terminal.duration(cost.seconds)} on {cost.device}, at most: what is memorized ends early"),
        )
    )


def print_audit(found: "Audit", output: Path, json: bool) -> None:
    """Print the groups, or all but the single checks as JSON; then what to keep in mind, and where the report is."""
    from memedge.audit.words import share

    if json:
        terminal.print_json(found)
    else:
        table = terminal.new_table("pictures", numbers=("n", "by caption", "by any embedding", "steps"))
        for group in found.groups:
            steps = "–" if group.median_steps is None else f"{group.median_steps:g}"
            table.add_row(group.name, str(group.images), share(group.by_prompt), share(group.by_audit), steps)
        terminal.print_table(table)
    for caution in found.cautions:
        terminal.say(f"Warning: {caution}")
    terminal.say(f"{output / 'report.html'}: the report; report.json, sheet.png and embeddings.safetensors beside it.")
