"""The command line. Exit codes: 0 done; 1 an error, said in one sentence on stderr; 2 wrong usage; 130 interrupted."""

import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from memedge.commands import terminal
from memedge.engine.errors import InputError, MemedgeError

app = typer.Typer(
    help="Catch prompts that make a diffusion model reproduce a training image, before the image is made.",
    epilog="Exit codes: 0 done, 1 error (one sentence on stderr), 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

EngineOption = Annotated[
    Path | None, typer.Option("--engine", metavar="DIR", help="Engine directory.", show_default="the embedded engine")
]
ProviderOption = Annotated[
    str,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="tensorrt, tensorrt-rtx, cuda, openvino, cpu, or auto: the first that can run here and is calibrated.",
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", metavar="P", help="fp32, bf16, fp16 or int8.", show_default="the provider's best"),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", metavar="N", min=1, help="Threads per call.", show_default="all cores")
]
EarlyOption = Annotated[
    Literal["proven", "conformal", "off"],
    typer.Option(
        "--early",
        help="Passes to leave out: those that cannot change the verdict, those that hardly ever do, or none.",
    ),
]
MOST = 1000  # prompts per call, or draws, that `bench` measures
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]


def load(
    engine: Path | None,
    provider: str,
    precision: str | None,
    threads: int | None,
    batch_size: int | Literal["auto"] | None = None,
) -> Any:
    from memedge.detector import Detector  # here: --help and usage errors need no numpy and no tokenizer

    return Detector.load(engine, provider, precision, threads, batch_size=batch_size)


def _one_engine(directory: Path | None, engine: Path | None) -> Path | None:
    """Return the engine directory that was given as an argument or with --engine."""
    if directory and engine:
        raise InputError("Two engine directories were given: name one, as an argument or with --engine.")
    return directory or engine


def _batch_size(value: str) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not value.isdecimal() or int(value) < 1:
        raise typer.BadParameter(f"{value!r} is neither a number of at least 1 nor auto.")
    return int(value)


