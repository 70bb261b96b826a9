"""What `audit` and `cure` share: arguments and options."""

from pathlib import Path
from typing import Annotated

import typer

CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Stable Diffusion 1.x or 2.x: diffusers' folder, or a hub id.")
]
StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Steps of a search, at most.")]
GenerationsOption = Annotated[int, typer.Option("--generations", min=1, help="Pictures made at each check.")]
GuidanceOption = Annotated[float, typer.Option("--guidance", help="Scale of guidance that they are made with.")]
InferenceStepsOption = Annotated[
    int, typer.Option("--inference-steps", min=1, help="DDIM steps that they are made with.")
]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="Rows of the UNet at once: less takes less memory.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of all noise.")]
SscdOption = Annotated[
    Path | None,
    typer.Option("--sscd", metavar="FILE", help="SSCD's TorchScript file.", show_default="outlines, a stand-in"),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and end.")]
