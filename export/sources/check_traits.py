"""Refuses checkpoints that say they are another model than the one that would be exported (traits.py)."""

import inspect
import json
import re
from collections.abc import Mapping
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from memedge.engine.errors import ExportError
from memedge.export.sources import traits
from memedge.export.sources.architectures import ARCHITECTURES, Architecture
from memedge.export.sources.weights import INDEX, SCHEDULER, read_json
from memedge.wording import counted, listed

NOTHING: tuple[object, ...] = (None, False, "", [], {})  # a field that is off, whatever it is
OLD_VERSION, OLD_SIZE = (0, 9), 64  # of an older diffusers, pipelines take a smaller sample_size for this


def check_folder(folder: Path, architecture: Architecture) -> tuple[str, ...]:
    """Check all configurations of a model; return what is to be noted, in sentences.

    Raises:
        ExportError: one says that the model is not a text-to-image model as memedge exports it.
    """
    if (folder / INDEX).is_file():
        row = check_index(folder / INDEX, str(folder))
        if row is not None and row.name != architecture.name:
            raise ExportError(
                f"{folder / INDEX} is of {row.name}, and the text encoders beside it are those of {architecture.name}: "
                "a part is missing, so get it again."
            )
    for part in architecture.modules:
        if (adapter := folder / part / "adapter_config.json").is_file():
            raise ExportError(f"{adapter} adds an adapter to the weights: take it out to export them as they are.")
    denoiser = architecture.denoiser
    file = folder / denoiser.folder / "config.json"
    if denoiser.flow:
        config = read_json(file)
        notes = _check_fields(file, config, traits.TRANSFORMERS[denoiser.reader], "diffusers", denoiser.reader)
        _check_channels(file, "transformer", config, denoiser.packed)
        notes += _check_flow_scheduler(folder / SCHEDULER)
    else:
        notes = _check_unet(file) + _check_scheduler(folder / SCHEDULER)
    for encoder in architecture.encoders:
        file = folder / encoder.folder / "config.json"
        if file.is_file():  # Optimum's graphs do without
            config = read_json(file)
            text = config.get("text_config")  # of a whole CLIP's
            config |= text if isinstance(text, dict) else {}
            notes += _check_fields(file, config, traits.TEXT_ENCODERS[encoder.config], "transformers", encoder.config)
    return tuple(notes)


def check_index(path: Path, model: str) -> Architecture | None:
    """Return the family of a model_index.json; None: it doesn't say. `model` is what the messages call the model.

    Raises:
        ExportError: it is that of another family's pipeline, or has parts that its family has not.
    """
    index = read_json(path)
    kind = index.pop("_class_name", None)
    rows = [row for row in ARCHITECTURES if kind in (row.pipeline, *row.same_pipelines)]
    if kind is not None and not rows:
        families = listed([row.name for row in ARCHITECTURES], "and")
        shown = kind if isinstance(kind, str) else json.dumps(kind)
        raise ExportError(f"{model} is a {shown}, as its {INDEX} says: memedge exports {families}.")
    classes: dict[str, tuple[str, ...]] = {"scheduler": traits.SCHEDULERS}
    for row in rows or [row for row in ARCHITECTURES if not row.denoiser.flow]:
        classes[row.denoiser.folder] = (row.denoiser.reader,)
        if row.denoiser.flow:
            classes["scheduler"] = traits.FLOW_SCHEDULERS
        classes |= {encoder.folder: (encoder.reader,) for encoder in row.encoders}
        classes |= dict.fromkeys(row.tokenizers, ())
    options = {}
    for name, value in index.items():
        if not isinstance(value, list):
            options[name] = value
            continue
        own = str(value[-1]) if value and value[-1] is not None else ""
        if own and name not in classes and name not in traits.PIPELINE.known:
            raise ExportError(
                f"{path} has a {name} ({own}), which memedge does not export: take it out if pictures are to be made "
                "without it."
            )
        # Of the ONNX pipelines, the classes say no more than that it is a graph.
        if own and classes.get(name) and own not in classes[name] and not own.startswith(("ORT", "Onnx")):
            raise ExportError(f"{path} has a {name} of class {own}: memedge exports a {classes[name][0]}.")
    _check_fields(path, options, traits.PIPELINE, "diffusers", rows[0].pipeline if rows else None)
    return rows[0] if rows else None


