"""What a pass costs at the published sizes, and what can be spared: counted on torch's meta device, without weights.

    python bench/transformers/flops.py

Of one row, at 1024 × 1024 pixels and the pipeline's own number of text tokens: the work of the whole transformer; of
what no prompt changes, which the prefix split caches; and up to the end of the first block that joins text and picture,
where the first tap of a screen may stand. The configurations are the published ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch.utils.flop_counter import FlopCounterMode

TOKENS = 4096  # of a picture


@dataclass(frozen=True)
class Model:
    """A transformer; the modules that no prompt changes; and its first block that joins text and picture."""

    name: str
    transformer: Callable[[], torch.nn.Module]
    inputs: Callable[[], dict[str, Any]]
    free: tuple[str, ...]
    first: str


def _sd3(layers: int, heads: int, dual: int, positions: int) -> Callable[[], torch.nn.Module]:
    return lambda: SD3Transformer2DModel(
        num_layers=layers,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm",
        pos_embed_max_size=positions,
    )


def _sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(1, 16, 128, 128),
        "encoder_hidden_states": torch.zeros(1, 77 + 256, 4096),
        "pooled_projections": torch.zeros(1, 2048),
        "timestep": torch.zeros(1),
    }


def _flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(1, TOKENS, 64),
        "encoder_hidden_states": torch.zeros(1, 512, 4096),
        "pooled_projections": torch.zeros(1, 768),
        "timestep": torch.zeros(1),
        "guidance": torch.zeros(1),
        "img_ids": torch.zeros(TOKENS, 3),
        "txt_ids": torch.zeros(512, 3),
    }


def _qwen_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(1, TOKENS, 64),
        "encoder_hidden_states": torch.zeros(1, 512, 3584),
        "timestep": torch.zeros(1),
        "img_shapes": [[(1, 64, 64)]],
    }


def _z_image_inputs() -> dict[str, Any]:
    return {
        "x": [torch.zeros(16, 1, 128, 128)],
        "t": torch.zeros(1),
        "cap_feats": [torch.zeros(512, 2560)],
    }


_TIME = ("time_text_embed.timestep_embedder",)
MODELS = (
    Model("SD 3.5 medium", _sd3(24, 24, 13, 384), _sd3_inputs, ("pos_embed", *_TIME), "transformer_blocks.0"),
    Model("SD 3.5 large", _sd3(38, 38, 0, 192), _sd3_inputs, ("pos_embed", *_TIME), "transformer_blocks.0"),
    Model(
        "Flux.1-dev",
        lambda: FluxTransformer2DModel(guidance_embeds=True),
        _flux_inputs,
        ("x_embedder", *_TIME, "time_text_embed.guidance_embedder"),
        "transformer_blocks.0",
    ),
    Model("Qwen-Image", QwenImageTransformer2DModel, _qwen_inputs, ("img_in", *_TIME), "transformer_blocks.0"),
    Model(
        "Z-Image",
        lambda: ZImageTransformer2DModel(axes_lens=[1536, 512, 512]),
        _z_image_inputs,
        ("all_x_embedder", "t_embedder", "noise_refiner"),
        "layers.0",
    ),
)


def main() -> None:
    print("| model | parameters | TFLOP a row | cached, no prompt changes it | first joint block |")
    print("|---|---|---|---|---|")
    for model in MODELS:
        with torch.device("meta"):
            transformer = model.transformer().eval()
            inputs = model.inputs()
        counter = FlopCounterMode(display=False, depth=None)
        with torch.no_grad(), counter:
            transformer(**inputs)
        of = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
        total = counter.get_total_flops()
        free = sum(
            count
            for name, count in of.items()
            if name in model.free or (name.rpartition(".")[0] in model.free and name.rpartition(".")[0] not in of)
        )
        parameters = sum(parameter.numel() for parameter in transformer.parameters())
        cells = (
            f"{parameters / 1e9:.1f} · 10⁹",
            f"{total / 1e12:.1f}",
            f"{100 * free / total:.2f} %",
            f"{100 * of[model.first] / total:.1f} %",
        )
        print(f"| {model.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
