"""A directory in diffusers' format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers import AutoTokenizer

from memedge.engine.directory import sha256
from memedge.engine.errors import ExportError
from memedge.export.sources import weights
from memedge.export.sources.architectures import ARCHITECTURES, Architecture, architecture_of
from memedge.export.sources.call import AS_PUBLISHED, Call
from memedge.export.sources.check_traits import check_folder, check_index
from memedge.export.sources.parts import Parts, hash_of
from memedge.export.sources.templates import read_templates
from memedge.wording import listed


def load(
    folder: Path, name: str, allow_pickle: bool, progress: Callable[[str], None], call: Call = AS_PUBLISHED
) -> Parts:
    """Load the modules of a diffusers-format directory in fp32; `name` becomes the id.

    Raises:
        ExportError: a part is missing, cannot be read, or says that it is another model than memedge exports.
    """
    names = list_files(folder)
    if weights.INDEX in names:  # first: of another family's model, no part may be as expected
        check_index(folder / weights.INDEX, str(folder))
    kind = weights.kind_of(folder)
    files = weights.needed(names, str(folder), allow_pickle, kind)
    architecture = architecture_of(names, kind)
    check_kinds(folder, architecture)
    notes = check_folder(folder, architecture)
    readers = [getattr(diffusers, architecture.denoiser.reader)]
    readers += [getattr(transformers, encoder.reader) for encoder in architecture.encoders]
    denoiser: Any
    denoiser, *text_encoders = (
        _module(folder, part, reader, names, allow_pickle, progress)
        for part, reader in zip(architecture.modules, readers, strict=True)
    )
    own_tokenizers = tokenizers(folder, architecture)
    return Parts(
        id=name,
        sha256=hash_of((file, sha256(folder / file)) for file in files),
        architecture=architecture,
        denoiser=denoiser,
        text_encoders=text_encoders,
        tokenizers=own_tokenizers,
        templates=read_templates(architecture, own_tokenizers),
        scheduler=weights.read_json(folder / weights.SCHEDULER),
        zeros_for_empty=zeros_for_empty(folder, architecture),
        notes=notes,
        **call.settings(architecture, denoiser.config, folder),
    )


def list_files(folder: Path) -> list[str]:
    """Return the names of the files in a model's folder and one level below."""
    paths = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def tokenizers(folder: Path, architecture: Architecture) -> list[Any]:
    """Load the tokenizer of each text encoder.

    Raises:
        ExportError: one cannot be read.
    """
    loaded = []
    for name in architecture.tokenizers:
        with weights.reading(folder / name):
            loaded.append(AutoTokenizer.from_pretrained(folder / name, use_fast=True, local_files_only=True))
    return loaded


def zeros_for_empty(folder: Path, architecture: Architecture) -> bool:
    """Return whether ε_0 is of zeros instead of the empty prompt's states; left out, pipelines take it for true."""
    if not architecture.zeros_for_empty:
        return False
    path = folder / weights.INDEX
    return bool((weights.read_json(path) if path.is_file() else {}).get("force_zeros_for_empty_prompt", True))


def check_kinds(folder: Path, architecture: Architecture) -> None:
    """Refuse modules that the classes which are to read them do not describe; the libraries would only warn.

    Raises:
        ExportError: the denoiser or a text encoder is not the family's.
    """
    told: list[tuple[str, str, tuple[str, ...]]] = [
        (architecture.denoiser.folder, "_class_name", (architecture.denoiser.reader,))
    ]
    told += [(encoder.folder, "model_type", encoder.kinds) for encoder in architecture.encoders]
    for part, entry, kinds in told:
        kind = weights.read_json(folder / part / "config.json").get(entry)
        if kind not in kinds:
            families = listed([row.name for row in ARCHITECTURES], "and")
            raise ExportError(f"{folder / part} is a {kind}: memedge exports {families}.")


def _module(
    folder: Path, part: str, reader: Any, names: list[str], allow_pickle: bool, progress: Callable[[str], None]
) -> torch.nn.Module:
    chosen = weights.weights(part, names, str(folder), allow_pickle)
    if chosen.variant:
        progress(f"reading {part} from its {chosen.variant} weights: it has no others")
    index = next((name for name in chosen.files if name.endswith(".json")), None)
    shards = [name for name in chosen.files if name != index]
    if index:
        mapped = set(weights.read_json(folder / index).get("weight_map", {}).values())
        if mapped != {Path(name).name for name in shards}:
            raise ExportError(f"{folder / index} names other files than those beside it: get the model again.")
    for name in shards:
        weights.check_not_pointer(folder / name)
    with weights.reading(folder / part):
        module, info = reader.from_pretrained(
            folder / part,
            torch_dtype=torch.float32,
            variant=chosen.variant,
            use_safetensors=not chosen.pickled,
            local_files_only=True,
            output_loading_info=True,
        )
    # The libraries fill what is missing with random numbers, and drop what they do not know.
    unknown = list(info["unexpected_keys"]) if part in weights.DENOISERS else []
    for wrong, verb in ((list(info["missing_keys"]), "lack"), (unknown, "hold")):
        if wrong:
            raise ExportError(
                f"The weights in {folder / part} {verb} {sorted(wrong)[0]}, unlike its config.json: get it again."
            )
    loaded: torch.nn.Module = module.eval().requires_grad_(False)
    return loaded
