"""`memedge export`: checkpoint → engine directory, whole and in agreement with torch, or not at all."""

import gc
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save

from memedge.engine import atomic, probe
from memedge.engine.directory import (
    BASELINE,
    PREFIX,
    SECOND_TOKENIZER,
    TEXT_ENCODER,
    TOKENIZER,
    UNET,
    Tensors,
    describe_file,
)
from memedge.engine.engine import Engine
from memedge.engine.errors import ExportError
from memedge.engine.manifest import (
    SCHEMA,
    Drift,
    Flops,
    Manifest,
    Precision,
    Source,
    velocity_norm_factor,
    write_manifest,
)
from memedge.engine.memory import HostMemory
from memedge.engine.ort import OrtBackend
from memedge.engine.places import check_new_folder
from memedge.engine.tokenizer import PromptTokenizer
from memedge.export.graphs import cost, files, fold_upsampling, fuse_linear, gradient_graphs
from memedge.export.graphs.prefix_split import run_prefix, split
from memedge.export.parity import PROBES, Statistics, check, compare, engine_epsilon, epsilon, worse
from memedge.export.precision import fp16, int8, ranges, simulate_fp16
from memedge.export.precision.drift import drift, scores
from memedge.export.precision.int8_samples import Samples, read_samples
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.checkpoint import Checkpoint, latent_shape
from memedge.export.sources.open import load_checkpoint
from memedge.export.sources.presets import preset_of
from memedge.export.sources.schedule import Noise, read_noise

TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "memedge")


def export(
    model: str | Path,
    output: Path,
    *,
    draws: int = 1,
    seed: int = 42,
    precision: Precision = "fp32",
    prompts: Path | None = None,
    revision: str | None = None,
    loras: Sequence[str] = (),
    allow_pickle: bool = False,
    config: str | None = None,
    progress: Callable[[str], None] = lambda _phase: None,
) -> Manifest:
    """Export a checkpoint as an engine directory, and compare it with torch.

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
        progress: is told the name of each phase as it begins.

    Returns:
        The manifest; its `parity` holds the differences from torch in fp32: of fp16, the larger of those that ONNX
        Runtime has on the CPU and those that a GPU would have (precision/simulate_fp16.py).

    Raises:
        InputError: the prompts cannot be read, or are fewer than 8; the output is in the way, or has no place.
        ExportError: the checkpoint cannot be read, or the result does not agree with torch.
        NotFiniteError: the model's predictions hold NaN or infinity.
        In every case nothing is left behind.
    """
    if draws < 1:
        raise ExportError(f"draws is {draws}: give at least 1.")
    if precision not in get_args(Precision):
        raise ExportError(f"Precision {precision!r} cannot be exported: use {', '.join(get_args(Precision))}.")
    if prompts is not None and precision != "int8":
        raise ExportError(f"Only int8 is calibrated on prompts, not {precision}: leave the prompts out.")
    check_new_folder(output, "name another folder")
    samples = read_samples(prompts) if precision == "int8" else None
    with atomic.folder(output) as folder, quiet():
        progress("loading the checkpoint")
        return _write(
            # Held by nobody else, so that it can be let go of: its weights are as large as the engine's.
            load_checkpoint(
                str(model), revision=revision, loras=loras, allow_pickle=allow_pickle, config=config, progress=progress
            ),
            folder,
            draws,
            seed,
            precision,
            samples,
            progress,
        )


