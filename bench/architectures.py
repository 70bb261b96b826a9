"""Checkpoints with random weights, of the architectures and file layouts of the real ones, for benches and tests.

    python bench/architectures.py NAME FOLDER [--full]

NAME is sd1 (Stable Diffusion 1.x), sd2, sd2-768 (v-prediction), realistic-vision or sdxl. With --full the models have
the public configurations' sizes (SD 1.4: 4 GB of disk), without it the same structure with thinner and fewer layers and
smaller pictures. There is no CLIP vocabulary here: the tokenizer is the embedded model's. What a cost or an agreement
depends on is all there; nothing else of such a model means anything.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

EMOJI = Path(__file__).parent / "tiny" / "emoji"
TOKENS = 77
END = "<|endoftext|>"
PUBLISHED_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
OPEN_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,  # of 24: the states are the last but one layer's
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
OPEN_CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Architecture:
    """A public configuration, and how it is made small.

    unet, small_unet: UNet2DConditionModel's, and what replaces it in the small one. text: a text encoder's each.
    padding: a tokenizer's each. scheduler: scheduler_config.json.
    """

    unet: dict[str, Any]
    small_unet: dict[str, Any]
    text: tuple[dict[str, Any], ...]
    padding: tuple[str, ...]
    scheduler: dict[str, Any]


_SD1_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD2_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_THIN = {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1, "cross_attention_dim": 32}
_SD1 = Architecture(
    unet=_SD1_UNET,
    small_unet={**_THIN, "sample_size": 16},
    text=(CLIP_L,),
    padding=(END,),
    scheduler={"_class_name": "PNDMScheduler", **PUBLISHED_BETAS, "skip_prk_steps": True, "set_alpha_to_one": False},
)
ARCHITECTURES = {
    "sd1": _SD1,
    "sd2": Architecture(
        unet=_SD2_UNET,
        small_unet={**_THIN, "sample_size": 16, "attention_head_dim": [1, 2, 4, 4]},
        text=(OPEN_CLIP_H,),
        padding=("!",),
        scheduler={"_class_name": "PNDMScheduler", **PUBLISHED_BETAS, "skip_prk_steps": True},
    ),
    "sd2-768": Architecture(
        unet={**_SD2_UNET, "sample_size": 96, "upcast_attention": True},
        small_unet={**_THIN, "sample_size": 24, "attention_head_dim": [1, 2, 4, 4]},
        text=(OPEN_CLIP_H,),
        padding=("!",),
        scheduler={"_class_name": "DDIMScheduler", **PUBLISHED_BETAS, "prediction_type": "v_prediction"},
    ),
    "realistic-vision": Architecture(
        unet=_SD1.unet,
        small_unet=_SD1.small_unet,
        text=_SD1.text,
        padding=_SD1.padding,
        scheduler={"_class_name": "DPMSolverMultistepScheduler", **PUBLISHED_BETAS, "algorithm_type": "dpmsolver++"},
    ),
    "sdxl": Architecture(
        unet=_SDXL_UNET,
        small_unet={
            "sample_size": 16,
            "block_out_channels": [32, 64, 64],
            "layers_per_block": 1,
            "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [1, 2, 4],
            "cross_attention_dim": 32 + 48,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 40 + 6 * 8,
        },
        text=(CLIP_L, OPEN_CLIP_BIG_G),
        padding=(END, "!"),
        scheduler={"_class_name": "EulerDiscreteScheduler", **PUBLISHED_BETAS, "timestep_spacing": "leading"},
    ),
}
# Of the small pair, so that states and pooled states have widths of their own.
SMALL_SECOND_TEXT = {**SMALL_TEXT, "hidden_size": 48, "num_hidden_layers": 3, "projection_dim": 40}


def build(name: str, folder: Path, *, full: bool = False, seed: int = 0) -> Path:
    """Write the checkpoint `name` as a diffusers-format directory, and return the directory."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(seed)
    for number, (config, padding) in enumerate(zip(architecture.text, architecture.padding, strict=True)):
        suffix = f"_{number + 1}" if number else ""
        tokenizer = AutoTokenizer.from_pretrained(EMOJI / "tokenizer", model_max_length=TOKENS, pad_token=padding)
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        small = {} if full else {**(SMALL_SECOND_TEXT if number else SMALL_TEXT), "initializer_factor": 1.0}
        ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # as published, and not the tokenizer's
        kind = CLIPTextModel if len(architecture.text) == 1 or not number else CLIPTextModelWithProjection
        text = CLIPTextConfig(**{**config, **small}, vocab_size=49408, max_position_embeddings=TOKENS, **ids)
        kind(text).save_pretrained(folder / f"text_encoder{suffix}")
    unet = UNet2DConditionModel(**{**architecture.unet, **({} if full else architecture.small_unet)})
    if not full:
        _raise_guidance(unet)
    unet.save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(architecture.scheduler))
    pair = len(architecture.text) == 2
    index = {"_class_name": "StableDiffusionXLPipeline" if pair else "StableDiffusionPipeline"}
    if pair:
        index["force_zeros_for_empty_prompt"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _raise_guidance(unet: UNet2DConditionModel) -> None:
    """Let prompts move the prediction: as initialised they hardly do, and Δ would be all rounding."""
    with torch.no_grad():
        for module in unet.modules():
            if hasattr(module, "to_v"):
                module.to_v.weight.mul_(8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ARCHITECTURES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    build(arguments.name, arguments.folder, full=arguments.full)


if __name__ == "__main__":
    main()
