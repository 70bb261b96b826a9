"""A small random Qwen-Image in the public model's layout: a pipeline's whole directory.

python bench/transformers/qwen_image.py FOLDER
"""

from pathlib import Path

import small
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from qwen_vocabulary import write_tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

WIDTH = 32  # of text
SCHEDULER = {  # as published
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}


def build(folder: Path, seed: int = 0) -> Path:
    """Write the directory, and return it."""
    torch.manual_seed(seed)
    vocabulary = write_tokenizer(folder / "tokenizer")
    text = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default", "mrope_section": [1, 1, 2]},
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
    )
    Qwen2_5_VLForConditionalGeneration(text).save_pretrained(folder / "text_encoder")
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=4,
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 8, 8),
    )
    with torch.no_grad():  # as initialised, prompts hardly move the prediction, and Δ would be all rounding
        for block in transformer.transformer_blocks:
            block.attn.add_v_proj.weight.mul_(8)
            for modulation in (block.img_mod[1], block.txt_mod[1]):
                modulation.bias.normal_()
    transformer.save_pretrained(folder / "transformer")
    AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    components = {
        "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
        "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
        "tokenizer": ("transformers", "Qwen2Tokenizer"),
        "transformer": ("diffusers", "QwenImageTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderKLQwenImage"),
    }
    small.write_index(folder, "QwenImagePipeline", components)
    return folder


if __name__ == "__main__":
    small.main(__doc__, build)
