"""Randomly initialised Stable-Diffusion-format checkpoints, small enough for tests."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 16


def make_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer without merges: every byte is a token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    words = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    with tempfile.TemporaryDirectory() as folder:  # from files, as transformers 4 and 5 both do
        (Path(folder) / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (Path(folder) / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, pad_token=pad, **special)


def make_checkpoint(folder: Path, prediction_type: str = "epsilon", seed: int = 0, poison: float | None = None) -> Path:
    """Write a checkpoint to `folder`; `poison` replaces one weight of the UNet."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(text_config(24))
    raise_guidance(unet)
    if poison is not None:
        with torch.no_grad():
            unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = poison
    unet.save_pretrained(folder / "unet")
    text_encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    make_scheduler(prediction_type).save_pretrained(folder / "scheduler")
    return folder


def text_config(width: int, **more: Any) -> CLIPTextConfig:
    """The configuration of a small text encoder; `more` is added to it, or replaces some of it."""
    tokenizer = make_tokenizer()
    small = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TOKENS,
        "initializer_factor": 1.0,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**{**small, **more})


def raise_guidance(unet: UNet2DConditionModel) -> None:
    """Let prompts move the prediction: as initialised they hardly do, and Δ would be all rounding."""
    with torch.no_grad():
        for module in unet.modules():
            if hasattr(module, "to_v"):
                module.to_v.weight.mul_(20)


def make_scheduler(prediction_type: str) -> DDIMScheduler:
    """Stable Diffusion's own schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
