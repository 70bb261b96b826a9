"""The border to whatever executes the graphs: what a backend does."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.arrays import Floats, Indices
from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import ProviderError
from memedge.engine.manifest import key_of
from memedge.engine.memory import Memory, Tensor


class Backend(ABC):
    """Executes one engine's text encoder and UNet in one memory. Safe to call from several threads at once.

    Only ids go in and statistics come out: prompt embeddings and predictions stay in the backend's memory. Only the
    thread whose call made a tensor may use it. Once that thread has downloaded something, all threads may.

    Attributes:
        identity: the runtime, its version, and what else its rounding depends on.
        most_rows: the most rows of one call, or None where only memory limits it.
        one_shape: whether calls should all have the same number of rows, because a change of it costs much.
        screens: whether it has `change` and `at_tap`.
        forks: whether a forked child may go on with it. Runtimes are not made for it: OpenVINO hangs, CUDA fails.
    """

    provider: str
    precision: str
    threads: int
    identity: str
    most_rows: int | None = None
    one_shape: bool = False
    forks: bool = False
    screens: bool = True

    @property
    def key(self) -> str:
        """What calibrations, and ε_0 where it is kept, are keyed by."""
        return key_of(self.provider, self.precision)

    @property
    @abstractmethod
    def memory(self) -> Memory:
        """Where this backend's tensors lie."""

    def prepare(self) -> None:  # noqa: B027 - most have nothing to prepare
        """Make ready for every number of rows that calls may have, as a server's have."""

    def record(self, most: int) -> None:  # noqa: B027 - most have nothing to record
        """Record calls of one prompt, of at most `most` rows, where that makes them faster; takes memory and seconds.

        What cannot be recorded runs as before, and a warning says so.
        """

    def padded(self, rows: int, most: int) -> int:
        """Return to how many rows a call of `rows` should be filled up, where calls have at most `most`."""
        return most if self.one_shape else rows

    @abstractmethod
    def encode(self, ids: Indices) -> Tensor:
        """Return the text encoder's states, float32 [B, K, D], of ids [B, T · L] (engine/tokenizer.py)."""

    @abstractmethod
    def predict(self, states: Tensor, prompt: Indices, row: Indices) -> Tensor:
        """Return the UNet's output, float32 [R, C, H, W], for states [B, K, D].

        Row r is for the prompt states[prompt[r]], on the noise and timestep of the cached row row[r]; both are [R].
        """

    @abstractmethod
    def statistics(self, states: Tensor, prompt: Indices, row: Indices, uncond: Tensor, operands: str) -> Floats:
        """Return norm, channel and flat cosine of each row's guidance vector, float64 [3, R]; NaN if not finite.

        As `predict`, with ε_0 [2n, C, H, W] of all cached rows.
        """

    def change(self, tap: int, states: Tensor, prompt: Indices, row: Indices, reference: Tensor) -> Floats:
        """Return how far a tap's channels are from a reference, float64 [R, C]: the L2 norm over the pixels.

        Args:
            tap: which of the manifest's taps, from 1.
            states: as in `predict`.
            prompt: as in `predict`.
            row: as in `predict`, each below n.
            reference: float32 [n, ...], of each row; see `at_tap`.
        """
        raise NotImplementedError

    def at_tap(self, tap: int, states: Tensor) -> Tensor:
        """Return a tap's value on the first n rows, float32 [n, ...], for the first prompt of `states`."""
        raise NotImplementedError

    def predict_at(
        self,
        states: Tensor,
        prompt: Indices,
        row: Indices,
        latents: npt.NDArray[np.float32],
        timestep: int,
        guidance: float | None,
    ) -> Tensor:
        """Return the UNet's output, float32 [R, C, H, W], as `predict`, with latents of the caller's.

        Row r is on latents[row[r]], of at most 2n latents [K, C, H, W], all at one timestep, and told one guidance
        scale if the model is told any. Only providers with `other_latents` have it.
        """
        raise NotImplementedError

    def run_graph(
        self,
        name: str,
        inputs: Mapping[str, npt.NDArray[Any]],
        outputs: Sequence[str],
    ) -> list[npt.NDArray[Any]]:
        """Return outputs of another of the engine's graphs, a file's name; the cached inputs need not be given.

        Only providers with `gradients` have it.

        Raises:
            IntegrityError: the graph is refused, or it has other inputs or outputs.
        """
        raise NotImplementedError


def check_own_precision(directory: EngineDirectory, provider: str, precision: str | None) -> None:
    """Raise ProviderError if an engine is asked for in another precision than it was exported in."""
    own = directory.manifest.precision
    if precision not in (None, own):
        raise ProviderError(
            f"{directory.path} is an {own} engine and provider {provider!r} cannot run it in {precision!r}: leave the "
            f"precision out, or export one with `memedge export --precision {precision}`."
        )
