"""Stable Diffusion 3 and 3.5: both halves in one call, pooled embeddings."""

from collections.abc import Callable
from typing import Any

from memedge.engine.errors import InputError
from memedge.engine.manifest import Manifest
from memedge.integrations.families.family import Fact
from memedge.integrations.families.flow import FlowFamily


class StableDiffusion3(FlowFamily):
    """Stable Diffusion 3 and 3.5: one call of the transformer for both halves, its arguments by name."""

    attention = "joint_attention_kwargs"
    repeats = False
    adapter = "image_proj"

    def model_facts(self, config: Any, manifest: Manifest) -> list[Fact]:
        return [
            ("number of latent channels", config.in_channels, manifest.latent_shape[0]),
            ("width of prompt embeddings", config.joint_attention_dim, manifest.state_width),
            ("width of pooled prompt embeddings", config.pooled_projection_dim, manifest.pooled_width),
        ]

    def length(self, pipe: Any, manifest: Manifest) -> int:
        return int(manifest.tokens - pipe.tokenizer_max_length)  # behind CLIP's

    def check_call(self, pipe: Any, get: Callable[[str], Any], manifest: Manifest) -> None:
        super().check_call(pipe, get, manifest)
        mu, shift = get("mu"), manifest.flow and manifest.flow.mu
        if mu is not None and shift is not None and mu != shift:
            raise InputError(f"mu is {mu}, and that of the engine's size is {shift:g}: leave it out.")

    def guides(self, args: tuple[Any, ...], kwargs: dict[str, Any], images: int) -> bool:
        del args, images
        return kwargs.get("skip_layers") is None  # skip-layer guidance calls once more in some steps

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
