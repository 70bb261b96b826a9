"""LoRAs: low-rank changes of a checkpoint's weights, W + scale · alpha/rank · up · down, fused before all else."""

import inspect
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from memedge.engine.directory import sha256
from memedge.engine.errors import ExportError
from memedge.export.sources import weights
from memedge.export.sources.parts import Parts, hash_of

KNOWN = re.compile(r"(lora_down|lora_up|lora_A|lora_B|(lora|layer)\.(down|up))\.weight$|\.alpha$")
OTHER_KINDS = {  # by what names of tensors hold
    r"\.dora_scale$|lora_magnitude_vector": "a DoRA",
    r"\.hada_": "a LoHa",
    r"\.lokr_": "a LoKr",
    r"\.b?oft_": "an OFT",
    r"\.lora_mid\.": "a LoRA in Tucker's decomposition",
    r"\.[ab][12]\.weight$": "a GLoRA",
    r"\.on_input$": "an (IA)³",
    r"vera_lambda": "a VeRA",
    r"lora_embedding_[AB]": "a LoRA of token embeddings",
    r"\.[wb]_norm$": "LyCORIS norms",
    r"\.scalar$": "LyCORIS scalars",
    r"\.diff(_b)?$": "whole differences of weights",
    r"\.set_weight$": "whole weights",
    r"^bundle_emb\.": "bundled textual inversions",
    r"^(emb_params|string_to_param|clip_[lg]$)": "a textual inversion",
    r"\.(lora_B|lora_up)\.bias$": "biases",
    r"^lora_controlnet$": "a Control-LoRA",
    r"^(control_model\.|controlnet_)": "a ControlNet",
    r"^(ip_adapter|image_proj)\.": "an IP-Adapter",
}


@dataclass(frozen=True)
class Lora:
    """A file, and how strongly it is applied."""

    path: Path
    scale: float


def parse(text: str, allow_pickle: bool) -> Lora:
    """Read `FILE` or `FILE:scale`: what follows the last colon is a scale if it is a number.

    Raises:
        ExportError: there is no such file, it is a pickle and not allowed, or the scale is 0 or not finite.
    """
    name, colon, number = text.rpartition(":")
    try:
        path, scale = Path(name), float(number)
    except ValueError:
        colon = ""
    if not colon or not name:
        path, scale = Path(text), 1.0
    if not math.isfinite(scale) or scale == 0:
        raise ExportError(f"The scale of LoRA {path} is {scale:g}: give a number other than 0, such as 0.8.")
    if not path.is_file():
        raise ExportError(f"There is no LoRA file {path}: give a .safetensors file, or FILE:scale.")
    if weights.is_pickle(path):
        if not allow_pickle:
            raise weights.pickle_refused(f"{path}", "there is one")
    elif path.suffix.lower() != ".safetensors":
        raise ExportError(f"{path} is no LoRA: memedge reads .safetensors files.")
    return Lora(path, scale)


