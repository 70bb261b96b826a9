"""`memedge export`: checkpoint → engine directory, whole and in agreement with torch, or not at all."""

import gc
from collections.abc import Callable, Sequence
from functools import reduce
from importlib.metadata import version
from os import PathLike, fspath
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from memedge.engine import atomic, probe
from memedge.engine.directory import BASELINE, PREFIX, Tensors, describe_file
from memedge.engine.engine import Engine
from memedge.engine.errors import ExportError, IntegrityError
from memedge.engine.graphs import check_graph
from memedge.engine.manifest import LARGEST_SEED, SCHEMA, Manifest, Parity, Precision, write_manifest
from memedge.engine.memory import HostMemory
from memedge.engine.operators import OPERATORS
from memedge.engine.ort import OrtBackend
from memedge.engine.places import check_new_folder
from memedge.export.from_checkpoint import Job, Model, write_graphs
from memedge.export.graphs import gradient_graphs, screen
from memedge.export.graphs.prefix_split import run_prefix
from memedge.export.parity import Statistics, check, compare, engine_epsilon, excess, worse
from memedge.export.precision.convert import to_precision
from memedge.export.precision.int8_samples import read_samples
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.call import Call
from memedge.export.sources.checkpoint import Checkpoint
from memedge.export.sources.open import load_checkpoint

TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "memedge")


def export(
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    draws: int = 1,
    seed: int = 42,
    precision: Precision = "fp32",
    prompts: str | PathLike[str] | None = None,
    revision: str | None = None,
    loras: Sequence[str] = (),
    allow_pickle: bool = False,
    config: str | None = None,
    size: tuple[int, int] | None = None,
    max_sequence_length: int | None = None,
    guidance: float | None = None,
    text_encoder: bool = True,
    accept_parity: bool = False,
    progress: Callable[[str], None] = lambda _phase: None,
) -> Manifest:
    """Export a checkpoint as an engine directory, and compare it with torch. If it fails, nothing is left behind.

    Args:
        model: a directory in diffusers' format or exported by Optimum, a single file in the original layout, or a hub's
            id, org/name.
        output: the engine directory to make; it must not exist, or be empty.
        draws: n, the noise draws per prompt.
        seed: of the draws: torch.randn([n, C, H, W]) on a CPU generator.
        precision: of the graphs. Inputs and outputs are float32 in any case, but for fp16's cached inputs. fp16 is both
            graphs', where that is safe (precision/fp16.py); int8 is the UNet's alone.
        prompts: for int8: a file (memedge/prompts/files.py) of prompts to calibrate on and to compare with fp32 on,
            all of which are run; default: a list of captions. Its drift is in the manifest, with the AUC's change if
            the file is CSV with a column `memorized` (true or false).
        revision: of the hub's model: a branch, tag or commit.
        loras: files, each with `:scale` after it or not (then 1), that are fused into UNet and text encoders first.
        allow_pickle: read weights that are pickles, where there is nothing else.
        config: for a single file: the folder or hub id of a diffusers-format model of the same architecture.
        size: of transformers: height and width of the pictures, in pixels; default: the model's own. Its statistics
            are of this size.
        max_sequence_length: of transformers: the pipeline's argument, the most tokens that T5 or a language model is
            given; default: the pipeline's own.
        guidance: of distilled models that are told a guidance scale: the scale; default: the pipeline's own.
        text_encoder: whether the engine has the text encoder. Without it, it is smaller and scores embeddings alone.
        accept_parity: write the engine even if it differs from the original by more than the precision allows; its
            `notes` say so.
        progress: is told the name of each phase as it begins.

    Returns:
        The manifest; its `parity` holds the differences from torch in fp32: of fp16, the larger of those that ONNX
        Runtime has on the CPU and those that a GPU would have (precision/simulate_fp16.py).

    Raises:
        InputError: the prompts cannot be read, or are fewer than 8; the output is in the way, or has no place.
        ExportError: the checkpoint cannot be read, or the result does not agree with torch and that is not accepted.
        NotFiniteError: the model's predictions hold NaN or infinity.

    Examples:
        >>> from memedge import export_engine
        >>> manifest = export_engine("model", "new-engine", draws=2)
        >>> manifest.draws, manifest.precision, manifest.prediction_type
        (2, 'fp32', 'epsilon')
        >>> manifest.parity.norm_relative < 1e-4
        True
    """
    if draws < 1:
        raise ExportError(f"draws is {draws}: give at least 1.")
    if not 0 <= seed <= LARGEST_SEED:
        raise ExportError(f"seed is {seed}: give one from 0 to 2⁶³ - 1.")
    if precision not in get_args(Precision):
        raise ExportError(f"Precision {precision!r} cannot be exported: use {', '.join(get_args(Precision))}.")
    if not text_encoder and precision == "int8":
        raise ExportError("int8 is calibrated on prompts, so it needs the text encoder: export another precision.")
    if prompts is not None and precision != "int8":
        raise ExportError(f"Only int8 is calibrated on prompts, not {precision}: leave the prompts out.")
    model, place = fspath(model), Path(output)
    check_new_folder(place, "name another folder")
    samples = read_samples(None if prompts is None else Path(prompts)) if precision == "int8" else None
    with atomic.folder(place) as folder, quiet():

        def load() -> Checkpoint:
            progress("loading the checkpoint")
            return load_checkpoint(
                model,
                revision=revision,
                loras=loras,
                allow_pickle=allow_pickle,
                config=config,
                call=Call(size, max_sequence_length, guidance),
                progress=progress,
            )

        return _write(Job(folder, draws, seed, precision, samples, accept_parity, text_encoder, progress), load)


