"""Attention as the exported graphs hold it: in UNets one fused node, and keys and values once per prompt."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from memedge.engine.errors import ExportError

CAUSAL, WHOLE = "memedge_causal", "memedge_whole"


def causal_attention(
    module: nn.Module,  # noqa: ARG001  # transformers passes it
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # None: transformers makes no mask for a name it does not know
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return causal attention [B, L, H, K] over query [B, H, L, K], key and value, L known when it is traced.

    Keys and values may have fewer heads, each of which is for as many of the query's.

    transformers' own makes the mask anew from the batch's shape in every call, and torch's guards against rows that are
    masked whole, which a causal mask does not have: Shape, Where, IsNaN and Expand nodes that GPU runtimes cannot fuse.
    """
    if (shared := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    length = query.shape[2]
    mask = torch.full((length, length), torch.finfo(query.dtype).min).triu(1)
    weights = torch.softmax((query * scaling) @ key.transpose(-1, -2) + mask, dim=-1)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register(CAUSAL, causal_attention)


def whole_attention(
    module: nn.Module,  # noqa: ARG001  # transformers passes it
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # None, as above
    scaling: float,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention [B, L, H, K] of all tokens to all, padding too, as T5 is called by pipelines."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    weights = torch.softmax(scores if position_bias is None else scores + position_bias, dim=-1)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register(WHOLE, whole_attention)


def fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ONNX Runtime's `com.microsoft::MultiHeadAttention` over query, key and value [R, S, D], for tracing only.

    `mask`, int32 [R, S], is 1 at keys that are there and 0 at those that are to be passed over; None: all are there.
    """
    result: torch.Tensor = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        (query, key, value) if mask is None else (query, key, value, None, mask),
        {"num_heads": heads},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )
    return result


class FusedAttention:
    """A diffusers attention processor that emits ONNX Runtime's `com.microsoft::MultiHeadAttention`, for tracing only.

    Fused, a step of SD 1.4's UNet takes 14 to 19 % less time on a CPU (docs/benchmarks.md). Keys and values are
    projected from the B prompts' states and then taken for each of the R rows (`prompt` says which), so that both
    timesteps and all draws of a prompt share one projection.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,  # noqa: ARG002  # only spatial norms, refused below, would use it
        *,
        prompt: torch.Tensor,
    ) -> torch.Tensor:
        """Return attention over hidden_states [R, S, D] or [R, C, H, W]; states are [B, L, D], prompt int64 [R]."""
        if attention_mask is not None or attn.spatial_norm is not None or attn.norm_q is not None or attn.norm_cross:
            raise ExportError("This UNet's attention has masks or norms of its own, which memedge does not export.")
        residual = hidden_states
        spatial = hidden_states.ndim == 4
        if spatial:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        if encoder_hidden_states is not None:
            key, value = key.index_select(0, prompt), value.index_select(0, prompt)
        result = attn.to_out[0](fused(query, key, value, attn.heads))
        if spatial:
            result = result.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            result = result + residual
        scaled: torch.Tensor = result / attn.rescale_output_factor
        return scaled
