"""A checkpoint of Stable Diffusion 1.4's size and layout, with random weights, for benches.

    python bench/sd14.py FOLDER

The UNet (860 M parameters) and the text encoder (123 M) are built from the public configuration. There is no CLIP
vocabulary here: the tokenizer is the embedded model's, read up to 77 tokens. Speed does not depend on weights; nothing
else of it means anything.
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

TOKENS = 77
EMOJI = Path(__file__).parent / "tiny" / "emoji"


def build(folder: Path) -> Path:
    """Write the checkpoint to `folder`, about 4 GB in fp32."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EMOJI / "tokenizer", model_max_length=TOKENS)
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder / "text_encoder")
    UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).save_pretrained(folder / "unet")
    shutil.copytree(EMOJI / "scheduler", folder / "scheduler")  # the embedded model has SD's own schedule
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    build(parser.parse_args().folder)
