"""Z-Image: lists of pictures and of embeddings, and a prediction of the other sign."""

from collections.abc import Sequence
from typing import Any

from memedge.engine.manifest import Manifest
from memedge.integrations.families.family import Arguments, Fact
from memedge.integrations.families.flow import FlowFamily


class ZImage(FlowFamily):
    """Z-Image: lists of latents and of embeddings, by position; times 1 − σ; −v; and [cond; uncond] in one call."""

    attention = "joint_attention_kwargs"
    above = 0
    cond_first = True
    lists = True

    def model_facts(self, config: Any, manifest: Manifest) -> list[Fact]:
        return [
            ("number of latent channels", config.in_channels, manifest.latent_shape[0]),
            ("width of prompt embeddings", config.cap_feat_dim, manifest.state_width - 1),  # but for the mask
        ]

    def side(self, pipe: Any) -> int:
        return int(1024 // pipe.vae_scale_factor)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
        del kwargs
        return _joined(args[0]), 1000 * (1 - float(args[1][0]))

    def guides(self, args: tuple[Any, ...], kwargs: dict[str, Any], images: int) -> bool:
        del kwargs
        return len(args[0]) != images  # cfg_truncation leaves the other half out

    def predictions(self, output: Any) -> Any:
        return -_joined(output[0])

    def with_empty(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Sequence[int],
        prompts: Sequence[int],
        empty: tuple[Any, Any],
    ) -> Arguments:
        own = [args[0][row] for row in rows], args[1][rows], [empty[0][prompt] for prompt in prompts]
        return own, kwargs

    def predict(
        self, pipe: Any, manifest: Manifest, sample: Any, timesteps: Any, states: Any, pooled: Any, attention: Any
    ) -> Any:
        del manifest, pooled
        latents, times = list(sample[:, :, None]), (1000 - timesteps) / 1000
        output = pipe.transformer(latents, times, list(states), joint_attention_kwargs=attention, return_dict=False)
        return self.predictions(output)


def _joined(pictures: Sequence[Any]) -> Any:
    """Return pictures [C, 1, H, W] as one tensor [N, C, H, W]."""
    import torch

    return torch.stack(list(pictures))[:, :, 0]
