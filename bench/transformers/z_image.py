"""A small random Z-Image in the public model's layout: a pipeline's whole directory.

    python bench/transformers/z_image.py FOLDER

Turbo is the same with a scheduler of its own (shift 3) and other weights.
"""

from pathlib import Path

import small
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from qwen_vocabulary import write_tokenizer
from transformers import Qwen3Config
from transformers import Qwen3Model as Qwen3

WIDTH = 32  # of text


def build(folder: Path, seed: int = 0) -> Path:
    """Write the directory, and return it."""
    torch.manual_seed(seed)
    vocabulary = write_tokenizer(folder / "tokenizer")
    text = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=40960,
        rope_theta=1000000,
        tie_word_embeddings=True,
    )
    Qwen3(text).save_pretrained(folder / "text_encoder")
    transformer = ZImageTransformer2DModel(
        dim=96,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[16, 16, 16],
        axes_lens=[1536, 512, 512],
    )
    with torch.no_grad():  # as initialised, prompts hardly move the prediction, and Δ would be all rounding
        for token in (transformer.cap_pad_token, transformer.x_pad_token):
            token.normal_()
        for block in transformer.layers:
            block.attention.to_v.weight.mul_(8)
    transformer.save_pretrained(folder / "transformer")
    AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=6.0).save_pretrained(folder / "scheduler")
    components = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "Qwen3Model"),
        "tokenizer": ("transformers", "Qwen2Tokenizer"),
        "transformer": ("diffusers", "ZImageTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    small.write_index(folder, "ZImagePipeline", components)
    return folder


if __name__ == "__main__":
    small.main(__doc__, build)
