"""A diffusers-format checkpoint rewritten as a single file in the layout that its architecture was published in."""

import re
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from pipelines import Kind
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet_name(name: str, layers: int, attention: set[str]) -> str:
    """Return ldm's name for a tensor of the UNet: `layers` per block; `attention` are the up blocks that have it."""
    module, leaf = name.rsplit(".", 1)
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{leaf}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", module):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{inner(found[1], found[3])}.{leaf}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", module):
        down, block, kind, number = found[1] == "down", int(found[2]), found[3], int(found[4])
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{leaf}"
        if kind == "upsamplers":
            return f"output_blocks.{block * (layers + 1) + layers}.{2 if found[2] in attention else 1}.conv.{leaf}"
        place = f"input_blocks.{1 + block * (layers + 1) + number}"
        place = place if down else f"output_blocks.{block * (layers + 1) + number}"
        return f"{place}.{0 if kind == 'resnets' else 1}.{inner(kind, found[5])}.{leaf}"
    raise AssertionError(name)


def inner(kind: str, module: str) -> str:
    """Return ldm's name within a residual or attention block."""
    return RESNET[module] if kind == "resnets" else module


def original_unet(folder: Path) -> Tensors:
    """Return the UNet's tensors under ldm's names."""
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    layers = UNet2DConditionModel.load_config(folder / "unet")["layers_per_block"]
    attention = {name.split(".")[1] for name in state if re.match(r"up_blocks\.\d\.attentions", name)}
    return {f"model.diffusion_model.{unet_name(name, layers, attention)}": state[name] for name in state}


def bare(folder: Path) -> Tensors:
    """Return a text encoder's tensors, without the prefix that some of transformers' versions write."""
    return {name.removeprefix("text_model."): t for name, t in load_file(folder / "model.safetensors").items()}


def original_clip(folder: Path, prefix: str) -> Tensors:
    """Return a text encoder's tensors under the names of SD 1.x and SDXL's first, which are transformers' old ones."""
    positions = {f"{prefix}text_model.embeddings.position_ids": torch.arange(16)[None]}
    return positions | {f"{prefix}text_model.{name}": tensor for name, tensor in bare(folder).items()}


def original_open_clip(folder: Path, prefix: str, unused_layer: bool) -> Tensors:
    """Return a text encoder's tensors under OpenCLIP's names; SD 2's files have an `unused_layer` at the end."""
    state = bare(folder)
    width = state["final_layer_norm.weight"].shape[0]
    named = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
        "text_projection": state.pop("text_projection.weight", torch.eye(width)).T.contiguous(),
        "logit_scale": torch.ones(()),
    }
    count = 1 + max(int(name.split(".")[2]) for name in state)
    for layer in range(count):
        of = f"encoder.layers.{layer}."
        block = f"transformer.resblocks.{layer}."
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"{of}self_attn.{part}_proj.{leaf}") for part in "qkv"]
            named[f"{block}attn.in_proj_{leaf}"] = torch.cat(parts)
            for name, old in OPEN_CLIP.items():
                named[f"{block}{old}.{leaf}"] = state.pop(f"{of}{name}.{leaf}")
    assert not state
    if unused_layer:
        last = f"transformer.resblocks.{count - 1}."
        named |= {
            name.replace(last, f"transformer.resblocks.{count}."): torch.randn_like(tensor)
            for name, tensor in named.items()
            if name.startswith(last)
        }
    return {prefix + name: tensor for name, tensor in named.items()}


def original(folder: Path, kind: Kind) -> Tensors:
    """Return a checkpoint's tensors (no VAE) in its original layout."""
    state = original_unet(folder) | {"betas": torch.linspace(0, 1, 4)}
    if kind == "sd1":
        state |= original_clip(folder / "text_encoder", "cond_stage_model.transformer.")
    elif kind == "sd2":
        state |= original_open_clip(folder / "text_encoder", "cond_stage_model.model.", unused_layer=True)
    else:
        state |= original_clip(folder / "text_encoder", "conditioner.embedders.0.transformer.")
        state |= original_open_clip(folder / "text_encoder_2", "conditioner.embedders.1.model.", unused_layer=False)
    return state


def write_original(folder: Path, kind: Kind, file: Path) -> Path:
    """Write a diffusers-format checkpoint's single file."""
    save_file(original(folder, kind), file)
    return file
