"""Where checkpoints come from: a folder, a hub, a single file; with LoRAs fused in."""

from collections.abc import Callable, Sequence
from pathlib import Path

from memedge.engine.errors import ExportError
from memedge.export import folder, hub, lora, single_file, weights
from memedge.export.parts import Parts


def load_parts(
    model: str,
    *,
    revision: str | None,
    loras: Sequence[str],
    allow_pickle: bool,
    config: str | None,
    progress: Callable[[str], None],
) -> Parts:
    """Load a checkpoint; call it under quiet(), for the model libraries warn of much.

    Args:
        model: a diffusers-format directory; a single file in the original layout; or a hub's id, org/name.
        revision: of the hub's model: a branch, tag or commit.
        loras: files, each with `:scale` after it or not (then 1), to be fused into the UNet and the text encoders.
        allow_pickle: read weights that are pickles, where there is nothing else.
        config: for a single file: a diffusers-format directory, or a hub's id, of the same architecture.
        progress: is told what takes long, and what is not as usual.

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
        parts = folder.load(path, path.resolve().name, allow_pickle, progress)
    elif path.is_file():
        parts = single_file.load(path, config, allow_pickle, progress)
    elif is_id:
        copy = hub.download(model, revision, lambda names: weights.needed(names, model, allow_pickle), progress)
        parts = folder.load(copy, f"{model}@{copy.name}", allow_pickle, progress)
    else:
        raise ExportError(
            f"There is no {model}: give a folder in diffusers' format or exported by Optimum, a .safetensors file, or "
            "the id of a model on the hub (org/name)."
        )
    for adapter in adapters:
        progress(f"fusing {adapter.path.name}")
        lora.fuse(parts, adapter)
    return parts
