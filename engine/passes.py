"""One prompt's way through the engine: ids → states → ε_c on cached rows → norms and alignments."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memedge.engine.backend import Backend, open_backend
from memedge.engine.directory import TOKENIZER, EngineDirectory
from memedge.engine.errors import IntegrityError
from memedge.engine.manifest import Alignment, Manifest, Operands
from memedge.engine.reduction import reduce_rows
from memedge.engine.tokenizer import PromptTokenizer
from memedge.engine.uncond import unconditional

# Latent values in one UNet call: bounds the memory of activations (16 rows of the embedded model, 4 of SD 1.x).
VALUES_PER_CALL = 1 << 16
# States closer than this to the empty prompt's, relative to its largest value, are the empty prompt: what is left
# of Δ is rounding, whose direction is noise.
EMPTY_TOLERANCE = 1e-5


def rows_per_call(manifest: Manifest) -> int:
    """Return how many rows one UNet call has at most, where nobody says otherwise."""
    if manifest.precision == "int8":
        return 1  # its products are scaled by the largest value in the call: rows must not meet others' values there
    return max(1, VALUES_PER_CALL // int(np.prod(manifest.latent_shape)))


class Engine:
    """An opened engine: verified files, a tokenizer, a backend and the cached baseline.

    A prompt has 2n rows, (timestep, draw) in C order: n at t_norm, then n at t_cos. Any number of threads may use one
    engine. `rows_per_call` is the most rows that one UNet call has; `uncond` is ε_0, float32 [2n, C, H, W].
    """

    def __init__(self, directory: EngineDirectory, backend: Backend, uncond: npt.NDArray[np.float32] | None = None):
        """Encode the empty prompt, and take ε_0 [2n, C, H, W] from the backend if it is not given."""
        manifest = directory.manifest
        self.directory = directory
        self.backend = backend
        self.draws = manifest.draws
        self.rows_per_call = rows_per_call(manifest)
        self._tokenizer = PromptTokenizer(directory.file(TOKENIZER), manifest.tokens)
        self._empty_states = self.backend.encode(self.tokenize([""])[0])[0]
        if self._empty_states.shape != (manifest.tokens, manifest.state_width):
            raise IntegrityError(
                f"The text encoder of {directory.path} gives states of shape {list(self._empty_states.shape)}, not "
                f"[{manifest.tokens}, {manifest.state_width}] as its manifest says: export the engine again."
            )
        self._tolerance = EMPTY_TOLERANCE * float(np.abs(self._empty_states).max())
        if uncond is None:
            uncond = unconditional(directory, backend, self._empty_states)
        self.uncond = uncond.reshape(2 * self.draws, *manifest.latent_shape)

    @staticmethod
    def open(path: Path, provider: str, precision: str | None, threads: int | None) -> "Engine":
        """Open and verify an engine directory; raises EngineError (see EngineDirectory.open, open_backend)."""
        directory = EngineDirectory.open(path)
        return Engine(directory, open_backend(directory, provider, precision, threads))

    @property
    def passes(self) -> int:
        """Conditional UNet evaluations per prompt: two timesteps times the draws."""
        return 2 * self.draws

    def tokenize(self, prompts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return ids, int64 [B, L], and whether each prompt was cut, bool [B]."""
        return self._tokenizer(prompts)

    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return prompt embeddings, float32 [B, L, D]."""
        return self.backend.encode(ids)

    def is_empty(self, states: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Return, bool [B], which prompt embeddings [B, L, D] are the empty prompt's, whose Δ is 0."""
        empty = self._is_near(states[:, 1], self._empty_states[1])  # BOS aside, few others pass even this far
        for prompt in np.flatnonzero(empty):
            empty[prompt] = self._is_near(states[prompt], self._empty_states).all()
        return empty

    def _is_near(self, states: npt.NDArray[np.float32], empty: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Return whether each vector [..., D] is the empty prompt's, but for rounding."""
        near: npt.NDArray[np.bool_] = np.abs(states - empty).max(axis=-1) <= self._tolerance
        return near

    def predict(self, states: npt.NDArray[np.float32], rows: range) -> npt.NDArray[np.float32]:
        """Return ε_c, float32 [B, k, C, H, W], for prompt embeddings [B, L, D] on k of each prompt's rows."""
        total = len(states) * len(rows)
        parts = []
        for start in range(0, total, self.rows_per_call):
            prompt, row = np.divmod(np.arange(start, min(start + self.rows_per_call, total)), len(rows))
            first = prompt[0]
            parts.append(self.backend.predict(states[first : prompt[-1] + 1], prompt - first, row + rows.start))
        prediction = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return prediction.reshape(len(states), len(rows), *self.directory.manifest.latent_shape)

    def norm(self, states: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Return the norm, float64 [B]: n passes per prompt."""
        norm: npt.NDArray[np.float64] = self._statistics(states, range(self.draws), "channel", "uncond_delta")[0]
        return np.asarray(norm.mean(axis=1))

    def alignments(
        self, states: npt.NDArray[np.float32], draw: int, alignment: Alignment, operands: Operands
    ) -> npt.NDArray[np.float64]:
        """Return the alignment on one draw, float64 [B]: one pass per prompt."""
        row = self.draws + draw
        return self._statistics(states, range(row, row + 1), alignment, operands)[1][:, 0]

    def statistics(
        self, states: npt.NDArray[np.float32], alignment: Alignment, operands: Operands
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return norm and alignment, float64 [B] each, of prompt embeddings [B, L, D] (METHODS.md §1): 2n passes."""
        norm, cosine = self._statistics(states, range(self.passes), alignment, operands)
        return norm[:, : self.draws].mean(axis=1), cosine[:, self.draws :].mean(axis=1)

    def _statistics(
        self, states: npt.NDArray[np.float32], rows: range, alignment: Alignment, operands: Operands
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return ‖Δ‖ (scaled for v-prediction) and cosine on each of k rows, float64 [B, k].

        Raises:
            NotFiniteError: the UNet's output holds NaN or infinity.
        """
        uncond = self.uncond[rows.start : rows.stop]
        result = reduce_rows(self.predict(states, rows), uncond, operands, self.backend.threads)
        some = ~self.is_empty(states)[:, None]
        return self.directory.manifest.norm_factor * result.norm * some, result.cosine(alignment) * some
