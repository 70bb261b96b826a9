"""The border to whatever executes the graphs: a protocol, and the choice of provider."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import ProviderError

PROVIDERS = ("cpu",)  # in the order in which "auto" tries them


class Backend(Protocol):
    """Executes one engine's text encoder and UNet. Safe to call from several threads at once."""

    provider: str
    precision: str
    threads: int

    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the text encoder's states, float32 [B, L, D], of ids [B, L]."""

    def predict(
        self, sample: npt.NDArray[np.float32], timestep: npt.NDArray[np.int64], states: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Return the UNet's output, float32 [R, C, H, W], of sample [R, C, H, W], timestep [R], states [R, L, D]."""


def open_backend(directory: EngineDirectory, provider: str, precision: str | None, threads: int | None) -> Backend:
    """Return the backend for `provider`; "auto" takes the first of PROVIDERS.

    Raises:
        ProviderError: an unknown provider, one that is not installed, or a precision the engine does not have.
    """
    if provider != "auto" and provider not in PROVIDERS:
        raise ProviderError(f"This version of memedge has no provider {provider!r}: use one of auto, {PROVIDERS[0]}.")
    own = directory.manifest.precision
    if precision not in (None, own):
        raise ProviderError(
            f"{directory.path} is an {own} engine and cannot run in {precision!r}: leave the precision out, "
            f"or export one with `memedge export --precision {precision}`."
        )
    from memedge.engine.ort import OrtBackend  # here, so that importing memedge loads no runtime

    return OrtBackend(directory.path, own, threads)
