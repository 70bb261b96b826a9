"""Stable Diffusion's UNet, of 1.x, 2.x and XL."""

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from memedge.engine.errors import ExportError
from memedge.export.sources import checkpoint
from memedge.export.sources.attention import FusedAttention
from memedge.export.sources.denoisers.denoiser import Denoiser
from memedge.export.sources.denoisers.guidance_embedding import guidance_embedding
from memedge.export.sources.parts import Parts


class UNet(Denoiser):
    """diffusers' UNet2DConditionModel, also one that takes an embedding of the guidance scale."""

    time_ids: torch.Tensor  # [1, 6]

    def __init__(self, parts: Parts, tokens: int, pooled_width: int):
        """Take the UNet of parts whose states have `tokens` rows, and one more if there is a pooled state.

        Raises:
            ExportError: it takes something else besides than its family's UNets.
        """
        super().__init__(parts.guidance)
        self.unet = parts.denoiser
        self.unet.set_attn_processor(AttnProcessor2_0())
        self._tokens, self._pooled_width = tokens, pooled_width
        config = self.unet.config
        self.latent_shape, self.state_width = checkpoint.latent_shape(config), config.cross_attention_dim
        if config.addition_embed_type != parts.architecture.addition_embed_type:
            raise ExportError(
                f"The UNet of {parts.id} takes additional embeddings of type {config.addition_embed_type!r}, and its "
                f"text encoders are those of {parts.architecture.name}: a part is missing, so get it again."
            )
        if pooled_width:
            ids = checkpoint.time_ids(config)
            width = pooled_width + len(ids) * config.addition_time_embed_dim
            if width != config.projection_class_embeddings_input_dim:
                family = parts.architecture.name
                raise ExportError(f"This UNet is not told sizes and crop as {family}'s base model is: give that one.")
            self.register_buffer("time_ids", torch.tensor([ids], dtype=torch.float32))
        if config.time_cond_proj_dim is not None and parts.guidance is None:
            raise ExportError(f"The UNet of {parts.id} takes a guidance scale: say which with --guidance.")

    def make_exportable(self) -> None:
        self.unet.set_attn_processor(FusedAttention())

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        states: torch.Tensor,
        prompt: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        more: dict[str, Any] = {} if prompt is None else {"cross_attention_kwargs": {"prompt": prompt}}
        if self._pooled_width:
            states, pooled = states[:, : self._tokens], states[:, self._tokens, : self._pooled_width]
            pooled = pooled if prompt is None else pooled.index_select(0, prompt)
            times = self.time_ids.expand(sample.shape[0], -1)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": times}
        if (scale := self.told(guidance, sample.shape[0])) is not None:
            more["timestep_cond"] = guidance_embedding(scale, self.unet.config.time_cond_proj_dim)
        prediction: torch.Tensor = self.unet(sample, timestep, states, return_dict=False, **more)[0]
        return prediction
