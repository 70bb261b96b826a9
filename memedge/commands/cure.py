"""`memedge cure CHECKPOINT --memorized FILE --ordinary FILE -o NEW`: a checkpoint forgets pictures."""

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
    from memedge.training.cure_figures import Cure, CureCost


@app.command()
def cure(
    checkpoint: CheckpointArgument,
    memorized: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Pictures to forget, beside it: columns image, caption; memorized: false is a control."
        ),
    ],
    ordinary: Annotated[
        Path, typer.Option(metavar="FILE", help="The same of pairs that the model is to go on knowing.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="NEW", help="Folder to make for the cured checkpoint.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="How often each picture is trained away.")] = 5,
    rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-5,
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
    """Make a checkpoint forget training pictures.

    Adversarial fine-tuning: embeddings that print a picture are searched for, and the UNet learns to print another
    under them. The new checkpoint's folder `cure` holds the audits before and after, and cure.json.

    Needs memedge[train]; runs on a GPU where torch finds one, on several under `accelerate launch -m memedge cure ...`.
    """
    try:
        from memedge.audit import AuditSettings
        from memedge.training.cure_figures import CureSettings
        from memedge.training.cure_run import cure as run
        from memedge.training.cure_run import estimate
    except ImportError as error:
        raise MemedgeError(str(error)) from None
    settings = CureSettings(
        epochs, rate, AuditSettings(steps, generations, guidance, inference_steps, batch_size, seed)
    )
    if dry_run:
        cost = estimate(checkpoint, memorized, ordinary, settings=settings, told=terminal.say)
        terminal.print_json(cost) if json else print_cost(cost)
        return
    if output is None:
        raise InputError("There is no folder for the new checkpoint: name one with --output, or give --dry-run.")
    with terminal.progress_of_rows("") as progress:
        done = run(
            checkpoint,
            memorized,
            ordinary,
            output,
            settings=settings,
            sscd=sscd,
            resume=resume,
            command=shlex.join(["memedge", *sys.argv[1:]]),
            progress=progress,
            told=terminal.say,
        )
    if done is not None:
        terminal.print_json(done) if json else print_cure(done, output)


def print_cost(cost: "CureCost") -> None:
    terminal.print_facts(
        (
            ("audits", f"{cost.audits[1]:,} rows of the UNet with gradients, {cost.audits[0]:,} without, at most"),
            ("surrogates", f"{cost.surrogates:,} rows without"),
            ("searches", f"{cost.searches:,} rows with gradients of embeddings"),
            ("updates", f"{cost.updates:,} rows with gradients of weights"),
            ("time", f"{terminal.duration(cost.seconds)} on {cost.device}, at most"),
        )
    )


def print_cure(done: "Cure", output: Path) -> None:
    from memedge.audit.words import share

    table = terminal.new_table("pictures", numbers=("n", "audit", "by caption", "by any embedding"))
    for when, groups in (("before", done.before), ("after", done.after)):
        for group in groups:
            table.add_row(group.name, str(group.images), when, share(group.by_prompt), share(group.by_audit))
    terminal.print_table(table)
    terminal.say(
        f"Loss on ordinary pairs that were not trained on: {done.loss_before:.4f} before, {done.loss_after:.4f} after. "
        f"Training took {terminal.duration(done.seconds)}."
    )
    terminal.say(f"{output}: the cured checkpoint; both audits in its folder cure.")
