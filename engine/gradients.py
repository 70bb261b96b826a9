"""Derivatives of an engine's statistics in prompt embeddings, and of its guidance in the noise (METHODS.md §2, 3)."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from memedge.engine.backend import Floats

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Gradient:
    """The statistics of B prompts, and the derivative of their weighted sum in the prompts' embeddings.

    Attributes:
        norm: float64 [B], the mean over the draws of ‖Δ(t_norm)‖₂, scaled for v-prediction as in Engine.statistics.
        alignment: float64 [B], the mean over the draws of the cosine over channels of ε_0 and Δ at t_cos; NaN where
            its weight is 0: then it was not computed.
        states: float32 [B, K, D], ∂(norm_weight · norm + alignment_weight · alignment) / ∂(prompt embeddings).
    """

    norm: Floats
    alignment: Floats
    states: Array


class Gradients(Protocol):
    """A source of derivatives for one engine, on its own noise. Safe to call from any thread.

    (K, D) is manifest.states_shape; of SDXL's pooled row the padding's derivative is 0.
    """

    def statistics(self, states: Array, norm_weight: float, alignment_weight: float) -> Gradient:
        """Return the statistics of prompt embeddings [B, K, D], and the derivative of their weighted sum.

        A forward and a backward pass per row: n rows per prompt where alignment_weight is 0, else 2n.

        Raises:
            NotFiniteError: something of it is NaN or infinity.
        """

    def noise(self, states: Array, latents: Array, cotangent: Array) -> Array:
        """Return Jᵀ c, float32 [R, C, H, W], with J the Jacobian in x of Δ(x) = ε_c(x) − ε_0(x) at timesteps[0].

        Δ is in ε, also for v-prediction. Two forward and two backward passes per row.

        Args:
            states: the embeddings of one prompt, [K, D].
            latents: x, [R, C, H, W].
            cotangent: c, [R, C, H, W].

        Raises:
            NotFiniteError: something of it is NaN or infinity.
        """
