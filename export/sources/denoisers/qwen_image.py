"""Qwen-Image: a double-stream transformer (Qwen-Image Technical Report, arXiv:2508.02324)."""

from typing import Any

import torch

from memedge.engine.errors import ExportError
from memedge.engine.flow import PATCH
from memedge.export.sources.constant import Constant
from memedge.export.sources.denoisers.flow import SIDE, FlowTransformer, check_whole_tokens, packed, unpacked
from memedge.export.sources.denoisers.joint import joint, projected
from memedge.export.sources.denoisers.rotary import Turns, turns_of
from memedge.export.sources.parts import Parts


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
        check_whole_tokens(parts, height, width)
        image, text = self.transformer.pos_embed(self._shapes, max_txt_seq_len=tokens)
        if len(image) != self._grid[0] * self._grid[1] or len(text) != tokens:
            raise ExportError(
                f"{parts.id} has no positions for {parts.size(height, width)} with {tokens} tokens of text: give a "
                "smaller --size."
            )
        self._positions = turns_of(image.real, image.imag), turns_of(text.real, text.imag)

    @property
    def _grid(self) -> tuple[int, int]:
        """The picture's tokens in each direction."""
        return self.latent_shape[1] // PATCH, self.latent_shape[2] // PATCH

    @property
    def _shapes(self) -> list[list[tuple[int, int, int]]]:
        return [[(1, *self._grid)]]

    def make_exportable(self) -> None:
        self.transformer.pos_embed = Constant(self._positions)
        for block in self.transformer.transformer_blocks:
            block.attn.set_processor(_FusedAttention())

    def velocity(
        self, sample: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor, guidance: torch.Tensor | None
    ) -> torch.Tensor:
        del guidance  # it is told none
        found: torch.Tensor = self.transformer(
            hidden_states=packed(sample),
            timestep=sigma,
            encoder_hidden_states=states[..., :-1],
            encoder_hidden_states_mask=states[..., -1] > 0.5,
            img_shapes=self._shapes,
            return_dict=False,
        )[0]
        return unpacked(found, self.latent_shape)


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
        image = projected(attn, hidden_states, turns=image_rotary_emb[0])
        text = projected(attn, encoder_hidden_states, text=True, turns=image_rotary_emb[1])
        there = encoder_hidden_states_mask.int()
        mask = torch.cat([there, torch.ones_like(hidden_states[..., 0], dtype=torch.int32)], dim=1)
        result = joint(attn, [text, image], mask)
        words = encoder_hidden_states.shape[1]
        return attn.to_out[0](result[:, words:]), attn.to_add_out(result[:, :words])
