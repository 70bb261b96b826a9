"""`memedge build ENGINE_DIR --provider NAME`: TensorRT plans for GPUs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from memedge.commands import terminal
from memedge.commands.options import EngineArgument, EngineOption, JsonOption, app, one_engine
from memedge.engine.errors import MemedgeError, not_installed
from memedge.engine.tensorrt_module import PlanProvider

if TYPE_CHECKING:
    from memedge.engine.plans import Plan


@app.command()
def build(
    provider: Annotated[
        PlanProvider,
        typer.Option("--provider", help="tensorrt: on the GPU that is to run it; tensorrt-rtx: anywhere, for any GPU."),
    ],
    directory: EngineArgument = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="SM86,...", help="GPU targets.", show_default="this machine's GPU"),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch",
            metavar="N",
            min=1,
            help="Most UNet rows (prompt × timestep × draw) per call.",
            show_default="what memory surely allows",
        ),
    ] = None,
    workspace: Annotated[
        float | None,
        typer.Option("--workspace", metavar="GIB", help="GPU memory per layer.", show_default="TensorRT's own"),
    ] = None,
    engine: EngineOption = None,
    json: JsonOption = False,
) -> None:
    """Compile an engine for GPUs into TensorRT plans.

    They are kept beside it, or in the user's cache.

    TensorRT takes minutes and needs the GPU; TensorRT-RTX needs none, and one plan per compute capability.
    """
    path = one_engine(directory, engine)
    try:
        from memedge.export.tensorrt import build as run
    except ImportError as error:
        raise MemedgeError(not_installed("Building", error, provider)) from None
    from memedge.embedded import EMBEDDED_ENGINE

    targets = gpu.split(",") if gpu is not None else None
    with terminal.progress_bar("building") as progress:
        plans = run(
            path or EMBEDDED_ENGINE, provider, targets, max_batch=max_batch, workspace=workspace, progress=progress
        )
    terminal.print_json(plans) if json else print_plans(plans)


def print_plans(plans: Sequence["Plan"]) -> None:
    table = terminal.new_table("plan", "target", numbers=("MB", "seconds", "peak MB"))
    for p in plans:
        numbers = (terminal.short(value) for value in (p.size / 1e6, p.seconds, p.peak_memory / 1e6))
        table.add_row(terminal.cell(p.name), p.target.upper(), *numbers)
    terminal.print_table(table)
    gpus = ", ".join(sorted({p.gpu or p.target.upper() for p in plans}))
    terminal.say(f"For {gpus}, with TensorRT {plans[0].version}: calls of up to {plans[0].most} rows.")
