"""Derivatives of the statistics in prompt embeddings, and of the guidance in the noise (docs/methods.md §2 and §3)."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from memedge.engine.arrays import Floats, Indices, Singles
from memedge.engine.directory import GRADIENT, NOISE_GRADIENT
from memedge.engine.engine import Engine
from memedge.engine.errors import NotFiniteError, ProviderError
from memedge.engine.manifest import Operands
from memedge.engine.providers import check_gradients

DIFFERENTIABLE: tuple[Operands, ...] = ("uncond_delta", "cond_uncond")


@dataclass(frozen=True)
class Gradient:
    """The statistics of B prompts, and the derivative of their weighted sum in the prompts' embeddings.

    Attributes:
        norm: float64 [B], the mean over the draws of ‖Δ(t_norm)‖₂, scaled for v-prediction as in Engine.statistics.
        alignment: float64 [B], the mean over the draws of the cosine over channels at t_cos; NaN where its weight is 0:
            then it was not computed.
        states: float32 [B, K, D], ∂(norm_weight · norm + alignment_weight · alignment) / ∂(prompt embeddings).
    """

    norm: Floats
    alignment: Floats
    states: Singles


class Gradients(Protocol):
    """A source of derivatives for one engine, on its own noise. Safe to call from any thread.

    (K, D) is manifest.states_shape; of a pooled row the padding's derivative is 0.
    """

    def statistics(
        self, states: Singles, norm_weight: float, alignment_weight: float, operands: Operands = "uncond_delta"
    ) -> Gradient:
        """Return the statistics of prompt embeddings [B, K, D], and the derivative of their weighted sum.

        A forward and a backward pass per row: n rows per prompt where alignment_weight is 0, else 2n. The cosine's
        operands are one of DIFFERENTIABLE.

        Raises:
            NotFiniteError: something of it is NaN or infinity.
        """

    def noise(self, states: Singles, latents: Singles, cotangent: Singles) -> Singles:
        """Return Jᵀ c, float32 [R, C, H, W], with J the Jacobian in x of Δ(x) = ε_c(x) − ε_0(x) at timesteps[0].

        Δ is in ε, also for v-prediction. Two forward and two backward passes per row.

        Args:
            states: the embeddings of one prompt, [K, D].
            latents: x, [R, C, H, W].
            cotangent: c, [R, C, H, W].

        Raises:
            NotFiniteError: something of it is NaN or infinity.
        """


class OnnxGradients:
    """See Gradients: by the engine's own gradient graphs, in its provider and precision.

    The graphs: export/graphs/gradient_graphs.py.

    Each graph is loaded when it is first used, with weights of its own in memory.
    """

    def __init__(self, engine: Engine):
        """Take an opened engine.

        Raises:
            ProviderError: a provider without gradients, or an engine without gradient graphs.
        """
        manifest, backend = engine.directory.manifest, engine.backend
        check_gradients(backend.provider)
        if GRADIENT not in manifest.files:
            raise ProviderError(
                f"{engine.directory.path} has no {GRADIENT}, which gradients need: export the model again in fp32 or "
                "fp16, or give Mitigator.load the checkpoint."
            )
        self._engine = engine
        # A backward pass keeps what a forward one lets go: with fewer rows it takes about as much memory.
        self._rows = max(1, engine.rows_per_call // 4)
        self._uncond = backend.memory.download(engine.uncond)
        self._empty = backend.memory.download(engine.encode(engine.tokenize([""])[0]).tensor)

    def statistics(
        self, states: Singles, norm_weight: float, alignment_weight: float, operands: Operands = "uncond_delta"
    ) -> Gradient:
        engine, draws = self._engine, self._engine.draws
        rows = draws if alignment_weight == 0 else 2 * draws
        per_row = np.zeros((2, rows), dtype=np.float32)
        per_row[0, :draws] = norm_weight * engine.directory.manifest.norm_factor / draws
        per_row[1, draws:] = alignment_weight / draws
        found = np.zeros_like(states)
        values = np.empty((2, len(states) * rows))
        for start in range(0, values.shape[1], self._rows):
            block = slice(start, start + self._rows)
            place, row = np.divmod(np.arange(values.shape[1])[block], rows)
            some = slice(place[0], place[-1] + 1)
            norm, cosine, gradient = engine.backend.run_graph(
                GRADIENT,
                {
                    "states": states[some],
                    "prompt": place - place[0],
                    "row": row,
                    "uncond": self._uncond,
                    "norm_weight": per_row[0, row],
                    "cosine_weight": per_row[1, row],
                    "shift": np.array([operands == "cond_uncond"], dtype=np.float32),
                    "selection": _one_hot(place - place[0]),
                },
                ("norm", "cosine", "gradient"),
            )
            values[:, block] = norm, cosine
            found[some] += gradient
        _check_finite(values, found)
        norms, cosines = values.reshape(2, len(states), rows)
        return Gradient(
            norm=norms[:, :draws].mean(axis=1) * engine.directory.manifest.norm_factor,
            alignment=cosines[:, draws:].mean(axis=1) if rows > draws else np.full(len(states), np.nan),
            states=found,
        )

    def noise(self, states: Singles, latents: Singles, cotangent: Singles) -> Singles:
        engine, manifest = self._engine, self._engine.directory.manifest
        scale, told = manifest.epsilon_factor, manifest.guidance
        both, signs = np.stack([states, self._empty[0]]), np.array([scale, -scale], dtype=np.float32)
        # Both halves in one call, unless a single row is all that there is memory for.
        calls = [[0, 1]] if self._rows > 1 else [[0], [1]]
        found, most = np.zeros_like(latents), max(1, self._rows // 2)
        for start in range(0, len(latents), most):
            block = slice(start, start + most)
            count = len(latents[block])
            for halves in calls:
                prompt, row = np.divmod(np.arange(len(halves) * count), count)
                (gradient,) = engine.backend.run_graph(
                    NOISE_GRADIENT,
                    {
                        "states": both[halves],
                        "prompt": prompt,
                        "row": row,
                        "sample": latents[block],
                        "timestep": np.full(count, manifest.timesteps[0]),
                        "cotangent": np.concatenate([sign * cotangent[block] for sign in signs[halves]]),
                        "selection": _one_hot(row),
                        **({} if told is None else {"guidance": np.full(count, told)}),
                    },
                    ("gradient",),
                )
                found[block] += gradient
        _check_finite(found)
        return found


def _one_hot(index: Indices) -> Singles:
    """Return the matrix [K, R] that adds up rows [R] by an index [R] below K."""
    matrix: Singles = (np.arange(index.max() + 1)[:, None] == index).astype(np.float32)
    return matrix


def _check_finite(*arrays: npt.NDArray[np.floating]) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise NotFiniteError("A gradient holds NaN or infinity: run the model in a higher precision.")
