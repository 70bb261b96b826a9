"""Qwen-Image: a double-stream transformer (Qwen-Image Technical Report, arXiv:2508.02324)."""

from typing import Any

import torch
from torch import nn

from memedge.engine.errors import ExportError
from memedge.export.sources.attention import fused
from memedge.export.sources.denoisers.flow import FlowTransformer
from memedge.export.sources.denoisers.rotary import Turns, turned, turns_of
from memedge.export.sources.parts import Parts

SIDE = 128  # of the pipeline's latents, where nobody names a size
PATCH = 2


class QwenImage(FlowTransformer):
    """diffusers' QwenImageTransformer2DModel; what its pipeline does to guided predictions is left out."""

    def __init__(self, parts: Parts, tokens: int, pooled_width: int):
        """As FlowTransformer.

        Raises:
            ExportError: a size that it has no positions for.
        """
        super().__init__(parts, tokens, pooled_width)
        config = self.transformer.config
        height, width = parts.latent_size or (SIDE, SIDE)
        self.latent_shape = (config.in_channels // PATCH**2, height, width)
        self.state_width = config.joint_attention_dim + 1
        if height % PATCH or width % PATCH:
            raise ExportError(
                f"{parts.id} has no tokens for latents of {height} × {width}: give a --size in steps of {PATCH} latent "
                "pixels."
            )
        image, text = self.transformer.pos_embed(self._shapes(1), max_txt_seq_len=tokens)
        if len(image) != self._grid[0] * self._grid[1] or len(text) != tokens:
            raise ExportError(
                f"{parts.id} has no positions for latents of {height} × {width} with {tokens} tokens of text: give a "
                "smaller --size."
            )
        self._positions = turns_of(image.real, image.imag), turns_of(text.real, text.imag)

    @property
    def _grid(self) -> tuple[int, int]:
        """The picture's tokens in each direction."""
        return self.latent_shape[1] // PATCH, self.latent_shape[2] // PATCH

    def _shapes(self, rows: int) -> list[list[tuple[int, int, int]]]:
        return [[(1, *self._grid)]] * rows

    def make_exportable(self) -> None:
        self.transformer.pos_embed = _Positions(*self._positions)
        for block in self.transformer.transformer_blocks:
            block.attn.set_processor(_FusedAttention())

    def velocity(self, sample: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        (channels, height, width), (high, wide) = self.latent_shape, self._grid
        patches = sample.reshape(-1, channels, high, PATCH, wide, PATCH).permute(0, 2, 4, 1, 3, 5)
        found: torch.Tensor = self.transformer(
            hidden_states=patches.reshape(-1, high * wide, channels * PATCH**2),
            timestep=sigma,
            encoder_hidden_states=states[..., :-1],
            encoder_hidden_states_mask=states[..., -1] > 0.5,
            img_shapes=self._shapes(1),
            return_dict=False,
        )[0]
        patches = found.reshape(-1, high, wide, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(-1, channels, height, width)


class _Positions(nn.Module):
    """The angles of the picture's tokens and of the text's, known beforehand."""

    def __init__(self, image: Turns, text: Turns):
        super().__init__()
        self._found = image, text

    def forward(self, *_: Any, **__: Any) -> tuple[Turns, Turns]:
        return self._found


class _FusedAttention:
    """Attention over text and image tokens as one fused node; for tracing only."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor,
        image_rotary_emb: tuple[Turns, Turns],
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        names, text_names = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
        image = _projected(attn, hidden_states, names, (attn.norm_q, attn.norm_k), image_rotary_emb[0])
        text = _projected(
            attn, encoder_hidden_states, text_names, (attn.norm_added_q, attn.norm_added_k), image_rotary_emb[1]
        )
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        there = encoder_hidden_states_mask.int()
        mask = torch.cat([there, torch.ones_like(hidden_states[..., 0], dtype=torch.int32)], dim=1)
        result = fused(query, key, value, attn.heads, mask)
        words = encoder_hidden_states.shape[1]
        return attn.to_out[0](result[:, words:]), attn.to_add_out(result[:, :words])


def _projected(
    attn: Any, states: torch.Tensor, names: tuple[str, ...], norms: tuple[Any, Any], turns: Turns
) -> list[torch.Tensor]:
    """Return query, key and value [R, S, D]; the first two normalised and turned in each head."""
    found = [getattr(attn, name)(states) for name in names]
    for place, norm in enumerate(norms):
        found[place] = turned(norm(found[place].unflatten(-1, (attn.heads, -1))), turns).flatten(-2)
    return found
