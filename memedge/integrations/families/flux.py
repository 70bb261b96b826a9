"""Flux.1: packed latents, two calls a step, a guidance scale that the model is told."""

from typing import Any

from memedge.engine.flow import PATCH
from memedge.engine.manifest import Manifest
from memedge.integrations.families.family import Fact
from memedge.integrations.families.flow import FlowFamily


class Flux(FlowFamily):
    """Flux.1: packed latents; a second call where true_cfg_scale and a negative prompt ask for one."""

    attention = "joint_attention_kwargs"
    repeats = False
    scale = "true_cfg_scale"
    apart = True
    clock = 1000
    per_row = ("hidden_states", "timestep", "guidance")
    encoded = ("prompt_embeds", "pooled_prompt_embeds")

    def model_facts(self, config: Any, manifest: Manifest) -> list[Fact]:
        return [
            ("number of latent channels", config.in_channels // PATCH**2, manifest.latent_shape[0]),
            ("width of prompt embeddings", config.joint_attention_dim, manifest.state_width),
            ("width of pooled prompt embeddings", config.pooled_projection_dim, manifest.pooled_width),
            ("input for the guidance scale", bool(config.guidance_embeds), manifest.guidance is not None),
        ]

    def predict(
        self, pipe: Any, manifest: Manifest, sample: Any, timesteps: Any, states: Any, pooled: Any, attention: Any
    ) -> Any:
        rows, channels, height, width = sample.shape
        places = pipe._prepare_latent_image_ids(rows, height // PATCH, width // PATCH, sample.device, sample.dtype)
        told = None if manifest.guidance is None else sample.new_tensor([manifest.guidance] * rows).float()
        prediction = pipe.transformer(
            hidden_states=pipe._pack_latents(sample, rows, channels, height, width),
            timestep=timesteps.to(sample.dtype) / 1000,
            guidance=told,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=sample.new_zeros(states.shape[1], 3),
            img_ids=places,
            joint_attention_kwargs=attention,
            return_dict=False,
        )
        scale = pipe.vae_scale_factor
        return pipe._unpack_latents(prediction[0], scale * height, scale * width, scale)
