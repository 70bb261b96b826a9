"""A small Flux.1 with random weights, in the public layout of dev or of schnell.

    python bench/transformers/flux.py dev|schnell FOLDER

Thinner and fewer layers, and tokenizers with small vocabularies; nothing of its pictures means anything.
"""

import argparse
from pathlib import Path

import small
import torch
from diffusers import FluxTransformer2DModel

SMALL = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "pooled_projection_dim": small.CLIP_WIDTH,
    "axes_dims_rope": (4, 14, 14),
}
SHIFTS = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}


def build(folder: Path, seed: int = 0, *, name: str = "dev") -> Path:
    """Write the pipeline `name`, dev or schnell, and return its folder."""
    torch.manual_seed(seed)
    small.write_clip(folder, "", small.CLIP_L, small.vocabularies.END, projection=False)
    small.write_t5(folder, "_2", SMALL["joint_attention_dim"])
    transformer = FluxTransformer2DModel(**SMALL, guidance_embeds=name == "dev")
    small.raise_guidance(transformer, 8)
    transformer.save_pretrained(folder / "transformer")
    small.write_vae(folder, 0.3611, 0.1159)
    dev = name == "dev"
    small.write_scheduler(folder, shift=3.0 if dev else 1.0, use_dynamic_shifting=dev, **SHIFTS)
    components = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "T5EncoderModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "T5TokenizerFast"),
        "transformer": ("diffusers", "FluxTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    small.write_index(folder, "FluxPipeline", components)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("dev", "schnell"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    build(arguments.folder, name=arguments.name)