def _write(job: Job, load: Callable[[], Checkpoint]) -> Manifest:
    """Write the engine, and a manifest that says how far it is from the checkpoint."""
    model, unet = write_graphs(job, load)
    # Nobody holds the checkpoint any more, whose weights are as large as the engine's. But graphs refer to themselves,
    # and keep theirs until they are collected: now, because the sessions to come need the room.
    gc.collect()
    cached = run_prefix(job.folder / PREFIX, model.sample, model.noise.timesteps, model.guidance)
    # Before the baseline, which must come from the graph that is shipped.
    converted = to_precision(job, model, cached)
    cached = converted.cached
    notes = (*model.notes, *_write_gradients(job), *converted.notes)
    screen.write(job.folder, unet.taps)
    check_graphs(job.folder)
    prediction = _write_baseline(job, model, cached)
    parity, accepted = _compare(job, model, prediction, converted.simulated)
    manifest = Manifest(
        schema=SCHEMA,
        source=model.source,
        prediction_type=model.noise.prediction_type,
        latent_shape=model.latent_shape,
        tokens=model.tokens,
        state_width=model.state_width,
        timesteps=model.noise.timesteps,
        alphas_cumprod=model.noise.alphas_cumprod,
        schedule=model.noise.schedule,
        draws=job.draws,
        seed=job.seed,
        precision=job.precision,
        opset=unet.opset,
        flops=unet.flops,
        cached={name: array.shape[1:] for name, array in cached.items()},
        tools={tool: version(tool) for tool in TOOLS} | probe.distributions("onnxruntime"),
        parity=parity,
        calibrations={},
        files={path.name: describe_file(path) for path in sorted(job.folder.iterdir())},
        drift=converted.drift,
        preset=model.preset,
        notes=(*notes, *accepted),
        pooled_width=model.pooled_width,
        flow=model.noise.flow,
        token_lengths=model.token_lengths,
        masked=model.masked,
        guidance=model.guidance,
        reads_prompts=job.text_encoder,
        taps=unet.taps,
    )
    write_manifest(job.folder, manifest)
    Engine.open(job.folder, "cpu", None, None)  # what was written must be what can be read
    return manifest


def _write_gradients(job: Job) -> tuple[str, ...]:
    """Write the gradient graphs; return a note if there are none."""
    if job.precision == "int8":  # whose rounding has no gradient
        return ()
    job.progress("differentiating the UNet")
    missing = gradient_graphs.write(job.folder)
    return (f"There are no gradients, so no mitigation without the checkpoint: {missing}.",) if missing else ()


def check_graphs(folder: Path) -> None:
    """Raise ExportError if a graph holds what engines may not: nobody could load it."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name in sorted(OPERATORS.keys() & sizes.keys()):
        try:
            check_graph(folder / name, sizes)
        except IntegrityError as error:
            reason = str(error).removeprefix(f"{folder / name} ").rpartition(": ")[0]
            raise ExportError(f"The model's {name} {reason}: nothing was written; report this checkpoint.") from None


def _write_baseline(job: Job, model: Model, cached: Tensors) -> npt.NDArray[np.float32]:
    """Write what no prompt changes, as the engine's own graphs compute it; return ε of the probes."""
    job.progress("caching the unconditional predictions")
    backend = OrtBackend(job.folder, cached, job.precision, HostMemory())
    prediction = engine_epsilon(backend, model.ids, job.draws, None if job.text_encoder else model.states)
    tensors = {"sample": model.sample, "uncond": np.ascontiguousarray(prediction[0]), **cached}
    (job.folder / BASELINE).write_bytes(save(tensors))
    return prediction


def _compare(
    job: Job, model: Model, prediction: npt.NDArray[np.float32], simulated: Statistics | None
) -> tuple[Parity, tuple[str, ...]]:
    """Return how far the engine's ε of the probes is from the checkpoint's, and what is to be said of that.

    Of fp16 it is the worse of what ONNX Runtime computes and what was simulated: tolerances hold here and on a GPU.

    Raises:
        ExportError: further than the precision allows, and not accepted.
    """
    job.progress("comparing with the reference")
    found = [Statistics.of(prediction, model.noise.norm_factor), *([simulated] if simulated else [])]
    parity = reduce(worse, (compare(one, model.reference) for one in found))
    excesses = [excess(one, model.reference, job.precision) for one in found]
    largest = next((one for one in excesses if not one.within), excesses[0])
    return parity, check(parity, largest, job.precision, job.accept_parity)
