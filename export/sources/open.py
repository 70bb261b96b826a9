"""From what the user names to a checkpoint: a folder, a hub, a single file, LoRAs; or Optimum's graphs."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from memedge.engine.errors import ExportError
from memedge.export.sources import folder, hub, lora, single_file, weights
from memedge.export.sources.call import AS_PUBLISHED, Call
from memedge.export.sources.checkpoint import Checkpoint
from memedge.export.sources.optimum import OptimumCheckpoint, is_optimum
from memedge.export.sources.parts import Parts
from memedge.export.sources.torch_checkpoint import TorchCheckpoint


def load_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    loras: Sequence[str] = (),
    allow_pickle: bool = False,
    config: str | None = None,
    call: Call = AS_PUBLISHED,
    progress: Callable[[str], None] = lambda _phase: None,
) -> Checkpoint:
    """Load a checkpoint; the arguments are those of load_parts.

    Raises:
        ExportError: it is none that memedge knows, or damaged.
    """
    if is_optimum(Path(model)):
        if call != AS_PUBLISHED:
            raise ExportError(f"{model} is what Optimum exported, with one size and one length: leave these out.")
        if revision is not None or loras or config is not None:
            raise ExportError(
                f"{model} is what Optimum exported, which has no revision and needs no config, and LoRAs can't be "
                "fused into it: leave them out, or give the model that was exported."
            )
        return OptimumCheckpoint(Path(model))
    parts = load_parts(
        model, revision=revision, loras=loras, allow_pickle=allow_pickle, config=config, call=call, progress=progress
    )
    return TorchCheckpoint(parts)


def load_parts(
    model: str,
    *,
    revision: str | None,
    loras: Sequence[str],
    allow_pickle: bool,
    config: str | None,
    progress: Callable[[str], None],
    call: Call = AS_PUBLISHED,
) -> Parts:
    """Load a checkpoint; call it under quiet(), for the model libraries warn of much.

    Args:
        model: a diffusers-format directory; a single file in the original layout; or a hub's id, org/name.
        revision: of the hub's model: a branch, tag or commit.
        loras: files, each with `:scale` after it or not (then 1), to be fused into the UNet and the text encoders.
        allow_pickle: read weights that are pickles, where there is nothing else.
        config: for a single file: a diffusers-format directory, or a hub's id, of the same architecture.
        progress: is told what takes long, and what is not as usual.
        call: how the pipeline will be called.

    Raises:
        ExportError: an argument does not fit, or something cannot be found, downloaded, read or fused.
    """
    adapters = [lora.parse(text, allow_pickle) for text in loras]  # before what takes long
    path = Path(model)
    # dir/name.safetensors looks like an id, but is a file that is not there.
    is_id = not path.exists() and hub.ID.fullmatch(model) and path.suffix.lower() not in single_file.SUFFIXES
    if revision is not None and not is_id:
        raise ExportError(f"A revision ({revision}) is of a model on a hub, not of {model}: leave one of both out.")
    if config is not None and not path.is_file():
        raise ExportError(f"A config ({config}) is for a single file, which {model} is not: leave the config out.")
    # An Optimum export (unet/model.onnx) is a folder, too; it holds no modules and cannot come this way.
    if path.is_dir():
        parts = folder.load(path, path.resolve().name, allow_pickle, progress, call)
    elif path.is_file():
        parts = single_file.load(path, config, allow_pickle, progress, call)
    elif is_id:

        def choose(names: Collection[str], kind: object) -> list[str]:
            return weights.needed(names, model, allow_pickle, kind)

        copy = hub.download(model, revision, choose, progress)
        parts = folder.load(copy, f"{model}@{copy.name}", allow_pickle, progress, call)
    else:
        raise ExportError(
            f"There is no {model}: give a folder in diffusers' format or exported by Optimum, a .safetensors file, or "
            "the id of a model on the hub (org/name)."
        )
    for adapter in adapters:
        progress(f"fusing {adapter.path.name}")
        lora.fuse(parts, adapter)
    return parts
