"""Flux.1, dev and schnell: blocks of two streams, text and image, and then of one (Black Forest Labs, 2024)."""

from typing import Any

import torch
from torch import nn

from memedge.engine.errors import ExportError
from memedge.export.sources.attention import fused
from memedge.export.sources.denoisers.flow import FlowTransformer
from memedge.export.sources.denoisers.rotary import Turns, turned, turns_of
from memedge.export.sources.parts import Parts

PATCH = 2  # latent pixels of an image token in each direction, packed by the pipeline
SIZE = 128  # of latents, where nobody says: the pipeline's own


class Flux(FlowTransformer):
    """diffusers' FluxTransformer2DModel; `sample` is what its pipeline packs into tokens."""

    guidance: torch.Tensor | None  # [1]
    image_ids: torch.Tensor  # [N, 3]: 0, and the row and the column of each image token
    text_ids: torch.Tensor  # [L, 3], all 0

    def __init__(self, parts: Parts, tokens: int, pooled_width: int):
        """As FlowTransformer.

        Raises:
            ExportError: a size that is not a whole number of image tokens, or another pooled state.
        """
        super().__init__(parts, tokens, pooled_width)
        config = self.transformer.config
        height, width = parts.latent_size or (SIZE, SIZE)
        if height % PATCH or width % PATCH:
            raise ExportError(
                f"{parts.id} takes latents in steps of {PATCH}, not {height} × {width}: give a --size in steps of "
                f"{PATCH} latent pixels."
            )
        if pooled_width != config.pooled_projection_dim:
            raise ExportError(
                f"CLIP gives a pooled state of width {pooled_width}, and the transformer takes "
                f"{config.pooled_projection_dim}: these are parts of different models."
            )
        self.latent_shape = (config.in_channels // PATCH**2, height, width)
        self.state_width = config.joint_attention_dim
        self.register_buffer("guidance", None if parts.guidance is None else torch.tensor([parts.guidance]))
        rows, columns = (torch.arange(side // PATCH, dtype=torch.float32) for side in (height, width))
        places = torch.cartesian_prod(torch.zeros(1), rows, columns)
        self.register_buffer("image_ids", places)
        self.register_buffer("text_ids", torch.zeros(tokens, 3))

    def make_exportable(self) -> None:
        cos, sin = self.transformer.pos_embed(torch.cat([self.text_ids, self.image_ids]))
        self.transformer.pos_embed = _Positions(turns_of(cos[:, ::2], sin[:, ::2]))  # a pair is turned by one angle
        for block in (*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks):
            block.attn.set_processor(_FusedRotaryAttention())

    def velocity(self, sample: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        text, pooled = self.split(states)
        channels, height, width = self.latent_shape
        packed = sample.reshape(-1, channels, height // PATCH, PATCH, width // PATCH, PATCH)
        packed = packed.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        found = self.transformer(
            hidden_states=packed,
            timestep=sigma,
            guidance=None if self.guidance is None else self.guidance.expand(sigma.shape[0]),
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]
        found = found.reshape(-1, height // PATCH, width // PATCH, channels, PATCH, PATCH)
        result: torch.Tensor = found.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)
        return result


class _Positions(nn.Module):
    """The turns of all positions, known beforehand, whatever the ids."""

    def __init__(self, turns: Turns):
        super().__init__()
        self._turns = turns

    def forward(self, ids: torch.Tensor) -> Turns:  # noqa: ARG002  # diffusers passes it
        return self._turns


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
        image_rotary_emb: Turns | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert image_rotary_emb is not None
        parts = [_projected(attn, hidden_states, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))]
        if encoder_hidden_states is not None:
            names, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), (attn.norm_added_q, attn.norm_added_k)
            parts.insert(0, _projected(attn, encoder_hidden_states, names, norms))
        query, key, value = (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
        query, key = (turned(one, image_rotary_emb).flatten(-2) for one in (query, key))
        result = fused(query, key, value.flatten(-2), attn.heads)
        if encoder_hidden_states is None:
            return result
        tokens = encoder_hidden_states.shape[1]
        return attn.to_out[0](result[:, tokens:]), attn.to_add_out(result[:, :tokens])


def _projected(attn: Any, states: torch.Tensor, names: tuple[str, ...], norms: tuple[Any, Any]) -> list[torch.Tensor]:
    """Return query, key and value [R, S, H, K]; the first two normalised."""
    found = [getattr(attn, name)(states).unflatten(-1, (attn.heads, -1)) for name in names]
    return [norms[0](found[0]), norms[1](found[1]), found[2]]
