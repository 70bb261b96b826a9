"""All of an engine that is made of the checkpoint itself, before the checkpoint is let go of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from memedge.engine.directory import PREFIX, TEXT_ENCODER, TOKENIZERS, UNET
from memedge.engine.errors import shown
from memedge.engine.manifest import CheckpointSource, Flops, Precision, Preset, Tap
from memedge.engine.tokenizer import PromptTokenizer
from memedge.export.graphs import cost, empty_states, files, fold_upsampling, fuse_linear, screen
from memedge.export.graphs.prefix_split import split
from memedge.export.parity import PROBES, Statistics, epsilon
from memedge.export.precision.int8_samples import Samples
from memedge.export.sources.checkpoint import Checkpoint
from memedge.export.sources.flow_schedule import read_flow
from memedge.export.sources.presets import preset_of, student_by
from memedge.export.sources.schedule import Noise, read_noise


@dataclass(frozen=True)
class Job:
    """What was asked for, and the folder to write it in."""

    folder: Path
    draws: int
    seed: int
    precision: Precision
    samples: Samples | None  # for int8
    accept_parity: bool
    text_encoder: bool  # whether the engine is to have it
    progress: Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """What the engine tells of its checkpoint, and what the checkpoint itself made of the probes.

    It holds no weights, and outlives the checkpoint.
    """

    source: CheckpointSource
    latent_shape: tuple[int, int, int]
    tokens: int
    token_lengths: tuple[int, ...]  # of the tokenizers, if it is not `tokens` for all
    state_width: int
    pooled_width: int
    masked: bool
    guidance: float | None
    noise: Noise
    notes: tuple[str, ...]  # what is unusual, in sentences
    preset: Preset | None
    tokenizer: PromptTokenizer
    ids: npt.NDArray[np.int64]  # [B, T · L], of the probes
    states: npt.NDArray[np.float32]  # [B, K, D], of the probes
    sample: npt.NDArray[np.float32]  # [n, C, H, W]
    reference: Statistics


@dataclass(frozen=True)
class UNet:
    """The opset of the graphs that were written, the work of all of them, and where a screen may read the UNet's."""

    opset: int
    flops: Flops
    taps: tuple[Tap, ...]


def write_graphs(job: Job, load: Callable[[], Checkpoint]) -> tuple[Model, UNet]:
    """Write all that is made of the checkpoint; return what it and the engine tell of it.

    The checkpoint is held here and nowhere else, and is let go of with the return.
    """
    checkpoint = load()
    model = _ask(job, checkpoint)
    # Only now, with the reference computed, may modules change their attention.
    text_encoder = _write_text_encoder(job, checkpoint, model)
    return model, _write_unet(job, checkpoint, text_encoder)


def _ask(job: Job, checkpoint: Checkpoint) -> Model:
    """Write the tokenizers, and let the checkpoint's own libraries compute what the engine is to be compared with."""
    shape, noise = checkpoint.latent_shape, _read_noise(checkpoint)
    tokenizer = _write_tokenizers(job, checkpoint)
    ids, _ = tokenizer(PROBES)
    sample = torch.randn((job.draws, *shape), generator=torch.Generator().manual_seed(job.seed)).numpy()

    def predict(state: npt.NDArray[np.float32], row: int) -> npt.NDArray[np.float32]:
        step, draw = divmod(row, job.draws)
        return checkpoint.predict(sample[draw], noise.timesteps[step], state)

    preset = preset_of(checkpoint.architecture.published, checkpoint.id, checkpoint.state_width, noise.prediction_type)
    student = student_by(checkpoint.id, checkpoint.scheduler.get("_class_name"), checkpoint.guidance)
    notes = [*checkpoint.notes, *noise.notes]
    if checkpoint.guidance is not None:
        notes.append(f"It is told a guidance scale, of {checkpoint.guidance:g}: its statistics are of that one.")
    if preset and student:
        notes.append(f"No published γ: that of {preset.family} is not for models distilled from it, as {student} says.")

    job.progress("computing the reference with the checkpoint's own libraries")
    states = checkpoint.encode(ids)
    return Model(
        source=CheckpointSource(shown(checkpoint.id), checkpoint.sha256),
        latent_shape=shape,
        tokens=checkpoint.tokens,
        token_lengths=() if set(checkpoint.lengths) == {checkpoint.tokens} else checkpoint.lengths,
        state_width=checkpoint.state_width,
        pooled_width=checkpoint.pooled_width,
        masked=checkpoint.masked,
        guidance=checkpoint.guidance,
        noise=noise,
        notes=tuple(notes),
        preset=None if student else preset,
        tokenizer=tokenizer,
        ids=ids,
        states=states,
        sample=sample,
        reference=Statistics.of(epsilon(predict, states, job.draws), noise.norm_factor),
    )


def _read_noise(checkpoint: Checkpoint) -> Noise:
    denoiser = checkpoint.architecture.denoiser
    if not denoiser.flow:
        return read_noise(checkpoint.scheduler)
    return read_flow(checkpoint.scheduler, denoiser, checkpoint.latent_shape)


def _write_tokenizers(job: Job, checkpoint: Checkpoint) -> PromptTokenizer:
    paths = [job.folder / name for name in TOKENIZERS[: len(checkpoint.tokenizers)]]
    for path, tokenizer in zip(paths, checkpoint.tokenizers, strict=True):
        tokenizer.save(str(path))
    return PromptTokenizer(paths, checkpoint.lengths)


def _write_text_encoder(job: Job, checkpoint: Checkpoint, model: Model) -> int:
    """Return its work."""
    job.progress("exporting the text encoder" if job.text_encoder else "leaving the text encoder out")
    empty = model.states[0]  # of the first probe
    graph = checkpoint.text_encoder_graph() if job.text_encoder else empty_states.graph_of(empty, model.ids.shape[1])
    files.save(graph, job.folder / TEXT_ENCODER, external_data=files.weight_bytes(graph) > files.LARGE)
    return sum(map(cost.flops, graph.graph))


def _write_unet(job: Job, checkpoint: Checkpoint, text_encoder: int) -> UNet:
    """Write the UNet in two graphs; `text_encoder` is that one's work."""
    job.progress("exporting the UNet")
    graph = checkpoint.unet_graph()
    job.progress("splitting off what no prompt changes")
    parts = split(graph, 2 * job.draws)
    fold_upsampling.fold(parts.unet)
    remaining = sum(map(cost.flops, parts.unet.graph))
    fuse_linear.fuse(parts.unet)
    files.save(parts.unet, job.folder / UNET, external_data=True)
    files.save(parts.prefix, job.folder / PREFIX, external_data=files.weight_bytes(parts.prefix) > files.LARGE)
    flops = Flops(text_encoder=text_encoder, unet=parts.flops, prefix=parts.flops_cached, remaining=remaining)
    return UNet(graph.opset_imports[""], flops, screen.find_taps(parts.unet.graph))
