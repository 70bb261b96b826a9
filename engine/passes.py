"""One prompt's way through the engine: ids → states → ε_c at both timesteps → norm and alignment."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memedge.engine.backend import Backend, open_backend
from memedge.engine.directory import TOKENIZER, EngineDirectory
from memedge.engine.errors import IntegrityError, NotFiniteError
from memedge.engine.manifest import Alignment, Operands
from memedge.engine.reduction import reduce_rows
from memedge.engine.tokenizer import PromptTokenizer

# Latent values in one UNet call: bounds the memory of activations (16 rows of the embedded model, 4 of SD 1.x).
# On a CPU larger batches gain nothing (FACTS.md).
VALUES_PER_CALL = 1 << 16
# States closer than this to the empty prompt's, relative to its largest value, are the empty prompt: what is left
# of Δ is rounding, whose direction is noise.
EMPTY_TOLERANCE = 1e-5


class Engine:
    """An opened engine: verified files, a tokenizer, a backend and the cached baseline.

    Holds no mutable state, so that one engine may serve any number of threads.
    """

    def __init__(self, directory: EngineDirectory, backend: Backend):
        manifest = directory.manifest
        self.directory = directory
        self.backend = backend
        self._baseline = directory.baseline()
        self._tokenizer = PromptTokenizer(directory.file(TOKENIZER), manifest.tokens)
        self._empty_states = backend.encode(self.tokenize([""])[0])[0]
        if self._empty_states.shape != (manifest.tokens, manifest.state_width):
            raise IntegrityError(
                f"The text encoder of {directory.path} gives states of shape {list(self._empty_states.shape)}, not "
                f"[{manifest.tokens}, {manifest.state_width}] as its manifest says: export the engine again."
            )
        # The rows of one prompt: (timestep, draw) in C order, as ε_0 is stored.
        self._sample = np.concatenate([self._baseline.sample] * 2)
        self._timestep = np.repeat(np.array(manifest.timesteps, dtype=np.int64), manifest.draws)

    @staticmethod
    def open(path: Path, provider: str, precision: str | None, threads: int | None) -> "Engine":
        """Open and verify an engine directory; raises EngineError (see EngineDirectory.open, open_backend)."""
        directory = EngineDirectory.open(path)
        return Engine(directory, open_backend(directory, provider, precision, threads))

    @property
    def passes(self) -> int:
        """Conditional UNet evaluations per prompt: two timesteps times the draws."""
        return len(self._timestep)

    def tokenize(self, prompts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return ids, int64 [B, L], and whether each prompt was cut, bool [B]."""
        return self._tokenizer(prompts)

    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return prompt embeddings, float32 [B, L, D]."""
        return self.backend.encode(ids)

    def predict(self, states: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return ε_c, float32 [B, 2, n, C, H, W], for prompt embeddings [B, L, D], on the cached noise."""
        manifest = self.directory.manifest
        prompts, rows = len(states), self.passes
        prediction = np.empty((prompts * rows, *manifest.latent_shape), dtype=np.float32)
        per_call = max(1, VALUES_PER_CALL // int(np.prod(manifest.latent_shape)))
        for start in range(0, len(prediction), per_call):
            index = np.arange(start, min(start + per_call, len(prediction)))
            row = index % rows
            prediction[index] = self.backend.predict(self._sample[row], self._timestep[row], states[index // rows])
        return prediction.reshape(prompts, 2, manifest.draws, *manifest.latent_shape)

    def statistics(
        self, states: npt.NDArray[np.float32], alignment: Alignment, operands: Operands
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return norm and alignment, float64 [B] each, of prompt embeddings [B, L, D] (METHODS.md §1).

        Raises:
            NotFiniteError: the prompt embeddings or the UNet's output hold NaN or infinity.
        """
        if not np.isfinite(states).all():
            raise NotFiniteError("The prompt embeddings hold NaN or infinity, so there is no score to give.")
        rows = reduce_rows(self.predict(states), self._baseline.uncond, operands, self.backend.threads)
        cosine = rows.cosine(alignment)
        norm = self.directory.manifest.norm_factor * rows.norm[:, 0].mean(axis=1)
        distance = np.abs(states - self._empty_states).max(axis=(1, 2))
        empty = distance <= EMPTY_TOLERANCE * np.abs(self._empty_states).max()
        return np.where(empty, 0.0, norm), np.where(empty, 0.0, cosine[:, 1].mean(axis=1))
