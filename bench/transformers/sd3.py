"""A small Stable Diffusion 3.5 with random weights, in the public layout of its medium size.

    python bench/transformers/sd3.py FOLDER

Thinner and fewer layers, smaller pictures, and tokenizers with small vocabularies; nothing of its pictures means
anything.
"""

import argparse
from pathlib import Path

import small
import torch
from diffusers import SD3Transformer2DModel

PUBLISHED = {  # but for its sizes
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "qk_norm": "rms_norm",
}
SMALL = {
    "sample_size": 16,
    "pos_embed_max_size": 24,
    "num_layers": 2,
    "dual_attention_layers": (0,),  # of 24: the first 13
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "caption_projection_dim": 64,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 32 + 40,
}


def build(folder: Path, seed: int = 0, *, t5: bool = True, medium: bool = True) -> Path:
    """Write the pipeline, and return its folder.

    Args:
        folder: for it.
        seed: of its weights.
        t5: with its third text encoder, which pipelines may do without.
        medium: as 3.5's medium size; else as 3.0's, without norms of keys and queries, and without dual attention.
    """
    torch.manual_seed(seed)
    small.write_clip(folder, "", small.CLIP_L, small.vocabularies.END, projection=True)
    small.write_clip(folder, "_2", small.CLIP_G, "!", projection=True)
    if t5:
        small.write_t5(folder, "_3", SMALL["joint_attention_dim"])
    config = {**PUBLISHED, **SMALL} | ({} if medium else {"qk_norm": None, "dual_attention_layers": ()})
    transformer = SD3Transformer2DModel(**config)
    small.raise_guidance(transformer, 8)
    transformer.save_pretrained(folder / "transformer")
    small.write_vae(folder, 1.5305, 0.0609)
    small.write_scheduler(folder, shift=3.0)
    third = ("transformers", "T5EncoderModel"), ("transformers", "T5TokenizerFast")
    components = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "text_encoder_3": third[0] if t5 else (None, None),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "tokenizer_3": third[1] if t5 else (None, None),
        "transformer": ("diffusers", "SD3Transformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    small.write_index(folder, "StableDiffusion3Pipeline", components)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    build(parser.parse_args().folder)
