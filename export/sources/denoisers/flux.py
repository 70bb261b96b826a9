"""Flux.1, dev and schnell: blocks of two streams, text and image, and then of one (Black Forest Labs, 2024)."""

from typing import Any

import torch

from memedge.engine.errors import ExportError
from memedge.engine.flow import PATCH
from memedge.export.sources.constant import Constant
from memedge.export.sources.denoisers.flow import SIDE, FlowTransformer, check_whole_tokens, packed, unpacked
from memedge.export.sources.denoisers.joint import joint, projected
from memedge.export.sources.denoisers.rotary import Turns, turns_of
from memedge.export.sources.parts import Parts


class Flux(FlowTransformer):
    """diffusers' FluxTransformer2DModel; `sample` is what its pipeline packs into tokens."""

    image_ids: torch.Tensor  # [N, 3]: 0, and the row and the column of each image token
    text_ids: torch.Tensor  # [L, 3], all 0

    def __init__(self, parts: Parts, tokens: int, pooled_width: int):
        """As FlowTransformer.

        Raises:
            ExportError: a size that is not a whole number of image tokens, or another pooled state.
        """
        super().__init__(parts, tokens, pooled_width)
        config = self.transformer.config
        height, width = parts.latent_size or (SIDE, SIDE)
        check_whole_tokens(parts, height, width)
        if pooled_width != config.pooled_projection_dim:
            raise ExportError(
                f"CLIP gives a pooled state of width {pooled_width}, and the transformer takes "
                f"{config.pooled_projection_dim}: these are parts of different models."
            )
        self.latent_shape = (config.in_channels // PATCH**2, height, width)
        self.state_width = config.joint_attention_dim
        rows, columns = (torch.arange(side // PATCH, dtype=torch.float32) for side in (height, width))
        places = torch.cartesian_prod(torch.zeros(1), rows, columns)
        self.register_buffer("image_ids", places)
        self.register_buffer("text_ids", torch.zeros(tokens, 3))

    def make_exportable(self) -> None:
        cos, sin = self.transformer.pos_embed(torch.cat([self.text_ids, self.image_ids]))
        cos, sin = cos[:, ::2], sin[:, ::2]  # a pair is turned by one angle
        spans = slice(None), slice(self._tokens), slice(self._tokens, None)  # all tokens, the text's, the image's
        self.transformer.pos_embed = Constant(tuple(turns_of(cos[span], sin[span]) for span in spans))
        for block in (*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks):
            block.attn.set_processor(_FusedRotaryAttention())

    def velocity(
        self, sample: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor, guidance: torch.Tensor | None
    ) -> torch.Tensor:
        text, pooled = self.split(states)
        found = self.transformer(
            hidden_states=packed(sample),
            timestep=sigma,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        return unpacked(found, self.latent_shape)


class _FusedRotaryAttention:
    """Attention over text and image tokens, with rotary embeddings, as one fused node; for tracing only.

    In blocks of one stream, all tokens are in hidden_states, the text's first.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002  # pipelines have none
        image_rotary_emb: tuple[Turns, Turns, Turns] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert image_rotary_emb is not None
        whole, of_text, of_image = image_rotary_emb
        if encoder_hidden_states is None:
            return joint(attn, [projected(attn, hidden_states, turns=whole)])
        text = projected(attn, encoder_hidden_states, text=True, turns=of_text)
        result = joint(attn, [text, projected(attn, hidden_states, turns=of_image)])
        tokens = encoder_hidden_states.shape[1]
        return attn.to_out[0](result[:, tokens:]), attn.to_add_out(result[:, :tokens])
