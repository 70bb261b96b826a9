"""Which files of a diffusers-format model are read; the names may be those of a folder or of a hub's listing."""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from memedge.engine.errors import ExportError
from memedge.export.sources.architectures import architecture_of

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
DENOISERS = ("unet", "transformer")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Weights:
    """One module's weights: a file, or an index and its shards."""

    files: tuple[str, ...]  # relative to the model's folder
    variant: str | None  # diffusers' name for other copies of the same weights: None or fp16
    pickled: bool


def settings(names: Collection[str], model: str, kind: object = None) -> list[str]:
    """Return the files that describe a model without its weights: configurations, tokenizers, noise schedule.

    `kind` is the pipeline's class, as model_index.json says.

    Raises:
        ExportError: one is missing; `model` is what the message calls the model.
    """
    folders = {name.split("/")[0] for name in names if "/" in name}
    architecture = architecture_of(names, kind)
    for part in (*architecture.modules, *architecture.tokenizers, "scheduler"):
        if part not in folders:
            files = sorted(name for name in names if "/" not in name and name.endswith((".safetensors", ".ckpt")))
            hint = f": if {files[0]} is a whole checkpoint, give that file" if len(files) == 1 else ""
            raise ExportError(f"{model} holds no {part} folder, so it is not a diffusers-format model{hint}.")
    required = [*(f"{part}/config.json" for part in architecture.modules), SCHEDULER]
    for name in required:
        if name not in names:
            raise ExportError(f"{model} holds no {name}: it is incomplete, so get it again.")
    optional = [INDEX, "vae/config.json"] if architecture.denoiser.flow else [INDEX]
    optional += [*(f"{folder}/{name}" for folder in architecture.tokenizers for name in TOKENIZER_FILES)]
    return [*required, *(name for name in optional if name in names)]


def weights(part: str, names: Collection[str], model: str, allow_pickle: bool) -> Weights:
    """Choose the weights of a module (a denoiser or a text encoder): .safetensors first, then full precision.

    Raises:
        ExportError: there are none, shards are missing, or there are only pickles and they are not allowed.
    """
    for pickled in (False, True):
        for variant in (None, "fp16"):
            if found := _find(part, names, model, variant, pickled):
                if pickled and not allow_pickle:
                    raise pickle_refused(f"{model} holds its {part} only as {found[0]}, which", "its author has one")
                return Weights(found, variant, pickled)
    raise ExportError(f"{model} holds no weights of {part} (.safetensors): it is incomplete, so get it again.")


def needed(names: Collection[str], model: str, allow_pickle: bool, kind: object = None) -> list[str]:
    """Return all files that are read of a diffusers-format model.

    Raises:
        ExportError: as `settings` and `weights`.
    """
    chosen = (weights(part, names, model, allow_pickle).files for part in architecture_of(names, kind).modules)
    return [*settings(names, model, kind), *(name for files in chosen for name in files)]


def pickle_refused(subject: str, where: str) -> ExportError:
    """Return the error for a pickle that was not allowed."""
    return ExportError(
        f"{subject} is a pickle and can run code of its author when it is read: use a .safetensors file, if {where}, "
        "or give --allow-pickle if you trust the author."
    )


def is_pickle(path: PurePath) -> bool:
    """Whether a weights file is a pickle, by its name: what reads it goes by the name, too."""
    return path.suffix.lower() in PICKLES


@contextmanager
def reading(subject: object) -> Iterator[None]:
    """Turn whatever the model libraries raise for a file that they cannot read into one sentence.

    Raises:
        ExportError: in place of any exception but an ExportError.
    """
    try:
        yield
    except ExportError:
        raise
    except Exception as error:  # diffusers, transformers, safetensors and torch raise what they please
        raise ExportError(f"{subject} cannot be loaded ({reason(error)}): check that it is complete.") from error


def kind_of(folder: Path) -> object:
    """Return the class of a folder's pipeline as model_index.json says; None: it doesn't, or isn't there."""
    path = folder / INDEX
    return read_json(path).get("_class_name") if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a configuration file.

    Raises:
        ExportError: it holds none.
    """
    with reading(path):
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError("no JSON object")
    return content


def reason(error: Exception) -> str:
    """Return the first sentence of what a library says; the rest is advice to people who call it."""
    text = str(error).strip()
    return text.splitlines()[0].split(". ")[0].rstrip(".:") if text else type(error).__name__


def check_not_pointer(path: Path) -> None:
    """Refuse what git leaves in place of a large file.

    Raises:
        ExportError: the file is a git-lfs pointer.
    """
    with path.open("rb") as file:
        if file.read(16) == b"version https://":
            raise ExportError(f"{path} is a git-lfs pointer instead of weights: run `git lfs pull` in its folder.")


def _find(part: str, names: Collection[str], model: str, variant: str | None, pickled: bool) -> tuple[str, ...] | None:
    """Return one module's file, or its index and shards, in the names' two libraries' spelling."""
    suffix = "bin" if pickled else "safetensors"
    stem = "diffusion_pytorch_model" if part in DENOISERS else "pytorch_model" if pickled else "model"
    dotted = f".{variant}" if variant else ""
    file, index = f"{part}/{stem}{dotted}.{suffix}", f"{part}/{stem}.{suffix}.index{dotted}.json"
    # Where there are both, diffusers reads the shards and transformers the file; so must we, whose hash names them.
    if file in names and (part not in DENOISERS or index not in names):
        return (file,)
    if index not in names:
        return None
    number = r"-(\d{5})-of-(\d{5})"
    pattern = re.compile(
        rf"{re.escape(f'{part}/{stem}')}({re.escape(dotted)}{number}|{number}{re.escape(dotted)})\.{suffix}"
    )
    shards = sorted(name for name in names if pattern.fullmatch(name))
    if not shards or len(shards) != int(re.findall(r"-of-(\d{5})", shards[0])[0]):
        raise ExportError(f"{model} lacks shards of {index}: it is incomplete, so get it again.")
    return (index, *shards)
