"""What commands share: the application, options and arguments, and how they are read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from memedge import __version__
from memedge.engine.errors import InputError, shown
from memedge.engine.providers import PROVIDERS

if TYPE_CHECKING:
    from memedge.detector import Detector

MOST = 1000  # prompts per call, or draws

app = typer.Typer(
    epilog="Exit codes: 0 done, 1 error (one sentence on stderr), 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"memedge {__version__}")
        raise typer.Exit


@app.callback()
def _memedge(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which memedge this is.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Catch prompts that make a diffusion model reproduce a training image, before the image is made."""
    del version, debug  # the callback and memedge/cli.py read them


# What runs: every command that opens an engine takes these four.
EngineOption = Annotated[
    Path | None, typer.Option("--engine", metavar="DIR", help="Engine directory.", show_default="the embedded engine")
]
ProviderOption = Annotated[
    str,
    typer.Option(
        "--provider",
        metavar="NAME",
        help=f"{', '.join(PROVIDERS)}, or auto: the first that can run here and is calibrated.",
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", metavar="P", help="fp32, bf16, fp16 or int8.", show_default="the provider's best"),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", metavar="N", min=1, help="Threads per call.", show_default="all cores")
]

EngineArgument = Annotated[
    Path | None, typer.Argument(metavar="ENGINE_DIR", help="Engine directory.", show_default="the embedded one")
]
MemorizedOption = Annotated[
    Path, typer.Option("--memorized", metavar="FILE", help="Prompts known to replicate training images.")
]
CleanOption = Annotated[Path, typer.Option("--clean", metavar="FILE", help="Prompts known not to.")]
DrawsOption = Annotated[
    str | None, typer.Option("--draws", metavar="N,...", help="Draws per prompt.", show_default="the engine's own")
]
PlotOption = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="A .png or .svg to draw.")]
EarlyOption = Annotated[
    Literal["proven", "conformal", "screen", "off"],
    typer.Option(
        "--early",
        help="Passes to leave out: those that cannot change the verdict, those that hardly ever do, whole passes of "
        "prompts that a screen finds clean, or none.",
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        "--threshold", metavar="SCORE", help="Memorized from this score on.", show_default="the calibrated one"
    ),
]
TargetFprOption = Annotated[
    float | None,
    typer.Option("--target-fpr", metavar="SHARE", help="Or: the threshold that so many of its clean prompts reach."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]


def load_detector(
    engine: Path | None,
    provider: str,
    precision: str | None,
    threads: int | None,
    batch_size: int | Literal["auto"] | None = None,
    *,
    threshold: float | None = None,
    target_fpr: float | None = None,
    gradients: bool = False,
) -> "Detector":
    """Return a detector on what the options name."""
    from memedge.detector import Detector  # here: --help and usage errors need no numpy and no tokenizer

    return Detector.load(
        engine,
        provider,
        precision,
        threads,
        batch_size=batch_size,
        threshold=threshold,
        target_fpr=target_fpr,
        gradients=gradients,
    )


def one_engine(directory: Path | None, engine: Path | None) -> Path | None:
    """Return the engine directory that was given as an argument or with --engine."""
    if directory and engine:
        raise InputError("Two engine directories were given: name one, as an argument or with --engine.")
    return directory or engine


def counts(text: str, option: str) -> list[int]:
    """Return the different numbers of a list such as 1,4,16, which `option` was given."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= 4 and 1 <= int(part) <= MOST for part in parts):
        raise InputError(
            f"{option} {shown(text)} is no list of whole numbers from 1 to {MOST}: give one such as 1,4,16."
        )
    return list(dict.fromkeys(int(part) for part in parts))