@app.command()
def detect(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Prompts, each in quotes.")],
    early: EarlyOption = "proven",
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Say whether each prompt is memorized."""
    detector = load(engine, provider, precision, threads)
    verdicts = detector.detect(prompts, early)
    terminal.print_json(verdicts) if json else terminal.print_verdicts(verdicts, detector.info)


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="One prompt, in quotes.")],
    method: Annotated[
        Literal["mask", "gradient"],
        typer.Option(
            "--method",
            help="How much the score falls when a word is masked, or how steeply the norm changes with its embeddings.",
        ),
    ] = "mask",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A .png or .svg to draw.")
    ] = None,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Say which words of a prompt carry its score."""
    if output:
        from memedge.pictures import check_plot

        check_plot(output, "--output")
    detector = load(engine, provider, precision, threads)
    with terminal.progress_bar("masking") as progress:
        explanation = detector.explain(prompt, method, progress=progress)
    terminal.print_json(explanation) if json else terminal.print_explanation(explanation, detector.info)
    if output:
        from memedge.heat import draw

        if not draw(explanation, output):
            terminal.say(f"{output} has boxes for characters that its font lacks.")


@app.command()
def score(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Prompts: .txt, .csv, .jsonl or .parquet.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUTPUT", help="Scores, in any of these formats.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    batch_size: Annotated[
        Any,
        typer.Option(
            metavar="N|auto",
            parser=_batch_size,
            help="UNet rows (prompt × timestep × draw) per call; auto measures what is fastest here.",
            show_default="what memory surely allows",
        ),
    ] = None,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Score a file of prompts; a run that was cut off loses nothing and is continued with --resume.

    Files need a column `prompt` (.txt: one prompt per line). The output has the columns prompt, norm, alignment, score,
    memorized and truncated, one row per input row.
    """
    from memedge.scoring.job import check_places, score_file

    check_places(source, output)  # before an engine is loaded for nothing
    detector = load(engine, provider, precision, threads, batch_size)
    with terminal.progress_bar("scoring") as progress:
        summary = score_file(
            detector.score, source, output, engine_key=detector.info.fingerprint, resume=resume, progress=progress
        )
    terminal.print_json(summary) if json else terminal.print_summary(summary, detector.info)


@app.command()
def info(
    directory: Annotated[
        Path | None, typer.Argument(metavar="ENGINE_DIR", help="Engine directory.", show_default="the embedded one")
    ] = None,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Verify an engine and show what it is, what runs it and what it was calibrated on."""
    detector = load(_one_engine(directory, engine), provider, precision, threads)
    terminal.print_json(detector.info) if json else terminal.print_info(detector.info)


@app.command()
def calibrate(
    memorized: Annotated[
        Path, typer.Option("--memorized", metavar="FILE", help="Prompts known to replicate training images.")
    ],
    clean: Annotated[Path, typer.Option("--clean", metavar="FILE", help="Prompts known not to.")],
    directory: Annotated[
        Path | None, typer.Argument(metavar="ENGINE_DIR", help="Engine directory.", show_default=False)
    ] = None,
    target_fpr: Annotated[
        float, typer.Option(metavar="SHARE", help="Most of the clean prompts that may be called memorized.")
    ] = 0.01,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
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
    path = _one_engine(directory, engine)
    if path is None:
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
    terminal.print_json(done) if json else terminal.print_calibrated(done)


@app.command()
def evaluate(
    memorized: Annotated[
        Path, typer.Option("--memorized", metavar="FILE", help="Prompts known to replicate training images.")
    ],
    clean: Annotated[Path, typer.Option("--clean", metavar="FILE", help="Prompts known not to.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make for the report.")],
    directory: Annotated[
        Path | None, typer.Argument(metavar="ENGINE_DIR", help="Engine directory.", show_default="the embedded one")
    ] = None,
    detectors: Annotated[
        list[str] | None,
        typer.Option(
            "--detector",
            metavar="NAME",
            help="A detector to measure; may be repeated. Others are compared with the first.",
            show_default="anisotropy, norm, alignment",
        ),
    ] = None,
    draws: Annotated[
        str | None,
        typer.Option("--draws", metavar="N,...", help="Draws per prompt.", show_default="the engine's own"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the noise.", show_default="the engine's own noise")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What the engine was exported from, for sharpness-exact.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Measure detectors on prompts whose answer is known, and write a report to look at.

    The folder gets report.html (one page, nothing else needed), report.json (everything) and prompts.csv. Files as in
    `score`; give 100 clean prompts at least, and none that the engine was calibrated on. Needs memedge[eval].
    """
    path = _one_engine(directory, engine)
    counts = _counts(draws, "--draws") if draws is not None else None
    try:
        from memedge.evaluation.evaluate import DEFAULT
        from memedge.evaluation.evaluate import evaluate as run
    except ImportError as error:
        raise MemedgeError(
            f"Evaluating needs {error.name!r}, which is not installed: run `python -m pip install 'memedge[eval]'`."
        ) from None
    from memedge.embedded import EMBEDDED_ENGINE

    with terminal.progress_bar("UNet passes") as progress:
        done = run(
            path or EMBEDDED_ENGINE,
            memorized,
            clean,
            output,
            detectors=detectors or DEFAULT,
            draws=counts,
            seed=seed,
            checkpoint=checkpoint,
            provider=provider,
            precision=precision,
            threads=threads,
            resume=resume,
            command=shlex.join(["memedge", *sys.argv[1:]]),
            progress=progress,
        )
    terminal.print_evaluation(done, output, json)


@app.command()
def doctor(
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Say what is installed, what is active, what is missing and how to get it."""
    from memedge.doctor import examine

    findings = examine(engine, provider, precision, threads)
    terminal.print_json(findings) if json else terminal.print_findings(findings)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


@app.command()
def demo(
    picture: Annotated[Path, typer.Option("--output", "-o", metavar="PNG", help="The picture to write.")] = Path(
        "memedge-demo.png"
    ),
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Score a mixed list of prompts with the embedded engine, and draw what the model generates for them."""
    from memedge.demo import draw, prompts
    from memedge.engine.places import check_folder_of

    check_folder_of(picture, "name another with --output")
    detector = load(engine, provider, precision, threads)
    verdicts = detector.detect(prompts(), "off")
    verdicts.sort(key=lambda verdict: (bool(verdict.memorized), verdict.score or verdict.norm), reverse=True)
    draw(verdicts, picture)
    if json:
        terminal.print_json(verdicts)
    else:
        terminal.print_verdicts(verdicts, detector.info)
        terminal.say(f"Training images beside what the model generates: {picture}")


@app.command()
def bench(
    batch: Annotated[
        str, typer.Option("--batch", metavar="B,...", help="Prompts per call, one or several.")
    ] = "1,4,16",
    draws: Annotated[
        str | None,
        typer.Option("--draws", metavar="N,...", help="Draws per prompt.", show_default="the engine's own"),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="A .png or .svg to draw.")] = None,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Measure what scoring costs on this machine: time, throughput, memory, share of the processor's peak.

    Every case is timed after one call that is reported apart, for 200 calls or 10 seconds.
    """
    batches, counts = _counts(batch, "--batch"), _counts(draws, "--draws") if draws is not None else None
    if plot:
        from memedge.pictures import check_plot

        check_plot(plot)
    from memedge.measure.latency import measure

    with terminal.progress_bar("measuring") as progress:
        result = measure(engine, provider, precision, threads, batches, counts, progress)
    terminal.print_json(result) if json else terminal.print_bench(result)
    if plot:
        from memedge.measure.picture import plot as draw

        draw(result, plot)


def _counts(text: str, option: str) -> list[int]:
    """Return the different numbers of a list such as 1,4,16."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= 4 and 1 <= int(part) <= MOST for part in parts):
        raise InputError(f"{option} {text} is no list of whole numbers from 1 to {MOST}: give one such as 1,4,16.")
    return list(dict.fromkeys(int(part) for part in parts))


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
    json: JsonOption = False,
) -> None:
    """Export a checkpoint as an engine directory, and compare it with torch."""
    try:
        from memedge.export.export import export as run
    except ImportError as error:
        raise MemedgeError(
            f"Exporting needs {error.name!r}, which is not here: run `python -m pip install 'memedge[cpu,export]'`."
        ) from None
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
            progress=progress,
        )
    seconds = time.perf_counter() - start
    terminal.print_json(manifest) if json else terminal.print_export(manifest, output, seconds, peak_memory())


@app.command()
def build(
    backend: Annotated[
        Literal["tensorrt", "tensorrt-rtx"],
        typer.Option("--backend", help="tensorrt: on the GPU that is to run it; tensorrt-rtx: anywhere, for any GPU."),
    ],
    directory: Annotated[
        Path | None, typer.Argument(metavar="ENGINE_DIR", help="Engine directory.", show_default="the embedded one")
    ] = None,
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
    json: JsonOption = False,
) -> None:
    """Compile an engine for GPUs into TensorRT plans, which are kept beside it, or in the user's cache.

    TensorRT takes minutes and needs the GPU; TensorRT-RTX needs none, and one plan per compute capability.
    """
    try:
        from memedge.export.tensorrt import build as run
    except ImportError as error:
        raise MemedgeError(
            f"Building needs {error.name!r}, which is not installed: run `python -m pip install 'memedge[{backend}]'`."
        ) from None
    from memedge.embedded import EMBEDDED_ENGINE

    targets = gpu.split(",") if gpu is not None else None
    with terminal.progress_bar("building") as progress:
        plans = run(
            directory or EMBEDDED_ENGINE, backend, targets, max_batch=max_batch, workspace=workspace, progress=progress
        )
    terminal.print_json(plans) if json else terminal.print_plans(plans)


def main() -> None:
    """Run the command line; users' mistakes end in one sentence and exit code 1."""
    # As an interrupt: what is half made is removed. 143 is what shells report for a process that was terminated.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except MemedgeError as error:
        print(f"memedge: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a full disk, a folder without permission: what is wrong with which file says it all
        place = f"{error.filename}: " if error.filename else ""  # a write to an open file does not know its name
        print(f"memedge: {place}{error.strerror or error}.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("memedge: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
