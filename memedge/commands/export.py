"""`memedge export MODEL -o ENGINE_DIR`: a checkpoint becomes an engine."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from memedge.commands import descriptions, terminal
from memedge.commands.options import JsonOption, app
from memedge.engine.errors import InputError, MemedgeError, not_installed, shown

if TYPE_CHECKING:
    from memedge.engine.manifest import Manifest

LONGEST_SIDE = 5  # digits


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Directory in diffusers' format or exported by Optimum, .safetensors file, or hub id (org/name).",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="ENGINE_DIR", help="Engine directory to make.")],
    draws: Annotated[int, typer.Option(min=1, help="Noise draws per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 42,
    precision: Annotated[Literal["fp32", "fp16", "int8"], typer.Option(help="Precision of the graphs.")] = "fp32",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="int8: prompts to calibrate on and compare with fp32 on; a CSV column memorized gives ΔAUC.",
            show_default="a list of captions",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="REV", help="Hub: branch, tag or commit.", show_default="main"),
    ] = None,
    loras: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="FILE[:SCALE]", help="LoRA to fuse into the model first; may be repeated."),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickles (.bin, .ckpt), which can run code of their author.")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_ID",
            help="Single file: a diffusers-format model of the same architecture.",
            show_default="its published model on the hub",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Transformers: pixels of the pictures.", show_default="the model's"),
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Transformers: most tokens of a prompt.", show_default="the pipeline's"),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="G", help="Distilled models: the scale they are told.", show_default="the pipeline's"),
    ] = None,
    no_text_encoder: Annotated[
        bool, typer.Option("--no-text-encoder", help="Leave the text encoder out: the engine scores embeddings alone.")
    ] = False,
    accept_parity: Annotated[
        bool,
        typer.Option("--accept-parity", help="Write the engine even if it is less exact than its precision promises."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Export a checkpoint as an engine; compare both.

    The engine directory appears if it agrees with the checkpoint in torch."""
    try:
        from memedge.export.export import export as run
    except ImportError as error:
        raise MemedgeError(not_installed("Exporting", error, "cpu,export")) from None
    from memedge.engine.machine import peak_memory

    start = time.perf_counter()
    with terminal.phases() as progress:
        manifest = run(
            model,
            output,
            draws=draws,
            seed=seed,
            precision=precision,
            prompts=prompts,
            revision=revision,
            loras=loras or (),
            allow_pickle=allow_pickle,
            config=config,
            size=None if size is None else height_and_width(size),
            max_sequence_length=max_sequence_length,
            guidance=guidance,
            text_encoder=not no_text_encoder,
            accept_parity=accept_parity,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    terminal.print_json(manifest) if json else print_export(manifest, output, seconds, peak_memory())


def height_and_width(text: str) -> tuple[int, int]:
    """Return the two of a size such as 1024x768, which is written as pictures' sizes are: the width first."""
    width, _, height = text.lower().partition("x")
    if not all(side.isdecimal() and len(side) <= LONGEST_SIDE for side in (width, height)):
        raise InputError(f"--size {shown(text)} is no size: give the width and the height in pixels, such as 1024x768.")
    return int(height), int(width)


def print_export(manifest: "Manifest", output: Path, seconds: float, peak: int) -> None:
    size, parity = descriptions.size(manifest), descriptions.parity(manifest)
    terminal.say(f"{output}: {manifest.precision}, {size}, made in {seconds:.0f} s with {peak / 1e9:.1f} GB at peak.")
    terminal.say(f"Largest differences from the original in fp32: {parity}.")
    for note in manifest.notes:
        terminal.say(f"Note: {note}")
    if manifest.drift:
        terminal.say(f"int8 against the same engine in fp32: {descriptions.drift(manifest.drift)}.")
