"""The float32 graphs in a folder → those of the precision that was asked for."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from memedge.engine.directory import PREFIX, TEXT_ENCODER, UNET, Tensors
from memedge.engine.manifest import Drift
from memedge.engine.memory import HostMemory
from memedge.engine.ort import OrtBackend
from memedge.export.from_checkpoint import Job, Model
from memedge.export.parity import Statistics
from memedge.export.precision import fp16, int8, kept_fp32, ranges
from memedge.export.precision.drift import drift, scores
from memedge.export.precision.int8_samples import Samples


@dataclass(frozen=True)
class Converted:
    """The cached inputs of the graphs that were written, and what was measured meanwhile.

    Attributes:
        cached: in fp16 if the graphs are.
        drift: int8's.
        simulated: fp16's statistics of the probes, as a GPU would round.
        notes: sentences for the manifest.
    """

    cached: Tensors
    drift: Drift | None = None
    simulated: Statistics | None = None
    notes: tuple[str, ...] = ()


def to_precision(job: Job, model: Model, cached: Tensors) -> Converted:
    """Replace the float32 graphs by those of the precision asked for."""
    if job.precision == "fp16":
        return _to_half(job, model, cached)
    if job.samples is not None:
        return Converted(cached, _to_int8(job, model, cached, job.samples))
    return Converted(cached)


def _to_half(job: Job, model: Model, cached: Tensors) -> Converted:
    """Replace both float32 graphs by mixed ones, with as much float32 as the measured error needs."""
    text_encoder, unet = job.folder / TEXT_ENCODER, job.folder / UNET
    rounded = fp16.cached_in_half(cached)
    job.progress("measuring how large values become")
    of_text_encoder = ranges.observe(text_encoder, [{"ids": model.ids}])
    of_unet = ranges.observe(unet, ranges.unet_calls(model.states, cached))
    job.progress("converting to fp16")
    fp16.narrow_outputs(job.folder / PREFIX)
    with tempfile.TemporaryDirectory(dir=job.folder) as name:
        originals = Path(name)
        for path in (*job.folder.glob(f"{TEXT_ENCODER}*"), *job.folder.glob(f"{UNET}*")):
            path.rename(originals / path.name)
        graphs = kept_fp32.Graphs(job, model, rounded, originals, {TEXT_ENCODER: of_text_encoder, UNET: of_unet})
        simulated, notes = kept_fp32.write(graphs)
    return Converted(rounded, simulated=simulated, notes=notes)


def _to_int8(job: Job, model: Model, cached: Tensors, samples: Samples) -> Drift:
    """Replace the float32 UNet by an int8 one, and return how far that moves scores.

    It holds for the engine's own noise, so the prefix, which is for any, goes.
    """
    count = len(samples.drift)
    ids, _ = model.tokenizer(["", *samples.drift])
    job.progress(f"scoring {count} prompts in fp32")
    backend = OrtBackend(job.folder, cached, "fp32", HostMemory())
    true = scores(backend, ids, job.draws, model.noise.norm_factor)
    job.progress(f"calibrating int8 on {len(samples.activations)} prompts")
    states = backend.memory.download(backend.encode(model.tokenizer(["", *samples.activations])[0]))
    del backend  # at most one float32 UNet in memory
    int8.quantise(job.folder / UNET, states, cached)
    for path in job.folder.glob(f"{PREFIX}*"):
        path.unlink()
    job.progress(f"scoring {count} prompts in int8")
    backend = OrtBackend(job.folder, cached, "int8", HostMemory())
    return drift(scores(backend, ids, job.draws, model.noise.norm_factor), true, samples.memorized)
