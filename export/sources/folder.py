"""A diffusers-format directory: SD 1.x, SD 2.x, SDXL."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from memedge.engine.directory import sha256
from memedge.engine.errors import ExportError
from memedge.export.sources import weights
from memedge.export.sources.parts import Parts, hash_of

KINDS: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


def load(folder: Path, name: str, allow_pickle: bool, progress: Callable[[str], None]) -> Parts:
    """Load the modules of a diffusers-format directory in fp32; `name` becomes the id.

    Raises:
        ExportError: a part is missing, cannot be read, or is of another kind than SD's.
    """
    names = list_files(folder)
    files = weights.needed(names, str(folder), allow_pickle)
    unet, *text_encoders = (_module(folder, part, names, allow_pickle, progress) for part in weights.modules(names))
    return Parts(
        id=name,
        sha256=hash_of((file, sha256(folder / file)) for file in files),
        unet=unet,
        text_encoders=text_encoders,
        tokenizers=tokenizers(folder),
        scheduler=read_json(folder / weights.SCHEDULER),
        zeros_for_empty=zeros_for_empty(folder),
    )


def list_files(folder: Path) -> list[str]:
    """Return the names of the files in a model's folder and one level below."""
    paths = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def tokenizers(folder: Path) -> list[Any]:
    """Load the tokenizer of each text encoder.

    Raises:
        ExportError: one cannot be read.
    """
    paths = [folder / weights.tokenizer(part) for part in weights.text_encoders(list_files(folder))]
    loaded = []
    for path in paths:
        with weights.reading(path):
            loaded.append(AutoTokenizer.from_pretrained(path, use_fast=True, local_files_only=True))
    return loaded


def zeros_for_empty(folder: Path) -> bool:
    """Return whether ε_0 of SDXL is of zeros instead of the empty prompt; left out, its pipeline takes it for true."""
    path = folder / weights.INDEX
    return bool((read_json(path) if path.is_file() else {}).get("force_zeros_for_empty_prompt", True))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a configuration file.

    Raises:
        ExportError: it holds none.
    """
    with weights.reading(path):
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError("no JSON object")
    return content


def check_kind(folder: Path, part: str) -> None:
    """Refuse modules that the class which is to read them does not describe; the libraries would only warn.

    Raises:
        ExportError: the UNet is no UNet2DConditionModel, or a text encoder is not CLIP's.
    """
    config = read_json(folder / part / "config.json")
    kind = config.get("_class_name") if part == "unet" else config.get("model_type")
    if kind not in (("UNet2DConditionModel",) if part == "unet" else ("clip_text_model", "clip")):
        raise ExportError(f"{folder / part} is a {kind}: memedge exports Stable Diffusion 1.x, 2.x and SDXL.")


def _module(
    folder: Path, part: str, names: list[str], allow_pickle: bool, progress: Callable[[str], None]
) -> torch.nn.Module:
    check_kind(folder, part)
    chosen = weights.weights(part, names, str(folder), allow_pickle)
    if chosen.variant:
        progress(f"reading {part} from its {chosen.variant} weights: it has no others")
    index = next((name for name in chosen.files if name.endswith(".json")), None)
    shards = [name for name in chosen.files if name != index]
    if index:
        mapped = set(read_json(folder / index).get("weight_map", {}).values())
        if mapped != {Path(name).name for name in shards}:
            raise ExportError(f"{folder / index} names other files than those beside it: get the model again.")
    for name in shards:
        weights.check_not_pointer(folder / name)
    with weights.reading(folder / part):
        module, info = KINDS[part].from_pretrained(
            folder / part,
            torch_dtype=torch.float32,
            variant=chosen.variant,
            use_safetensors=not chosen.pickled,
            local_files_only=True,
            output_loading_info=True,
        )
    # The libraries fill what is missing with random numbers, and drop what they do not know.
    unknown = list(info["unexpected_keys"]) if part == "unet" else []
    for wrong, verb in ((list(info["missing_keys"]), "lack"), (unknown, "hold")):
        if wrong:
            raise ExportError(
                f"The weights in {folder / part} {verb} {sorted(wrong)[0]}, unlike its config.json: get it again."
            )
    loaded: torch.nn.Module = module.eval().requires_grad_(False)
    return loaded
