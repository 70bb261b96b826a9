"""Z-Image: a single-stream transformer (Z-Image, arXiv:2511.22699)."""

from typing import Any

import torch
from torch import nn

from memedge.engine.errors import ExportError
from memedge.engine.flow import PATCH
from memedge.export.sources.denoisers.flow import SIDE, FlowTransformer
from memedge.export.sources.denoisers.joint import joint, projected
from memedge.export.sources.denoisers.rotary import Turns, turns_of
from memedge.export.sources.parts import Parts

MULTIPLE = 32  # of tokens, to which captions and pictures are filled up; diffusers' SEQ_MULTI_OF


class ZImage(FlowTransformer):
    """diffusers' ZImageTransformer2DModel.

    Its captions have as many tokens as they have, filled up to a multiple of 32 with a learned one, and pictures stand
    behind them in the first of three positions. In the graph all captions have L, filled up to a multiple of 32; what
    stands behind a caption's own P is masked. As attention knows differences of positions alone, pictures stand at 0
    there and captions at −P … −1: so nothing of a picture depends on the prompt before the first layer that joins both.
    """

    def __init__(self, parts: Parts, tokens: int, pooled_width: int):
        """As FlowTransformer.

        Raises:
            ExportError: a size that it has no positions for, or that diffusers would fill up with tokens.
        """
        super().__init__(parts, tokens, pooled_width)
        config = self.transformer.config
        height, width = parts.latent_size or (SIDE, SIDE)
        self.latent_shape, self.state_width = (config.in_channels, height, width), config.cap_feat_dim + 1
        self._graph: _Graph | None = None
        if height % PATCH or width % PATCH or height * width // PATCH**2 % MULTIPLE:
            raise ExportError(
                f"{parts.size(height, width)} is not a multiple of {MULTIPLE} tokens, as memedge exports {parts.id}: "
                f"give a --size whose sides are multiples of {16 * parts.vae_scale} pixels."
            )
        caption, high, wide = config.axes_lens
        longest = -(-tokens // MULTIPLE) * MULTIPLE
        if height // PATCH > high or width // PATCH > wide or longest + 1 >= caption:
            raise ExportError(
                f"{parts.id} has no positions for {parts.size(height, width)} with {tokens} tokens of text: give a "
                "smaller --size or --max-sequence-length."
            )

    def make_exportable(self) -> None:
        _, height, width = self.latent_shape
        self._graph = _Graph(self.transformer, (height // PATCH, width // PATCH), self._tokens)

    def of_prompts(self, states: torch.Tensor) -> torch.Tensor:
        return states if self._graph is None else self._graph.caption(states)

    def velocity(
        self, sample: torch.Tensor, sigma: torch.Tensor, states: torch.Tensor, guidance: torch.Tensor | None
    ) -> torch.Tensor:
        del guidance  # it is told none
        time = 1 - sigma
        if self._graph is not None:
            return self._graph.velocity(sample, time, states)
        captions = [one[one[:, -1] > 0.5, :-1] for one in states]
        found = self.transformer(list(sample[:, :, None]), time, captions, return_dict=False)[0]
        return -torch.stack(found)[:, :, 0]


class _Graph:
    """The transformer with shapes that no prompt changes, for tracing only."""

    def __init__(self, transformer: Any, grid: tuple[int, int], tokens: int):
        self._transformer, self._grid, self._fill = transformer, grid, -tokens % MULTIPLE
        self._key = f"{PATCH}-1"
        for block in (*transformer.noise_refiner, *transformer.context_refiner):
            block.attention.set_processor(_FusedAttention())
        embedder = transformer.rope_embedder
        places = torch.cartesian_prod(torch.tensor([0]), *(torch.arange(side) for side in grid))
        found = embedder(places)
        self._image = turns_of(found.real, found.imag)
        rows = tokens + self._fill
        blocks = torch.arange(rows // MULTIPLE + 1)[:, None]
        # Of a caption of so many blocks of 32: [blocks, rows, d / 2, 2]. Behind its own rows positions mean nothing.
        self._captions = _first_axis(torch.arange(rows) - MULTIPLE * blocks, embedder)

    def caption(self, states: torch.Tensor) -> torch.Tensor:
        """Return the refined caption of states [B, L, D + 1], and whether each token is there: [B, L, D' + 1]."""
        own = self._transformer
        there = (states[..., -1:] > 0.5).float()
        tokens = own.cap_embedder(states[..., :-1]) * there + own.cap_pad_token * (1 - there)
        if self._fill:
            tokens = torch.cat([tokens, own.cap_pad_token.expand(states.shape[0], self._fill, -1)], dim=1)
            there = torch.cat([there, torch.zeros(1, 1, 1).expand(states.shape[0], self._fill, -1)], dim=1)
        # A block of 32 is there if its first token is.
        blocks = there[:, ::MULTIPLE]
        present = blocks.expand(-1, -1, MULTIPLE).reshape(-1, tokens.shape[1])
        turns = tuple(table[-1] for table in self._captions)
        for block in own.context_refiner:
            tokens = block(tokens, present.int(), turns)
        return torch.cat([tokens, present[..., None]], dim=-1)

    def velocity(self, sample: torch.Tensor, time: torch.Tensor, caption: torch.Tensor) -> torch.Tensor:
        """Return v [R, C, H, W], for times 1 − σ [R] and refined captions [R, L, D' + 1]."""
        own, (high, wide), channels = self._transformer, self._grid, sample.shape[1]
        condition = own.t_embedder(time * own.t_scale)
        patches = sample.reshape(-1, channels, high, PATCH, wide, PATCH).permute(0, 2, 4, 3, 5, 1)
        image = own.all_x_embedder[self._key](patches.reshape(-1, high * wide, PATCH**2 * channels))
        for block in own.noise_refiner:
            image = block(image, None, self._image, condition)
        text, present = caption[..., :-1], caption[..., -1] > 0.5
        mask = torch.cat([torch.ones_like(image[..., 0], dtype=torch.int32), present.int()], dim=1)
        number = present[:, ::MULTIPLE].int().sum(dim=1)
        turns = (self._captions[0].index_select(0, number), self._captions[1].index_select(0, number))
        for block in own.layers:
            image, text = _joint(block, image, text, (self._image, turns), mask, condition)
        found = own.all_final_layer[self._key](image, c=condition)
        patches = found.reshape(-1, high, wide, PATCH, PATCH, channels).permute(0, 5, 1, 3, 2, 4)
        latents: torch.Tensor = patches.reshape(-1, channels, high * PATCH, wide * PATCH)
        return latents * -1  # not Neg, which has no gradient's rule


def _first_axis(places: torch.Tensor, embedder: Any) -> Turns:
    """Return the turns of places in the first axis alone, negative ones too, with RopeEmbedder's speeds."""
    first, *others = embedder.axes_dims
    speeds = embedder.theta ** -(torch.arange(0, first, 2, dtype=torch.float64) / first)
    turns = (places[..., None] * speeds).float()
    turns = nn.functional.pad(turns, (0, sum(others) // 2))
    return turns_of(turns.cos(), turns.sin())


def _joint(
    block: Any,
    image: torch.Tensor,
    text: torch.Tensor,
    turns: tuple[Turns, Turns],
    mask: torch.Tensor,
    condition: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a layer makes of a picture's tokens and a caption's, which are joined for attention alone.

    diffusers has both in one sequence. Apart, what precedes the first attention depends on the prompt for captions
    alone, and the screen sees sums of a picture's tokens only.
    """
    own = block.attention
    scale, gate, scale_after, gate_after = block.adaLN_modulation(condition)[:, None].chunk(4, dim=2)
    gate, gate_after = gate.tanh(), gate_after.tanh()
    streams = (image, text)
    parts = [
        projected(own, block.attention_norm1(one) * (1 + scale), turns=angles)
        for one, angles in zip(streams, turns, strict=True)
    ]
    result = joint(own, parts, mask)
    border = image.shape[1]
    found = []
    for one, attended in zip(streams, (result[:, :border], result[:, border:]), strict=True):
        moved = one + gate * block.attention_norm2(own.to_out[0](attended))
        after = block.feed_forward(block.ffn_norm1(moved) * (1 + scale_after))
        found.append(moved + gate_after * block.ffn_norm2(after))
    return found[0], found[1]


class _FusedAttention:
    """Attention over a picture's tokens, or over a caption's, as one fused node; for tracing only."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        freqs_cis: Turns,
        **_: Any,
    ) -> torch.Tensor:
        parts = projected(attn, hidden_states, turns=freqs_cis)
        found: torch.Tensor = attn.to_out[0](joint(attn, [parts], attention_mask))
        return found
