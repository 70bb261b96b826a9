"""Small modules that the families' pipelines share: text encoders, a VAE, and the files that name them all."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import vocabularies
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

CLIP_WIDTH = 32
CLIP_L = {"hidden_act": "quick_gelu", "hidden_size": CLIP_WIDTH, "num_hidden_layers": 2, "projection_dim": CLIP_WIDTH}
CLIP_G = {"hidden_act": "gelu", "hidden_size": 48, "num_hidden_layers": 3, "projection_dim": 40}
T5_XXL = {
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}


def write_clip(
    folder: Path,
    suffix: str,
    config: dict[str, Any],
    padding: str,
    projection: bool,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a text encoder of CLIP's kind and its tokenizer."""
    vocabularies.clip(folder / f"tokenizer{suffix}", padding)
    small = {"intermediate_size": 64, "num_attention_heads": 2, "initializer_factor": 1.0}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # as published, and not the tokenizer's
    text = CLIPTextConfig(**{**small, **config}, vocab_size=49408, max_position_embeddings=77, **ids)
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(text)
    model.to(dtype).save_pretrained(folder / f"text_encoder{suffix}")


def write_t5(folder: Path, suffix: str, width: int) -> None:
    """Write a T5 and its tokenizer."""
    tokens = vocabularies.t5(folder / f"tokenizer{suffix}")
    small = {"d_model": width, "d_ff": 96, "d_kv": 16, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
    config = T5Config(vocab_size=tokens + vocabularies.MORE_ROWS, **T5_XXL, **small)
    T5EncoderModel(config).save_pretrained(folder / f"text_encoder{suffix}")


def write_vae(folder: Path, scaling: float, shift: float) -> None:
    """Write a VAE of 16 channels, with 8 pixels to a latent pixel."""
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=2,
        layers_per_block=1,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=scaling,
        shift_factor=shift,
    ).save_pretrained(folder / "vae")


def write_index(folder: Path, kind: str, components: dict[str, tuple[str | None, str | None]], **more: Any) -> None:
    """Write model_index.json."""
    index = {"_class_name": kind, "_diffusers_version": "0.30.0", **components, **more}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def write_scheduler(folder: Path, **config: Any) -> None:
    """Write the configuration of the flow-matching sampler."""
    (folder / "scheduler").mkdir()
    content = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **config}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))


def raise_guidance(transformer: torch.nn.Module, factor: float) -> None:
    """Let prompts move the prediction: as initialised they hardly do, and Δ would be all rounding."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith(("add_v_proj.weight", "context_embedder.weight", "text_embedder.linear_1.weight")):
                parameter.mul_(factor)


def main(description: str | None, build: Callable[[Path], Path]) -> None:
    """Write a pipeline into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    build(parser.parse_args().folder)
