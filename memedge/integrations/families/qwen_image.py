"""Qwen-Image: packed latents, two calls a step, a mask of tokens."""

from collections.abc import Callable, Sequence
from typing import Any

from memedge.engine.manifest import Manifest
from memedge.integrations.families.family import Arguments, Fact, Family
from memedge.integrations.families.flow import PATCH, check_length, check_size, noise_facts


class QwenImage(Family):
    """Qwen-Image: packed latents; a second call as Flux's; embeddings filled up to the longest, with a mask."""

    part = "transformer"
    network = "transformer"
    flow = True
    attention = "attention_kwargs"
    scale = "true_cfg_scale"
    apart = True
    encoded = ("prompt_embeds", "prompt_embeds_mask")

    def facts(self, pipe: Any, manifest: Manifest) -> list[Fact]:
        config = pipe.transformer.config
        return [
            ("prediction type", "flow", manifest.prediction_type),
            ("number of latent channels", config.in_channels // PATCH**2, manifest.latent_shape[0]),
            ("width of prompt embeddings", config.joint_attention_dim, manifest.state_width - 1),  # but for the mask
            ("input for the guidance scale", bool(config.guidance_embeds), manifest.guidance is not None),
            *noise_facts(pipe, manifest),
        ]

    def check_call(self, pipe: Any, get: Callable[[str], Any], manifest: Manifest) -> None:
        super().check_call(pipe, get, manifest)
        check_size(get, manifest, pipe.vae_scale_factor, pipe.default_sample_size)
        check_length(get, manifest.tokens)  # to which given embeddings are cut too

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
        states = {"encoder_hidden_states": empty[0][prompts], "encoder_hidden_states_mask": None}  # all are as long
        return args, dict(kwargs, **own, **states)

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
