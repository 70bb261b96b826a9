"""The border to whatever executes the graphs: a protocol, and the choice of provider."""

from importlib.util import find_spec
from typing import Protocol

import numpy as np
import numpy.typing as npt

from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import ProviderError

# In the order in which "auto" tries them: the fastest first. Provider -> the package it needs.
PROVIDERS = {"openvino": "openvino", "cpu": "onnxruntime"}


class Backend(Protocol):
    """Executes one engine's text encoder and UNet. Safe to call from several threads at once."""

    provider: str
    precision: str
    threads: int
    identity: str
    """The runtime, its version, and what else its rounding depends on."""

    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the text encoder's states, float32 [B, L, D], of ids [B, L]."""

    def predict(
        self, states: npt.NDArray[np.float32], prompt: npt.NDArray[np.int64], row: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return the UNet's output, float32 [R, C, H, W], for states [B, L, D].

        Row r is for the prompt states[prompt[r]], on the noise and timestep of the cached row row[r]; both are [R].
        """


def open_backend(directory: EngineDirectory, provider: str, precision: str | None, threads: int | None) -> Backend:
    """Return the backend for `provider`.

    "auto" takes the first of PROVIDERS that is installed and calibrated in this engine, in the first of its precisions
    that is. In an engine without calibrations it is "cpu", which the export computed the baseline with, if installed.

    Raises:
        ProviderError: an unknown provider, one that is not installed, or a precision that cannot be had.
    """
    if provider == "auto":
        provider, precision = _automatic(directory, precision)
    if provider not in PROVIDERS:
        names = ", ".join(("auto", *PROVIDERS))
        raise ProviderError(f"This version of memedge has no provider {provider!r}: use one of {names}.")
    if provider == "openvino":
        from memedge.engine.openvino import OpenVinoBackend  # here, so that importing memedge loads no runtime

        return OpenVinoBackend(directory, precision, threads)
    own = directory.manifest.precision
    if precision not in (None, own):
        raise ProviderError(
            f"{directory.path} is an {own} engine and ONNX Runtime cannot run it in {precision!r}: leave the precision "
            f"out, or export one with `memedge export --precision {precision}`."
        )
    from memedge.engine.ort import OrtBackend

    return OrtBackend(directory.path, directory.baseline.cached, own, threads)


def _automatic(directory: EngineDirectory, precision: str | None) -> tuple[str, str | None]:
    """Return the provider and precision that "auto" stands for."""
    own = directory.manifest.precision
    for provider, package in PROVIDERS.items():
        if find_spec(package) is None:
            continue
        if provider == "openvino":
            from memedge.engine.openvino import precisions

            candidates = precisions(own)
        else:
            candidates = (own,)
        for candidate in candidates:
            if precision in (None, candidate) and f"{provider}-{candidate}" in directory.manifest.calibrations:
                return provider, candidate
    alone = find_spec("onnxruntime") is None and find_spec("openvino") is not None
    return ("openvino" if alone else "cpu"), precision
