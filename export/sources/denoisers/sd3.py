"""Stable Diffusion 3 and 3.5: an MMDiT (Esser et al., ICML 2024)."""

from typing import Any

import torch

from memedge.engine.errors import ExportError
from memedge.export.sources.denoisers.flow import FlowTransformer
from memedge.export.sources.denoisers.joint import joint, projected
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
                f"{parts.id} has no positions for {parts.size(height, width)}: give a --size of at most "
                f"{longest * parts.vae_scale} pixels a side, in steps of {config.patch_size * parts.vae_scale}."
            )

    def make_exportable(self) -> None:
        for block in self.transformer.transformer_blocks:
            for name in ("attn", "attn2"):
                if (attention := getattr(block, name, None)) is not None:
                    attention.set_processor(_FusedJointAttention())

    def velocity(
        self, sample: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor, guidance: torch.Tensor | None
    ) -> torch.Tensor:
        del guidance  # it is told none
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
        image = projected(attn, hidden_states)
        if encoder_hidden_states is None:
            alone: torch.Tensor = attn.to_out[0](joint(attn, [image]))
            return alone
        result = joint(attn, [image, projected(attn, encoder_hidden_states, text=True)])
        tokens = hidden_states.shape[1]
        image_part, text_part = attn.to_out[0](result[:, :tokens]), result[:, tokens:]
        return image_part, text_part if attn.context_pre_only else attn.to_add_out(text_part)
