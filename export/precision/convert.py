"""The float32 graphs in a folder → those of the precision that was asked for."""

import gc

from memedge.engine.directory import PREFIX, TEXT_ENCODER, UNET, Tensors
from memedge.engine.manifest import Drift
from memedge.engine.memory import HostMemory
from memedge.engine.ort import OrtBackend
from memedge.export.from_checkpoint import Job, Model
from memedge.export.precision import fp16, int8, ranges
from memedge.export.precision.drift import drift, scores
from memedge.export.precision.int8_samples import Samples


def to_precision(job: Job, model: Model, cached: Tensors) -> tuple[Tensors, Drift | None]:
    """Replace the float32 graphs by those of the precision asked for; return the cached inputs, and int8's drift."""
    if job.precision == "fp16":
        return _to_half(job, model, cached), None
    if job.samples is not None:
        return cached, _to_int8(job, model, cached, job.samples)
    return cached, None


def _to_half(job: Job, model: Model, cached: Tensors) -> Tensors:
    """Replace both float32 graphs by mixed ones; return the cached inputs in fp16."""
    text_encoder, unet = job.folder / TEXT_ENCODER, job.folder / UNET
    rounded = fp16.cached_in_half(cached)
    job.progress("measuring how large values become")
    of_text_encoder = ranges.observe(text_encoder, [{"ids": model.ids}])
    of_unet = ranges.observe(unet, ranges.unet_calls(model.states, cached))
    job.progress("converting to fp16")
    fp16.convert(text_encoder, of_text_encoder)
    fp16.convert(unet, of_unet)
    fp16.narrow_outputs(job.folder / PREFIX)
    gc.collect()  # of the float32 graphs, whose files are gone, but stay mapped till then
    return rounded


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
