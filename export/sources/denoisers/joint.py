"""Attention of transformers' blocks as one fused node, over one stream of tokens or over several; for tracing only."""

from collections.abc import Sequence
from typing import Any

import torch

from memedge.export.sources.attention import fused
from memedge.export.sources.denoisers.rotary import Turns, turned

IMAGE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")  # diffusers' names of the layers


def projected(attn: Any, states: torch.Tensor, *, text: bool = False, turns: Turns | None = None) -> list[torch.Tensor]:
    """Return query, key and value [R, S, H, K] of a stream's states [R, S, D]; the first two normalised and turned.

    `text`: by the layers and norms of the second stream.
    """
    norms = (attn.norm_added_q, attn.norm_added_k) if text else (attn.norm_q, attn.norm_k)
    found = [getattr(attn, name)(states).unflatten(-1, (attn.heads, -1)) for name in (TEXT if text else IMAGE)]
    for place, norm in enumerate(norms):
        if norm is not None:
            found[place] = norm(found[place])
        if turns is not None:
            found[place] = turned(found[place], turns)
    return found


def joint(attn: Any, streams: Sequence[Sequence[torch.Tensor]], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return attention [R, S, D] over all streams' tokens, one stream's behind the other's; the mask is `fused`'s."""
    query, key, value = (torch.cat(parts, dim=1).flatten(-2) for parts in zip(*streams, strict=True))
    return fused(query, key, value, attn.heads, mask)