def _write(
    checkpoint: Checkpoint,
    folder: Path,
    draws: int,
    seed: int,
    precision: Precision,
    samples: Samples | None,
    progress: Callable[[str], None],
) -> Manifest:
    shape, noise = latent_shape(checkpoint.unet_config), read_noise(checkpoint.scheduler)
    tokenizer = _write_tokenizers(checkpoint, folder)
    ids, _ = tokenizer(PROBES)
    sample = torch.randn((draws, *shape), generator=torch.Generator().manual_seed(seed)).numpy()
    factor = 1.0
    if noise.prediction_type == "v_prediction":
        factor = velocity_norm_factor(noise.alphas_cumprod[0])

    progress("computing the reference with the checkpoint's own libraries")
    states = checkpoint.encode(ids)
    reference = Statistics.of(_reference(checkpoint, noise, sample, states), factor)
    source = Source(checkpoint.id, checkpoint.sha256)
    family = checkpoint.architecture
    preset = preset_of(family.published, checkpoint.id, checkpoint.state_width, noise.prediction_type)
    tokens, state_width, pooled_width = checkpoint.tokens, checkpoint.state_width, checkpoint.pooled_width

    # Only now, with the reference computed, may modules change their attention.
    progress("exporting the text encoder")
    text_encoder = checkpoint.text_encoder_graph()
    files.save(text_encoder, folder / TEXT_ENCODER, external_data=files.weights(text_encoder) > files.LARGE)
    progress("exporting the UNet")
    unet = checkpoint.unet_graph()
    opset = unet.opset_imports[""]
    progress("splitting off what no prompt changes")
    parts = split(unet, 2 * draws)
    fold_upsampling.fold(parts.unet)
    flops = Flops(
        text_encoder=sum(map(cost.flops, text_encoder.graph)),
        unet=parts.flops,
        prefix=parts.flops_cached,
        remaining=sum(map(cost.flops, parts.unet.graph)),
    )
    fuse_linear.fuse(parts.unet)
    files.save(parts.unet, folder / UNET, external_data=True)
    files.save(parts.prefix, folder / PREFIX, external_data=files.weights(parts.prefix) > files.LARGE)
    cached = run_prefix(folder / PREFIX, sample, noise.timesteps)
    # Graphs refer to themselves and keep their weights until they are collected; the sessions to come need the room.
    del checkpoint, text_encoder, unet, parts
    gc.collect()

    # Here and not at the end, because the baseline must come from the graph that is shipped.
    measured = _to_int8(folder, cached, tokenizer, samples, draws, factor, progress) if samples else None
    if precision == "fp16":
        cached = _to_half(folder, cached, ids, states, progress)

    notes = noise.notes
    if precision != "int8":  # whose rounding has no gradient
        progress("differentiating the UNet")
        if missing := gradient_graphs.write(folder):
            notes += (f"There are no gradients, so no mitigation without the checkpoint: {missing}.",)

    progress("caching the unconditional predictions")
    prediction = engine_epsilon(OrtBackend(folder, cached, precision, HostMemory()), ids, draws)
    tensors = {"sample": sample, "uncond": np.ascontiguousarray(prediction[0]), **cached}
    (folder / BASELINE).write_bytes(save(tensors))

    progress("comparing with the reference")
    parity = compare(Statistics.of(prediction, factor), reference)
    if precision == "fp16":
        # The worse of both, so that the tolerance holds here and on a GPU.
        simulated = Statistics.of(simulate_fp16.epsilon(folder, cached, ids, draws), factor)
        parity = worse(parity, compare(simulated, reference))
    check(parity, precision)
    manifest = Manifest(
        schema=SCHEMA,
        source=source,
        prediction_type=noise.prediction_type,
        latent_shape=shape,
        tokens=tokens,
        state_width=state_width,
        timesteps=noise.timesteps,
        alphas_cumprod=noise.alphas_cumprod,
        schedule=noise.schedule,
        draws=draws,
        seed=seed,
        precision=precision,
        opset=opset,
        flops=flops,
        cached={name: array.shape[1:] for name, array in cached.items()},
        tools={tool: version(tool) for tool in TOOLS} | probe.onnx_runtimes(),
        parity=parity,
        calibrations={},
        files={path.name: describe_file(path) for path in sorted(folder.iterdir())},
        drift=measured,
        preset=preset,
        notes=notes,
        pooled_width=pooled_width,
    )
    write_manifest(folder, manifest)
    Engine.open(folder, "cpu", None, None)  # what was written must be what can be read
    return manifest


def _write_tokenizers(checkpoint: Checkpoint, folder: Path) -> PromptTokenizer:
    paths = [folder / name for name, _ in zip((TOKENIZER, SECOND_TOKENIZER), checkpoint.tokenizers, strict=False)]
    for path, tokenizer in zip(paths, checkpoint.tokenizers, strict=True):
        tokenizer.save(str(path))
    return PromptTokenizer(paths, checkpoint.tokens)


def _to_half(
    folder: Path,
    cached: Tensors,
    ids: npt.NDArray[np.int64],
    states: npt.NDArray[np.float32],
    progress: Callable[[str], None],
) -> Tensors:
    """Replace both float32 graphs by mixed ones; return the cached inputs in fp16."""
    rounded = fp16.cached_in_half(cached)
    progress("measuring how large values become")
    text_encoder = ranges.observe(folder / TEXT_ENCODER, [{"ids": ids}])
    unet = ranges.observe(folder / UNET, ranges.unet_calls(states, cached))
    progress("converting to fp16")
    fp16.convert(folder / TEXT_ENCODER, text_encoder)
    fp16.convert(folder / UNET, unet)
    fp16.narrow_outputs(folder / PREFIX)
    gc.collect()  # of the float32 graphs, whose files are gone, but stay mapped till then
    return rounded


def _to_int8(
    folder: Path,
    cached: Tensors,
    tokenizer: PromptTokenizer,
    samples: Samples,
    draws: int,
    norm_factor: float,
    progress: Callable[[str], None],
) -> Drift:
    """Replace the float32 UNet by an int8 one, and return how far that moves scores.

    It holds for the engine's own noise, so the prefix, which is for any, goes.
    """
    count = len(samples.drift)
    ids, _ = tokenizer(["", *samples.drift])
    progress(f"scoring {count} prompts in fp32")
    backend = OrtBackend(folder, cached, "fp32", HostMemory())
    true = scores(backend, ids, draws, norm_factor)
    progress(f"calibrating int8 on {len(samples.activations)} prompts")
    states = backend.memory.download(backend.encode(tokenizer(["", *samples.activations])[0]))
    del backend  # at most one float32 UNet in memory
    int8.quantise(folder / UNET, states, cached)
    for path in folder.glob(f"{PREFIX}*"):
        path.unlink()
    progress(f"scoring {count} prompts in int8")
    return drift(
        scores(OrtBackend(folder, cached, "int8", HostMemory()), ids, draws, norm_factor), true, samples.memorized
    )


def _reference(
    checkpoint: Checkpoint,
    noise: Noise,
    sample: npt.NDArray[np.float32],
    states: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Return ε, [B, 2, n, C, H, W], that the checkpoint itself predicts for states [B, K, D]."""

    def predict(state: npt.NDArray[np.float32], row: int) -> npt.NDArray[np.float32]:
        step, draw = divmod(row, len(sample))
        return checkpoint.predict(sample[draw], noise.timesteps[step], state)

    return epsilon(predict, states, len(sample))
