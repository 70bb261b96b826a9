"""Randomly initialised pipelines of each architecture, in diffusers' format: true in their layout, tiny in width."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from models import make_tokenizer, raise_guidance, text_config
from transformers import CLIPTextModel, CLIPTextModelWithProjection

Kind = Literal["sd1", "sd2", "sdxl"]
# What differs between them, as in the published configurations.
UNETS: dict[Kind, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
    },
    "sd2": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 32,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 24 + 32,
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
}
SUFFIXES: dict[Kind, tuple[str, ...]] = {"sd1": ("",), "sd2": ("",), "sdxl": ("", "_2")}
LAYERS = {"sd1": 2, "sd2": 23, "sdxl": 2}  # SD 2 takes the 24-layer OpenCLIP's last but one


def text_encoder(kind: Kind, second: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """One text encoder; SDXL's second is wider, with a projection, and OpenCLIP's, as SD 2's only one is."""
    width = 32 if second or kind == "sd2" else 24
    config = text_config(
        width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=LAYERS[kind],
        hidden_act="gelu" if second or kind == "sd2" else "quick_gelu",
    )
    return (CLIPTextModelWithProjection if second else CLIPTextModel)(config)


def index(kind: Kind) -> dict[str, Any]:
    """Return the model_index.json of a pipeline, whose VAE is not there."""
    encoders = {"": "CLIPTextModel", "_2": "CLIPTextModelWithProjection"}
    return {
        "_class_name": "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        **{f"text_encoder{suffix}": ["transformers", encoders[suffix]] for suffix in SUFFIXES[kind]},
        **{f"tokenizer{suffix}": ["transformers", "CLIPTokenizer"] for suffix in SUFFIXES[kind]},
        **({"force_zeros_for_empty_prompt": True} if kind == "sdxl" else {"safety_checker": [None, None]}),
    }


def make(folder: Path, kind: Kind, prediction_type: str = "epsilon", dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint, with the model_index.json of its pipeline, to `folder`."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8}
    unet = UNet2DConditionModel(**sizes, **UNETS[kind])
    raise_guidance(unet)
    unet.to(dtype=dtype).save_pretrained(folder / "unet")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    ).save_pretrained(folder / "scheduler")
    for suffix in SUFFIXES[kind]:
        text_encoder(kind, second=bool(suffix)).to(dtype).save_pretrained(folder / f"text_encoder{suffix}")
        make_tokenizer().save_pretrained(folder / f"tokenizer{suffix}")
    (folder / "model_index.json").write_text(json.dumps(index(kind)))
    return folder
