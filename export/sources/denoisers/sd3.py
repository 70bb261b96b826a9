"""Stable Diffusion 3 and 3.5: an MMDiT (Esser et al., ICML 2024)."""

from typing import Any

import torch

from memedge.engine.errors import ExportError
from memedge.export.sources.attention import fused
from memedge.export.sources.denoisers.flow import FlowTransformer
from memedge.export.sources.parts import Parts


class SD3(FlowTransformer):
    """diffusers' SD3Transformer2DModel."""

    def __init__(self, parts: Parts, tokens: int, pooled_width: int):
        """As FlowTransformer.

        Raises:
            ExportError: a size that it has no positions for.
        """
        super().__init__(parts, tokens, pooled_width)
        config = self.transformer.config
        height, width = parts.latent_size or (config.sample_size, config.sample_size)
        self.latent_shape, self.state_width = (config.in_channels, height, width), config.joint_attention_dim
        longest = config.pos_embed_max_size * config.patch_size
        if max(height, width) > longest or height % config.patch_size or width % config.patch_size:
            raise ExportError(
                f"{parts.id} has no positions for latents of {height} × {width}: give a --size of at most {longest} "
                f"latent pixels a side, in steps of {config.patch_size}."
            )

    def make_exportable(self) -> None:
        for block in self.transformer.transformer_blocks:
            for name in ("attn", "attn2"):
                if (attention := getattr(block, name, None)) is not None:
                    attention.set_processor(_FusedJointAttention())

    def velocity(self, sample: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        text, pooled = self.split(states)
        found: torch.Tensor = self.transformer(
            hidden_states=sample,
            timestep=1000 * sigma,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return found


class _FusedJointAttention:
    """Attention over image and text tokens, or over the image's alone, as one fused node; for tracing only."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        image = _projected(attn, hidden_states, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is None:
            query, key, value = image
            alone: torch.Tensor = attn.to_out[0](fused(query, key, value, attn.heads))
            return alone
        text = _projected(
            attn,
            encoder_hidden_states,
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            (attn.norm_added_q, attn.norm_added_k),
        )
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(image, text, strict=True))
        result = fused(query, key, value, attn.heads)
        tokens = hidden_states.shape[1]
        image_part, text_part = attn.to_out[0](result[:, :tokens]), result[:, tokens:]
        return image_part, text_part if attn.context_pre_only else attn.to_add_out(text_part)


def _projected(attn: Any, states: torch.Tensor, names: tuple[str, ...], norms: tuple[Any, Any]) -> list[torch.Tensor]:
    """Return query, key and value [R, S, D]; the first two normalised in each head."""
    found = [getattr(attn, name)(states) for name in names]
    for place, norm in enumerate(norms):
        if norm is not None:
            found[place] = norm(found[place].unflatten(-1, (attn.heads, -1))).flatten(-2)
    return found
