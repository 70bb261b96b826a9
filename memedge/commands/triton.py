"""`memedge triton ENGINE_DIR -o REPOSITORY`: a model repository for NVIDIA Triton."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memedge.commands import terminal
from memedge.commands.options import (
    EarlyOption,
    EngineArgument,
    EngineOption,
    JsonOption,
    PrecisionOption,
    ProviderOption,
    app,
    one_engine,
)

if TYPE_CHECKING:
    from memedge.integrations.triton_repository import ModelRepository


@app.command()
def triton(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="REPOSITORY", help="Model repository.")],
    directory: EngineArgument = None,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    early: EarlyOption = "proven",
    json: JsonOption = False,
) -> None:
    """Write a model repository that NVIDIA Triton serves.

    The engine is copied into it. The provider need not be installed here; auto is what runs here.
    """
    from memedge.embedded import EMBEDDED_ENGINE
    from memedge.integrations.triton_repository import write_repository

    path = one_engine(directory, engine) or EMBEDDED_ENGINE
    made = write_repository(path, output, provider, precision, early)
    terminal.print_json(made) if json else print_repository(made)


def print_repository(made: "ModelRepository") -> None:
    runs = f"{made.provider}{f', {made.precision}' if made.precision else ''}"
    terminal.say(f"{made.path}: model {made.model}, {runs}, batches of up to {made.max_batch_size} prompts.")
    terminal.say(f"Serve it: tritonserver --model-repository {made.path}")
