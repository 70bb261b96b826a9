"""A Stable Diffusion 3.5 with random weights, in the public layout of its medium size.

    python bench/transformers/sd3.py FOLDER [--full]

Thinner and fewer layers, smaller pictures, and tokenizers with small vocabularies; nothing of its pictures means
anything. With --full it has the published sizes, but for T5, which it comes without: 6 GB of disk, in bf16.
"""

import argparse
import sys
from pathlib import Path

import small
import torch
from diffusers import SD3Transformer2DModel

sys.path.append(str(Path(__file__).parents[1]))

from architectures import CLIP_L, OPEN_CLIP_BIG_G

PUBLISHED = {  # but for its sizes
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "qk_norm": "rms_norm",
}
MEDIUM = {
    "sample_size": 128,
    "pos_embed_max_size": 384,
    "num_layers": 24,
    "dual_attention_layers": tuple(range(13)),
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
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


def build(folder: Path, seed: int = 0, *, t5: bool = True, medium: bool = True, full: bool = False) -> Path:
    """Write the pipeline, and return its folder.

    Args:
        folder: for it.
        seed: of its weights.
        t5: with its third text encoder, which pipelines may do without.
        medium: as 3.5's medium size; else as 3.0's, without norms of keys and queries, and without dual attention.
        full: of the published sizes, in bf16.
    """
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if full else torch.float32
    clips = (CLIP_L, OPEN_CLIP_BIG_G) if full else (small.CLIP_L, small.CLIP_G)
    small.write_clip(folder, "", clips[0], small.vocabularies.END, projection=True, dtype=dtype)
    small.write_clip(folder, "_2", clips[1], "!", projection=True, dtype=dtype)
    if t5:
        small.write_t5(folder, "_3", SMALL["joint_attention_dim"])
    config = {**PUBLISHED, **(MEDIUM if full else SMALL)}
    config |= {} if medium else {"qk_norm": None, "dual_attention_layers": ()}
    transformer = SD3Transformer2DModel(**config).to(dtype)
    small.raise_guidance(transformer, 8)
    transformer.save_pretrained(folder / "transformer")
    del transformer
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
    parser.add_argument("--full", action="store_true")
    arguments = parser.parse_args()
    build(arguments.folder, t5=not arguments.full, full=arguments.full)
