"""Stable Diffusion 3 and 3.5: both halves in one call, pooled embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

from memedge.engine.errors import InputError
from memedge.engine.manifest import Manifest
from memedge.integrations.families.family import Arguments, Fact, Family
from memedge.integrations.families.flow import check_length, check_size, noise_facts


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5: one call of the transformer for both halves, its arguments by name."""

    part = "transformer"
    network = "transformer"
    flow = True
    attention = "joint_attention_kwargs"
    repeats = False
    adapter = "image_proj"

    def facts(self, pipe: Any, manifest: Manifest) -> list[Fact]:
        config = pipe.transformer.config
        return [
            ("prediction type", "flow", manifest.prediction_type),
            ("number of latent channels", config.in_channels, manifest.latent_shape[0]),
            ("width of prompt embeddings", config.joint_attention_dim, manifest.state_width),
            ("width of pooled prompt embeddings", config.pooled_projection_dim, manifest.pooled_width),
            *noise_facts(pipe, manifest),
        ]

    def check_call(self, pipe: Any, get: Callable[[str], Any], manifest: Manifest) -> None:
        super().check_call(pipe, get, manifest)
        check_size(get, manifest, pipe.vae_scale_factor, pipe.default_sample_size)
        if get("prompt_embeds") is None:
            check_length(get, manifest.tokens - pipe.tokenizer_max_length)  # behind CLIP's
        mu, shift = get("mu"), manifest.flow and manifest.flow.mu
        if mu is not None and shift is not None and mu != shift:
            raise InputError(f"mu is {mu}, and that of the engine's size is {shift:g}: leave it out.")

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
        del args
        return kwargs["hidden_states"], float(kwargs["timestep"][0])

    def guides(self, args: tuple[Any, ...], kwargs: dict[str, Any], images: int) -> bool:
        del args, images
        return kwargs.get("skip_layers") is None  # skip-layer guidance calls once more in some steps

    def with_empty(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Sequence[int],
        prompts: Sequence[int],
        empty: tuple[Any, Any],
    ) -> Arguments:
        own = {name: kwargs[name][rows] for name in ("hidden_states", "timestep")}
        states = {"encoder_hidden_states": empty[0][prompts], "pooled_projections": empty[1][prompts]}
        return args, dict(kwargs, **own, **states)

    def predict(
        self, pipe: Any, manifest: Manifest, sample: Any, timesteps: Any, states: Any, pooled: Any, attention: Any
    ) -> Any:
        del manifest
        prediction = pipe.transformer(
            hidden_states=sample,
            timestep=timesteps,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            joint_attention_kwargs=attention,
            return_dict=False,
        )
        return prediction[0]
