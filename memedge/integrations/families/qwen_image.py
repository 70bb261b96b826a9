"""Qwen-Image: packed latents, two calls a step, a mask of tokens."""

from collections.abc import Sequence
from typing import Any

from memedge.engine.flow import PATCH
from memedge.engine.manifest import Manifest
from memedge.integrations.families.family import Arguments, Fact
from memedge.integrations.families.flow import FlowFamily


class QwenImage(FlowFamily):
    """Qwen-Image: packed latents; a second call as Flux's; embeddings filled up to the longest, with a mask."""

    attention = "attention_kwargs"
    scale = "true_cfg_scale"
    apart = True
    clock = 1000
    cuts_embeddings = True
    encoded = ("prompt_embeds", "prompt_embeds_mask")

    def model_facts(self, config: Any, manifest: Manifest) -> list[Fact]:
        return [
            ("number of latent channels", config.in_channels // PATCH**2, manifest.latent_shape[0]),
            ("width of prompt embeddings", config.joint_attention_dim, manifest.state_width - 1),  # but for the mask
            ("input for the guidance scale", bool(config.guidance_embeds), manifest.guidance is not None),
        ]

    def with_empty(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Sequence[int],
        prompts: Sequence[int],
        empty: tuple[Any, Any],
    ) -> Arguments:
        args, more = super().with_empty(args, kwargs, rows, prompts, empty)
        return args, more | {"encoder_hidden_states_mask": None}  # all are as long

    def predict(
        self, pipe: Any, manifest: Manifest, sample: Any, timesteps: Any, states: Any, pooled: Any, attention: Any
    ) -> Any:
        del manifest, pooled
        rows, channels, height, width = sample.shape
        prediction = pipe.transformer(
            hidden_states=pipe._pack_latents(sample, rows, channels, height, width),
            timestep=timesteps.to(sample.dtype) / 1000,
            encoder_hidden_states=states,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * rows,
            attention_kwargs=attention,
            return_dict=False,
        )
        scale = pipe.vae_scale_factor
        return pipe._unpack_latents(prediction[0], scale * height, scale * width, scale)[:, :, 0]
