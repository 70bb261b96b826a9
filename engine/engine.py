"""One prompt's way through the engine: ids → states → ε_c on cached rows → norms and alignments."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memedge.engine.arrays import Bools, Floats, Indices
from memedge.engine.backend import Backend
from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import InputError, IntegrityError, NotFiniteError, ProviderError
from memedge.engine.manifest import Alignment, Manifest, Operands
from memedge.engine.memory import Tensor, part, take
from memedge.engine.native import CALLS
from memedge.engine.opening import open_backend
from memedge.engine.tokenizer import PromptTokenizer
from memedge.engine.uncond import unconditional

# Latent values in one UNet call: bounds the memory of activations (16 rows of the embedded model, 4 of SD 1.x).
VALUES_PER_CALL = 1 << 16
# States closer than this to the empty prompt's, relative to its largest value, are the empty prompt: what is left
# of Δ is rounding, whose direction is noise.
EMPTY_TOLERANCE = 1e-5
INDEX = {"channel": 1, "flat": 2}  # of the alignments in Backend.statistics


@dataclass(frozen=True)
class States:
    """Prompt embeddings of B prompts.

    Attributes:
        tensor: float32 [B, L, D], in the backend's memory.
        empty: bool [B], which are the empty prompt's, whose Δ is 0.
    """

    tensor: Tensor
    empty: Bools

    @property
    def all(self) -> Indices:
        """The indices of all prompts."""
        return np.arange(len(self.empty))


def rows_per_call(manifest: Manifest) -> int:
    """Return how many rows one UNet call has at most, where nobody says otherwise."""
    return max(1, VALUES_PER_CALL // int(np.prod(manifest.latent_shape)))


class Engine:
    """An opened engine: verified files, a tokenizer, a backend and the cached baseline.

    A prompt has 2n rows, (timestep, draw) in C order: n at t_norm, then n at t_cos. Any number of threads may use one
    engine. `rows_per_call` is the most rows that one UNet call has; `uncond` is ε_0, float32 [2n, C, H, W], in the
    backend's memory; `tokenizer` is the prompts'.
    """

    def __init__(self, directory: EngineDirectory, backend: Backend, uncond: Tensor | None = None):
        """Encode the empty prompt, and have ε_0 [2n, C, H, W] computed by the backend if it is not given."""
        manifest = directory.manifest
        self.directory = directory
        self.backend = backend
        self._process = os.getpid()
        self.draws = manifest.draws
        self.rows_per_call = min(rows_per_call(manifest), backend.most_rows or VALUES_PER_CALL)
        self.tokenizer = PromptTokenizer(directory.tokenizers, directory.token_lengths)
        self._empty_ids = self.tokenize([""])[0]
        empty = backend.encode(self._empty_ids)
        if empty.shape[1:] != manifest.states_shape:
            raise IntegrityError(
                f"The text encoder of {directory.path} gives states of shape {list(empty.shape[1:])}, not "
                f"{list(manifest.states_shape)} as its manifest says: export the engine again."
            )
        self._empty_states = backend.memory.download(empty)[0]
        self._references: dict[int, Tensor] = {}  # of the screen, by tap
        self._tolerance = EMPTY_TOLERANCE * float(np.abs(self._empty_states).max())
        if uncond is None:
            array = unconditional(directory, backend, empty).reshape(2 * self.draws, *manifest.latent_shape)
            uncond = backend.memory.upload(array)
            backend.memory.wait()  # from here on it is for all threads
        self.uncond = uncond

    @staticmethod
    def open(
        path: Path, provider: str, precision: str | None, threads: int | None, *, gradients: bool = False
    ) -> "Engine":
        """Open and verify an engine directory; `gradients`: on a provider that computes them.

        Raises:
            EngineError: see EngineDirectory.open, opening.open_backend.
            InputError: threads is not positive.
        """
        if threads is not None and threads < 1:
            raise InputError(f"threads is {threads}: give at least 1, or leave it out to use all cores.")
        directory = EngineDirectory.open(path)
        return Engine(directory, open_backend(directory, provider, precision, threads, gradients=gradients))

    @property
    def passes(self) -> int:
        """Conditional UNet evaluations per prompt: two timesteps times the draws."""
        return 2 * self.draws

    @property
    def first_word(self) -> int:
        """The row of a prompt's first word among its states; those before it are the same in all prompts.

        Of a template's ids the first have no states: those that are left when the rows and the template's end, whose
        ids have room of their own, are taken away.
        """
        manifest = self.directory.manifest
        if not manifest.masked:
            # Where one tokenizer's tokens alone have rows, as T5's of Flux, it is the last.
            alone = len(manifest.token_lengths) > 1 and manifest.tokens == manifest.token_lengths[-1]
            return self.tokenizer.around[-1 if alone else 0][0]
        ((before, behind),) = self.tokenizer.around
        without = manifest.lengths(1)[0] - manifest.tokens - behind
        return max(0, before - without)

    def tokenize(self, prompts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return ids, int64 [B, T · L] of T tokenizers, and whether each prompt was cut, bool [B]."""
        with CALLS:
            return self.tokenizer(prompts)

    def encode(self, ids: Indices) -> States:
        """Return the prompt embeddings of ids [B, T · L].

        Raises:
            ProviderError: this process was forked from the one that opened the engine, on a provider that hangs there.
            InputError: the engine was exported without its text encoder, and one is not the empty prompt.
        """
        self._check_process()
        empty = (ids == self._empty_ids).all(axis=1)
        if not (self.directory.manifest.reads_prompts or empty.all()):
            raise InputError(
                f"{self.directory.path} was exported without its text encoder, and reads no prompts: give "
                "score_embeddings what the pipeline's encode_prompt returns, or export it with one."
            )
        with CALLS:
            states = self.backend.encode(ids)
        return States(states, empty)

    def embed(self, array: npt.NDArray[np.float32]) -> States:
        """Return prompt embeddings [B, L, D] as they are; raises ProviderError as `encode`."""
        self._check_process()
        first = self.first_word
        empty = self._is_near(array[:, first], self._empty_states[first])  # few others pass even this far
        for prompt in np.flatnonzero(empty):
            empty[prompt] = self._is_near(array[prompt], self._empty_states).all()
        return States(self.backend.memory.upload(array), empty)

    def select(self, states: States, prompts: Indices) -> States:
        """Return the embeddings of K prompts, ascending indices, of some."""
        return States(take(self.backend.memory, states.tensor, prompts), states.empty[prompts])

    def _check_process(self) -> None:
        if not self.backend.forks and os.getpid() != self._process:
            raise ProviderError(
                f"Provider {self.backend.provider!r} does not work in a process that was forked after the engine was "
                "opened: open it in each process, start processes by spawn, or use provider 'cpu'."
            )

    def _is_near(self, states: npt.NDArray[np.float32], empty: npt.NDArray[np.float32]) -> Bools:
        """Return whether each vector [..., D] is the empty prompt's, but for rounding."""
        near: Bools = np.abs(states - empty).max(axis=-1) <= self._tolerance
        return near

    def changes(self, states: States, tap: int) -> Floats:
        """Return how far a tap's channels are from the empty prompt's at t_norm, float64 [B, C].

        The mean over the draws. Of each channel, the L2 norm over the pixels, NaN where it is not finite; this takes
        n × `manifest.tap_share(tap)` passes per prompt.

        Args:
            states: of B prompts.
            tap: which of the manifest's taps, from 1.

        Raises:
            ProviderError: the provider has no graph of the tap here (`backend.screens`).
        """
        place, row = np.divmod(np.arange(len(states.empty) * self.draws), self.draws)
        reference, parts = self._reference(tap), []
        for start in range(0, len(row), self.rows_per_call):
            block = slice(start, start + self.rows_per_call)
            first, last = int(place[block][0]), int(place[block][-1])
            prompt = place[block] - first
            with CALLS:
                tensor = part(states.tensor, first, last - first + 1)
                found = self.backend.change(tap, tensor, self.filled(prompt), self.filled(row[block]), reference)
            parts.append(found[: len(prompt)])
        return np.asarray(np.concatenate(parts).reshape(len(states.empty), self.draws, -1).mean(axis=1))

    def _reference(self, tap: int) -> Tensor:
        """Return a tap's value for the empty prompt, [n, ...]; computed once."""
        if tap not in self._references:  # by several threads at once it is computed more than once, and the same
            memory = self.backend.memory
            with CALLS:
                found = self.backend.at_tap(tap, memory.upload(self._empty_states[None]))
                memory.wait()  # from here on it is for all threads
            self._references.setdefault(tap, found)
        return self._references[tap]

    def norm(self, states: States) -> Floats:
        """Return the norm, float64 [B]: n passes per prompt."""
        return np.asarray(self.norms(states, self.draws).mean(axis=1))

    def norms(self, states: States, draws: int) -> Floats:
        """Return ‖Δ‖ at t_norm on the first `draws` draws, float64 [B, draws]: as many passes per prompt."""
        return self._statistics(states, states.all, range(draws), "channel", "uncond_delta")[0]

    def alignments(
        self, states: States, prompts: Indices, draw: int, alignment: Alignment, operands: Operands
    ) -> Floats:
        """Return the alignment of K prompts (ascending indices) on one draw, float64 [K]: one pass per prompt."""
        row = self.draws + draw
        return self._statistics(states, prompts, range(row, row + 1), alignment, operands)[1][:, 0]

    def statistics(self, states: States, alignment: Alignment, operands: Operands) -> tuple[Floats, Floats]:
        """Return norm and alignment, float64 [B] each (docs/methods.md §1): 2n passes per prompt."""
        norm, cosine = self.per_draw(states, alignment, operands)
        return norm.mean(axis=1), cosine.mean(axis=1)

    def per_draw(self, states: States, alignment: Alignment, operands: Operands) -> tuple[Floats, Floats]:
        """Return ‖Δ‖ at t_norm and the cosine at t_cos on each draw, float64 [B, n] each: 2n passes per prompt."""
        norm, cosine = self._statistics(states, states.all, range(self.passes), alignment, operands)
        return norm[:, : self.draws], cosine[:, self.draws :]

    def filled(self, index: Indices, rows: int | None = None) -> Indices:
        """Return an index of one call's rows, its last one repeated to fill `rows`.

        Default: all that a call may have if the backend wants one shape, else no more than there are.
        """
        if rows is None:
            rows = self.rows_per_call if self.backend.one_shape else len(index)
        return np.pad(index, (0, rows - len(index)), mode="edge") if rows > len(index) else index

    def measure(self, states: Tensor, prompt: Indices, row: Indices, operands: Operands) -> Floats:
        """Return ‖Δ‖, not scaled, and both cosines, float64 [3, R], of any rows of any prompts; NaN where not finite.

        Args:
            states: prompt embeddings [B, K, D].
            prompt: [R]: whose row each is. Calls have at most `rows_per_call` of them.
            row: [R], each in [0, 2n).
            operands: the cosine's pair.
        """
        parts = []
        for start in range(0, len(row), self.rows_per_call):
            block = slice(start, start + self.rows_per_call)
            some, place = np.unique(prompt[block], return_inverse=True)
            rows = self.backend.padded(len(place), self.rows_per_call)
            with CALLS:
                tensor = take(self.backend.memory, states, some)
                found = self.backend.statistics(
                    tensor, self.filled(place, rows), self.filled(row[block], rows), self.uncond, operands
                )
            parts.append(found[:, : len(place)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _statistics(
        self, states: States, prompts: Indices, rows: range, alignment: Alignment, operands: Operands
    ) -> tuple[Floats, Floats]:
        """Return ‖Δ‖ (scaled for v-prediction) and cosine on each of k rows of K prompts, float64 [K, k].

        Raises:
            NotFiniteError: the UNet's output holds NaN or infinity.
        """
        place, row = np.divmod(np.arange(len(prompts) * len(rows)), len(rows))
        result = self.measure(states.tensor, prompts[place], row + rows.start, operands)
        if bad := int(np.isnan(result[0]).sum()):
            raise NotFiniteError(
                f"{bad} of {len(row)} predictions hold NaN, infinity or values too large to square: no score is made "
                "from them; run the model in a higher precision."
            )
        norm, cosine = (part.reshape(len(prompts), len(rows)) for part in (result[0], result[INDEX[alignment]]))
        known = ~states.empty[prompts][:, None]
        return self.directory.manifest.norm_factor * norm * known, cosine * known
