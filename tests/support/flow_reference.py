"""What diffusers' own pipelines predict within a call, and the statistics of that by their definitions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

LOW = 0.168


def predictions(pipe: Any, call: Callable[..., Any], sigma: float) -> list[Any]:
    """Return what the transformer gave in a call of one step at σ, which call(sigmas=…) makes."""
    found: list[Any] = []
    own, pipe.scheduler = pipe.scheduler, FlowMatchEulerDiscreteScheduler()  # takes σ as they are
    hook = pipe.transformer.register_forward_hook(lambda _module, _inputs, output: found.append(output[0]))
    try:
        call(sigmas=[sigma])
    finally:
        hook.remove()
        pipe.scheduler = own
    return found


def statistics(
    noise: torch.Tensor, first: tuple[torch.Tensor, torch.Tensor], low: tuple[torch.Tensor, torch.Tensor]
) -> tuple[float, float]:
    """Return the norm of Δv at σ = 1 and the mean cosine of ε_0 and Δv at LOW, of (v_c, v_0), all [C, H, W]."""
    conditional, zero = (one.double().numpy() for one in first)
    norm = float(np.linalg.norm(conditional - zero))
    conditional, zero = (one.double().numpy() for one in low)
    epsilon, delta = noise.double().numpy() + (1 - LOW) * zero, conditional - zero
    lengths = np.linalg.norm(epsilon, axis=0) * np.linalg.norm(delta, axis=0)
    return norm, float(((epsilon * delta).sum(axis=0) / lengths).mean())