def fuse(parts: Parts, lora: Lora) -> None:
    """Add a LoRA to the weights of denoiser and text encoders, in place, and to the id and hash.

    Formats: diffusers' and PEFT's, and for UNets kohya's (lora_unet_*, with alphas). Text encoders are those of CLIP.

    Raises:
        ExportError: the file cannot be read, is not a LoRA, or does not fit the model in every layer. The parts may
            then hold some of it, and are not to be used.
    """
    path = lora.path
    with weights.reading(path):
        state = _read(path)
    for name in state:
        if kind := next((kind for mark, kind in OTHER_KINDS.items() if re.search(mark, name)), None):
            raise ExportError(
                f"{path} is not a plain LoRA, but holds {kind} ({name}): memedge fuses up and down matrices only."
            )
    layers = sum(name.endswith("down.weight") or "lora_A." in name for name in state)
    if not layers:
        raise ExportError(f"{path} is no LoRA: it holds no up and down matrices.")
    if unknown := next((name for name in state if not KNOWN.search(name)), None):
        raise ExportError(
            f"{path} is not a plain LoRA, but holds {unknown}, which memedge does not know: memedge fuses up and down "
            "matrices only."
        )
    kohya = next((name for name in state if name.startswith("lora_")), None)
    if kohya and parts.architecture.denoiser.flow:  # diffusers makes other layers of these, and leaves some out
        raise ExportError(
            f"{path} has kohya's names ({kohya}), which memedge reads for UNets alone: convert it to diffusers' names."
        )
    if parts.architecture.denoiser.flow:
        _check_widths(parts, state, path)
    folded = _fold_alphas(state)
    pipeline = _pipeline(parts)
    try:
        # diffusers finds PEFT's alphas in a file's header: it must open that itself.
        pipeline.load_lora_weights(state if folded or weights.is_pickle(path) else str(path), adapter_name="lora")
    except Exception as error:  # diffusers, peft and torch raise what they please for a key or shape that is not there
        raise ExportError(f"{path} does not fit {parts.id}: it is a LoRA for another architecture.") from error
    modules = parts.modules
    fitting = sum(isinstance(layer, BaseTunerLayer) for module in modules.values() for layer in module.modules())
    if fitting != layers:
        raise ExportError(
            f"{path} fits {parts.id} in {fitting} of its {layers} layers: it is a LoRA for another architecture."
        )
    for module in modules.values():
        module.float()  # a product of halves would be rounded to half
    fusing = [name for name in modules if name in pipeline._lora_loadable_modules]
    pipeline.fuse_lora(components=fusing, lora_scale=lora.scale)
    pipeline.unload_lora_weights()
    for module in modules.values():
        module.eval().requires_grad_(False)
    entry = f"{path.name}:{lora.scale:g}"
    parts.id += f" + {entry}"
    parts.sha256 = hash_of([("", parts.sha256), (entry, sha256(path))])


def _read(path: Path) -> dict[str, torch.Tensor]:
    weights.check_not_pointer(path)
    state: dict[str, Any]
    state = torch.load(path, map_location="cpu", weights_only=True) if weights.is_pickle(path) else load_file(path)
    return {name: tensor.float() for name, tensor in state.items()}


def _check_widths(parts: Parts, state: dict[str, torch.Tensor], path: Path) -> None:
    """Refuse a LoRA whose layers take more or less than the transformer's: diffusers would make those fit it."""
    layers = {f"{parts.architecture.denoiser.folder}.{name}": one for name, one in parts.denoiser.named_modules()}
    for name, down in state.items():
        layer = layers.get(name.removesuffix(".lora_A.weight"))
        if layer is not None and down.shape[1] != layer.in_features:
            raise ExportError(
                f"{path} is for a transformer whose {name.removesuffix('.lora_A.weight')} takes {down.shape[1]} "
                f"channels, and that of {parts.id} takes {layer.in_features}: it is a LoRA for another architecture, "
                "or takes a picture beside the prompt."
            )


def _fold_alphas(state: dict[str, torch.Tensor]) -> bool:
    """Multiply alpha/rank into the up matrices and drop the alphas; return whether there were any.

    diffusers gives attention layers the file's most frequent alpha where theirs differs.
    """
    alphas = [name for name in state if name.endswith(".alpha")]
    for name in alphas:
        alpha, stem = state.pop(name), name.removesuffix(".alpha")
        for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up")):
            if f"{stem}.{down}.weight" in state:
                state[f"{stem}.{up}.weight"] *= alpha / len(state[f"{stem}.{down}.weight"])
    return bool(alphas)


def _pipeline(parts: Parts) -> Any:
    """Return a pipeline of the parts, which knows how LoRAs name them; it makes no images, and has nothing else."""
    kind = getattr(diffusers, parts.architecture.pipeline)
    required = [p.name for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    return kind(**dict.fromkeys(required) | parts.modules)
