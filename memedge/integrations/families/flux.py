"""Flux.1: packed latents, two calls a step, a guidance scale that the model is told."""

from collections.abc import Callable, Sequence
from typing import Any

from memedge.engine.manifest import Manifest
from memedge.integrations.families.family import Arguments, Fact, Family
from memedge.integrations.families.flow import PATCH, check_length, check_size, noise_facts


class Flux(Family):
    """Flux.1: packed latents; a second call where true_cfg_scale and a negative prompt ask for one."""

    part = "transformer"
    network = "transformer"
    flow = True
    attention = "joint_attention_kwargs"
    repeats = False
    scale = "true_cfg_scale"
    apart = True
    encoded = ("prompt_embeds", "pooled_prompt_embeds")

    def facts(self, pipe: Any, manifest: Manifest) -> list[Fact]:
        config = pipe.transformer.config
        return [
            ("prediction type", "flow", manifest.prediction_type),
            ("number of latent channels", config.in_channels // PATCH**2, manifest.latent_shape[0]),
            ("width of prompt embeddings", config.joint_attention_dim, manifest.state_width),
            ("width of pooled prompt embeddings", config.pooled_projection_dim, manifest.pooled_width),
            ("input for the guidance scale", bool(config.guidance_embeds), manifest.guidance is not None),
            *noise_facts(pipe, manifest),
        ]

    def check_call(self, pipe: Any, get: Callable[[str], Any], manifest: Manifest) -> None:
        super().check_call(pipe, get, manifest)
        check_size(get, manifest, pipe.vae_scale_factor, pipe.default_sample_size)
        if get("prompt_embeds") is None:
            check_length(get, manifest.tokens)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
        del args
        return kwargs["hidden_states"], 1000 * float(kwargs["timestep"][0])

    def with_empty(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Sequence[int],
        prompts: Sequence[int],
        empty: tuple[Any, Any],
    ) -> Arguments:
        own = {name: kwargs[name][rows] for name in ("hidden_states", "timestep")}
        if kwargs["guidance"] is not None:
            own["guidance"] = kwargs["guidance"][rows]
        states = {"encoder_hidden_states": empty[0][prompts], "pooled_projections": empty[1][prompts]}
        return args, dict(kwargs, **own, **states)

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
