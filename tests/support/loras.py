"""LoRA files as trainers write them, and what they make of weights: by definition, in float64."""

from pathlib import Path
from typing import Any

import torch
from original_layout import unet_name
from safetensors.torch import save_file

Changes = dict[tuple[str, str], torch.Tensor]  # (part, module's name) → float64 W + scale · alpha/rank · up · down
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "ff.net.0.proj")
CONVOLUTIONS = ("conv1", "conv2", "proj_in", "proj_out")  # proj_* are linear in SD 2 and SDXL


def targets(module: torch.nn.Module, convolutions: bool) -> dict[str, torch.nn.Module]:
    """Return the layers of a UNet or text encoder that a trainer would give a LoRA."""
    ends = LINEAR + (CONVOLUTIONS if convolutions else ())
    return {name: layer for name, layer in module.named_modules() if name.endswith(tuple(f".{end}" for end in ends))}


def matrices(layer: Any, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a random down and up matrix; of a convolution, down is a convolution of its size and up one of size 1."""
    if isinstance(layer, torch.nn.Linear):
        return torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank)
    return torch.randn(rank, layer.in_channels, *layer.kernel_size), torch.randn(layer.out_channels, rank, 1, 1)


def changed(layer: Any, down: torch.Tensor, up: torch.Tensor, factor: float) -> torch.Tensor:
    """Return W + factor · up · down in float64."""
    product = (up.double().flatten(1) @ down.double().flatten(1)).reshape(layer.weight.shape)
    return layer.weight.double() + factor * product


def original_name(part: str, name: str) -> str:
    """Return a layer's name in transformers' older modules, which LoRA files keep to."""
    return name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"


def sgm_name(unet: torch.nn.Module, name: str) -> str:
    """Return the original layout's name of a layer of the UNet."""
    attention = {str(i) for i, block in enumerate(unet.up_blocks) if hasattr(block, "attentions")}
    return unet_name(f"{name}.weight", unet.config.layers_per_block, attention).removesuffix(".weight")


def write_kohya(
    file: Path, modules: dict[str, Any], scale: float, dtype: torch.dtype = torch.float32, sgm: bool = False
) -> Changes:
    """Write kohya's format: underscores, alphas, ranks and alphas that differ from layer to layer; return the truth."""
    state, changes = {}, {}
    sdxl = "text_encoder_2" in modules
    for part, module in modules.items():
        prefix = "lora_te1_" if sdxl and part == "text_encoder" else PREFIXES[part]
        for i, (name, layer) in enumerate(targets(module, convolutions=True).items()):
            rank, alpha = 2 + i % 2, (1.0, 4.0, 1.0)[i % 3]
            down, up = (matrix.to(dtype) for matrix in matrices(layer, rank))
            old = sgm_name(module, name) if sgm and part == "unet" else original_name(part, name)
            stem = prefix + old.replace(".", "_")
            state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            state[f"{stem}.alpha"] = torch.tensor(alpha, dtype=dtype)
            changes[part, name] = changed(layer, down, up, scale * alpha / rank)
    save_file(state, file, metadata={"ss_network_module": "networks.lora"})
    return changes


def write_peft(file: Path, modules: dict[str, Any], scale: float, dtype: torch.dtype = torch.float32) -> Changes:
    """Write diffusers' and PEFT's format: dots, lora_A and lora_B, no alpha, which is then the rank."""
    state, changes = {}, {}
    for part, module in modules.items():
        for name, layer in targets(module, convolutions=False).items():
            down, up = (matrix.to(dtype) for matrix in matrices(layer, 3))
            stem = f"{part}.{original_name(part, name)}"
            state |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
            changes[part, name] = changed(layer, down, up, scale)
    save_file(state, file)
    return changes


def write_diffusers(file: Path, modules: dict[str, Any], scale: float, dtype: torch.dtype = torch.float32) -> Changes:
    """Write diffusers' format of 2023: attention layers only, by their processors; no alpha, which is then the rank."""
    state, changes = {}, {}
    processors = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}
    for part, module in modules.items():
        for name, layer in targets(module, convolutions=False).items():
            end = next(end for end in LINEAR if name.endswith(f".{end}"))
            if end in ("fc1", "fc2", "ff.net.0.proj"):
                continue
            down, up = (matrix.to(dtype) for matrix in matrices(layer, 3))
            attention = original_name(part, name).removesuffix(f".{end}")
            stem = f"{part}.{attention}{'.processor' if part == 'unet' else ''}.{processors.get(end, end)}_lora"
            state |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
            changes[part, name] = changed(layer, down, up, scale)
    save_file(state, file)
    return changes