def check_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], scheduler: Mapping[str, Any]
) -> tuple[str, ...]:
    """Check the names of a single file's tensors, and its header; return what is to be noted, in sentences.

    Args:
        path: of the file, for the messages.
        shapes: of all tensors.
        metadata: of the file's header.
        scheduler: the configuration that it is to be read with.

    Raises:
        ExportError: they say that the model was trained in another way, or are unknown and may say so.
    """
    said = {f"the tensor {name}": told for name, told in traits.MARKERS.items() if name in shapes}
    if prediction := metadata.get("modelspec.prediction_type"):
        said[f"modelspec.prediction_type {prediction!r} in its header"] = (
            "prediction_type",
            traits.PREDICTIONS.get(prediction, prediction),
        )
    for source, (field, value) in said.items():
        own = scheduler.get(field) or ("epsilon" if field == "prediction_type" else False)
        if own != value:
            raise ExportError(
                f"{path} has {source}, and {SCHEDULER} of its config has {field} {json.dumps(own)}: give the --config "
                f"of a model where it is {json.dumps(value)}."
            )
    left = []
    for name, shape in shapes.items():
        if name in traits.BUFFERS or name in traits.MARKERS or name.startswith(traits.PARTS):
            continue
        for start, meaning in traits.FOREIGN_TENSORS.items():
            if name.startswith(start):
                raise ExportError(
                    f"{path} has the tensor {name}, so {meaning}: memedge exports models of betas that take a prompt."
                )
        if prod(shape) <= traits.LARGEST_MARKER:
            raise ExportError(
                f"{path} has the tensor {name}, which may say how it was trained, and which memedge does not know: "
                "take it out if the model is an ordinary one."
            )
        left.append(name)
    return (f"{counted(len(left), 'tensor')} of {path.name} left out, such as {left[0]}.",) if left else ()


def _check_unet(file: Path) -> list[str]:
    config = read_json(file)
    notes = _check_fields(file, config, traits.UNET, "diffusers", "UNet2DConditionModel")
    channels, out = config.get("in_channels", 4), config.get("out_channels", 4)
    if isinstance(channels, int) and out == 2 * channels:
        raise ExportError(
            f"{file} has out_channels {out}, so its UNet predicts a variance, too: memedge exports models where it is "
            f"in_channels, {channels}."
        )
    _check_channels(file, "UNet", {"in_channels": channels, "out_channels": out})
    size = config.get("sample_size")
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ExportError(
            f"{file} has sample_size {json.dumps(size)}: write the size there that the model was trained for, in "
            "latent pixels, such as 64."
        )
    version = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version")))
    if isinstance(size, int) and size < OLD_SIZE and version and tuple(map(int, version.groups())) < OLD_VERSION:
        raise ExportError(
            f"{file} has sample_size {size}, which pipelines take for {OLD_SIZE}, because diffusers {version[0]} wrote "
            f"it: write {OLD_SIZE} there, or take _diffusers_version out if it is {size}."
        )
    return notes


def _check_channels(file: Path, network: str, config: Mapping[str, Any], packed: int = 1) -> None:
    channels, out = config.get("in_channels"), config.get("out_channels")
    out = packed * out if isinstance(out, int) else out
    if out != channels and not (network == "transformer" and out is None):  # then it is in_channels
        raise ExportError(
            f"The {network} of {file} takes {channels} channels and gives {out}: inpainting and image-to-image models "
            "need a picture beside the prompt; export the text-to-image model."
        )


def _check_scheduler(file: Path) -> list[str]:
    config = read_json(file)
    kind = config.get("_class_name")
    if kind is not None and kind not in traits.SCHEDULERS:
        raise ExportError(
            f"{file} is of {kind}, which has no betas that memedge knows: export a model trained on DDIM's noise."
        )
    notes = _check_fields(file, config, traits.SCHEDULER, "diffusers", kind)
    if kind in traits.DISTILLED:
        notes.append(
            f"{kind} is for models that were distilled to few steps: what was published of detectors is of others."
        )
    return notes


def _check_flow_scheduler(file: Path) -> list[str]:
    config = read_json(file)
    kind = config.get("_class_name")
    if kind not in traits.FLOW_SCHEDULERS:
        known = listed(list(traits.FLOW_SCHEDULERS), "or")
        raise ExportError(f"{file} is of {kind}: memedge knows transformers that were trained for {known}.")
    return _check_fields(file, config, traits.FLOW_SCHEDULER, "diffusers", kind)


def _check_fields(
    file: Path, config: Mapping[str, Any], table: traits.Table, library: str, kind: str | None
) -> list[str]:
    """Check a configuration by its table; what the table lacks passes with the default of the library's class."""
    notes = []
    for name, value in config.items():
        trait = table.traits.get(name)
        if trait is None:
            if name in table.known or value in NOTHING:
                continue
            defaults = _defaults(library, kind)
            if name not in defaults:
                if table.strict:
                    raise ExportError(
                        f"{file} has {name} {json.dumps(value)}, which neither memedge nor the installed {library} "
                        "knows: take it out if the model is an ordinary one."
                    )
                notes.append(f"{file.name} has {name}, which nobody knows here: it was left out.")
                continue
            trait = traits.Trait((defaults[name],), "it is of a kind that memedge does not know")
        values = value if isinstance(value, list) and value not in trait.allowed else [value]
        if not all(one in trait.allowed for one in values):
            allowed = [json.dumps(one) for one in trait.allowed]
            shown = listed(allowed, "or")
            raise ExportError(
                f"{file} has {name} {json.dumps(value)}, so {trait.meaning}: memedge exports models where it is "
                f"{shown}."
            )
    return notes


def _defaults(library: str, kind: str | None) -> dict[str, Any]:
    """Return the defaults of a class's arguments as JSON has them; none of a class that the library does not have."""
    found = getattr(import_module(library), kind, None) if kind else None  # not above: hubs are asked without torch
    if found is None:
        return {}
    parameters = inspect.signature(found.__init__).parameters.values()
    values = {one.name: one.default for one in parameters if one.default is not one.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
