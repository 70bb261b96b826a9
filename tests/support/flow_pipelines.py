"""Small random pipelines of transformers trained by flow matching, complete and in diffusers' format."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from models import make_tokenizer, text_config
from transformers import CLIPTextModelWithProjection

WIDTH, SIDE = 24, 8  # of each text encoder, and of latents
LENGTH = 4  # rows in place of T5, which is left out


def make_sd3(folder: Path, seed: int = 0, shift: float = 3.0) -> Path:
    """Write a pipeline of Stable Diffusion 3.5's layout, without T5. A latent is as large as its picture."""
    torch.manual_seed(seed)
    encoders = [
        CLIPTextModelWithProjection(text_config(WIDTH, projection_dim=WIDTH, hidden_act=act)).eval()
        for act in ("quick_gelu", "gelu")
    ]
    transformer = SD3Transformer2DModel(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH + 16,  # wider than CLIP's states, as it is for T5's
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=SIDE,
        qk_norm="rms_norm",
    )
    with torch.no_grad():  # as initialised prompts hardly move anything
        transformer.context_embedder.weight.mul_(20)
        for block in transformer.transformer_blocks:
            block.attn.add_v_proj.weight.mul_(20)
    vae = AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=1.5,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=make_tokenizer(),
        text_encoder_2=encoders[1],
        tokenizer_2=make_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)
    return folder
