"""A single file in the original layout (ldm, sgm), read by diffusers' own loader."""

from collections.abc import Callable, Collection
from pathlib import Path

import diffusers
import torch
from safetensors import safe_open

from memedge.engine.directory import sha256
from memedge.engine.errors import ExportError
from memedge.export.sources import folder, hub, weights
from memedge.export.sources.architectures import ARCHITECTURES, Architecture, SingleFile
from memedge.export.sources.call import AS_PUBLISHED, Call
from memedge.export.sources.check_traits import check_folder, check_tensors
from memedge.export.sources.parts import Parts, hash_of
from memedge.wording import listed

SUFFIXES = (".safetensors", *weights.PICKLES)
UNET = "model.diffusion_model."
REFINER = "conditioner.embedders.0.model.text_projection"  # a tensor that SDXL's refiner alone has


def load(
    path: Path,
    config: str | None,
    allow_pickle: bool,
    progress: Callable[[str], None],
    call: Call = AS_PUBLISHED,
) -> Parts:
    """Load UNet and text encoders of a file in fp32; all else comes from `config`, a folder or hub id.

    Raises:
        ExportError: the file is no such checkpoint or a pickle that is not allowed; its configuration is not said, not
            found, or does not fit.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ExportError(f"{path} is no checkpoint: memedge reads .safetensors files, and .ckpt with --allow-pickle.")
    if weights.is_pickle(path) and not allow_pickle:
        raise weights.pickle_refused(f"{path}", "there is one")
    weights.check_not_pointer(path)
    with weights.reading(path):
        names, metadata = _header(path)
    architecture, layout = _layout(path, names)
    model = _configuration(path, layout, config, progress)
    files = weights.settings(folder.list_files(model), str(model))
    pipeline_class = weights.read_json(model / weights.INDEX).get("_class_name") if weights.INDEX in files else None
    if pipeline_class != architecture.pipeline:
        kind = pipeline_class or "model of unknown kind, without model_index.json"
        raise ExportError(f"{config or model} is a {kind}, {path} is not: give a config that fits it.")
    scheduler = weights.read_json(model / weights.SCHEDULER)
    folder.check_kinds(model, architecture)
    notes = check_folder(model, architecture) + check_tensors(path, names, metadata, scheduler)
    count, expected = sum(name.startswith(UNET) for name in names), _tensors(model)
    if count != expected:  # each layout has them one by one; the loader drops what it has no place for
        raise ExportError(
            f"{path} holds {count} tensors of a UNet and its config describes {expected}: the file is incomplete, or "
            "the config of another architecture."
        )
    with weights.reading(path):
        unwanted = ("vae", "scheduler", "feature_extractor", "image_encoder", *architecture.tokenizers)
        pipeline = getattr(diffusers, architecture.pipeline).from_single_file(
            str(path),
            config=str(model),
            torch_dtype=torch.float32,
            local_files_only=True,
            **dict.fromkeys(unwanted),
        )
    modules = {part: getattr(pipeline, part).eval().requires_grad_(False) for part in architecture.modules}
    for part, module in modules.items():
        # The loader leaves what the file lacks without values.
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                raise ExportError(
                    f"{path} lacks {name} of the {part}: it is incomplete, or its config of another model."
                )
    hashes = [(path.name, sha256(path)), *((name, sha256(model / name)) for name in files)]
    denoiser, *text_encoders = modules.values()
    return Parts(
        id=path.name,
        sha256=hash_of(hashes),
        architecture=architecture,
        denoiser=denoiser,
        text_encoders=text_encoders,
        tokenizers=folder.tokenizers(model, architecture),
        scheduler=scheduler,
        zeros_for_empty=folder.zeros_for_empty(model, architecture),
        notes=notes,
        **call.settings(architecture, denoiser.config, model),
    )


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes of a file's tensors and its metadata, without reading more than that needs."""
    if not weights.is_pickle(path):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}, file.metadata() or {}
    content = torch.load(path, map_location="meta", weights_only=True)
    while "state_dict" in content:
        content = content["state_dict"]
    return {name: tuple(getattr(value, "shape", ())) for name, value in content.items()}, {}


def _tensors(model: Path) -> int:
    """Return how many tensors the UNet has that is configured in a folder."""
    with weights.reading(model / "unet" / "config.json"), torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(weights.read_json(model / "unet" / "config.json"))
        return len(unet.state_dict())


def _layout(path: Path, names: Collection[str]) -> tuple[Architecture, SingleFile]:
    """Return the family and the layout of a file with these tensors."""
    if not any(name.startswith(UNET) for name in names):
        raise ExportError(f"{path} holds no UNet in the original layout ({UNET}*): give a whole checkpoint.")
    if REFINER in names:
        raise ExportError(f"{path} is SDXL's refiner, which continues images of another model: give a base model.")
    layouts = [(architecture, layout) for architecture in ARCHITECTURES for layout in architecture.single_files]
    for architecture, layout in layouts:
        if layout.marker in names:
            return architecture, layout
    known = listed([layout.name for _, layout in layouts], "or")
    raise ExportError(f"{path} holds no text encoder of {known}: give a whole checkpoint of these.")


def _configuration(path: Path, layout: SingleFile, config: str | None, progress: Callable[[str], None]) -> Path:
    """Return the folder of the configurations and tokenizers, downloaded where it is not one."""
    source = config or layout.config
    if source is None:
        raise ExportError(
            f"{path} is of {layout.name}, whose files do not say if they predict noise (512) or velocities (768): say "
            "it with --config and the folder or hub id of a model that predicts the same."
        )
    if Path(source).is_dir():
        return Path(source)
    if not hub.ID.fullmatch(source):
        raise ExportError(f"There is no config {source}: give the folder or hub id of a diffusers-format model.")
    try:
        return hub.download(source, None, lambda names, _kind: weights.settings(names, source), progress)
    except ExportError as error:
        if config is not None:
            raise
        raise ExportError(
            f"{path} needs the configurations and tokenizers of {source} (or --config with the folder of a model of "
            f"the same architecture): {error}"
        ) from error
