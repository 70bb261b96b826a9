"""The border to whatever executes the graphs: what a backend does, and the choice of provider."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import EngineError, ProviderError
from memedge.engine.memory import HostMemory, Memory, Tensor
from memedge.engine.tensorrt_module import plan_backend

# In the order in which "auto" tries them: the fastest first. Provider -> the module it needs.
PROVIDERS = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "cuda": "onnxruntime",
    "openvino": "openvino",
    "cpu": "onnxruntime",
}
ON_GPU = ("tensorrt", "tensorrt-rtx", "cuda")


Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Backend(ABC):
    """Executes one engine's text encoder and UNet in one memory. Safe to call from several threads at once.

    Only ids go in and statistics come out: prompt embeddings and predictions stay in the backend's memory. A tensor is
    for the thread whose call made it, until that thread has downloaded something; then for all.

    Attributes:
        identity: the runtime, its version, and what else its rounding depends on.
        most_rows: the most rows of one call, or None where only memory limits it.
        one_shape: whether calls of ever different numbers of rows cost more than filling each up to the same.
    """

    provider: str
    precision: str
    threads: int
    identity: str
    most_rows: int | None = None
    one_shape: bool = False

    @property
    def key(self) -> str:
        """What calibrations, and ε_0 where it is kept, are keyed by."""
        return f"{self.provider}-{self.precision}"

    @property
    @abstractmethod
    def memory(self) -> Memory:
        """Where this backend's tensors lie."""

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

    def predict_at(
        self,
        states: Tensor,  # noqa: ARG002
        prompt: Indices,  # noqa: ARG002
        row: Indices,  # noqa: ARG002
        latents: npt.NDArray[np.float32],  # noqa: ARG002
        timestep: int,  # noqa: ARG002
    ) -> Tensor:
        """Return the UNet's output, float32 [R, C, H, W], as `predict`, with latents of the caller's.

        Row r is on latents[row[r]], of at most 2n latents [K, C, H, W], all at one timestep.

        Raises:
            ProviderError: this backend computes on the engine's own noise only.
        """
        raise ProviderError(
            f"Provider {self.provider!r} computes on the engine's own noise only, and this needs other latents: use "
            "provider 'cpu' or 'cuda'."
        )

    def evaluate(
        self,
        name: str,  # noqa: ARG002
        inputs: Mapping[str, npt.NDArray[Any]],  # noqa: ARG002
        outputs: Sequence[str],  # noqa: ARG002
    ) -> list[npt.NDArray[Any]]:
        """Return outputs of another of the engine's graphs, a file's name; the cached inputs need not be given.

        Raises:
            ProviderError: this backend runs the text encoder and the UNet alone.
            IntegrityError: ONNX Runtime refuses the graph, or it has other inputs or outputs.
        """
        raise ProviderError(f"Provider {self.provider!r} computes no gradients: use provider 'cpu' or 'cuda'.")


def open_backend(directory: EngineDirectory, provider: str, precision: str | None, threads: int | None) -> Backend:
    """Return the backend for `provider`.

    "auto" takes the first of PROVIDERS that is installed and calibrated in this engine, in the first of its precisions
    that is. In an engine without calibrations it is "cpu", which the export computed the baseline with, if installed.

    Raises:
        ProviderError: an unknown provider, one that cannot run here, or a precision that cannot be had.
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
            f"{directory.path} is an {own} engine and provider {provider!r} cannot run it in {precision!r}: leave the "
            f"precision out, or export one with `memedge export --precision {precision}`."
        )
    if provider in ON_GPU:
        return _open_on_gpu(directory, provider)
    from memedge.engine.ort import OrtBackend

    return OrtBackend(directory.path, directory.baseline.cached, own, HostMemory(threads), threads)


def _open_on_gpu(directory: EngineDirectory, provider: str) -> Backend:
    from memedge.engine import probe

    own = directory.manifest.precision
    if own == "int8":
        raise ProviderError(f"{directory.path} is an int8 engine, which GPUs do not run: export one in fp16 or fp32.")
    if missing := probe.missing_for(provider):
        raise ProviderError(missing)
    from memedge.engine.cuda import CudaMemory

    if provider == "cuda":
        from memedge.engine.ort import OrtBackend

        return OrtBackend(directory.path, directory.baseline.cached, own, CudaMemory(), 1)
    from memedge.engine.tensorrt import TensorRtBackend

    return TensorRtBackend(directory, plan_backend(provider), CudaMemory, probe.driver().gpus[0])


def _automatic(directory: EngineDirectory, precision: str | None) -> tuple[str, str | None]:
    """Return the provider and precision that "auto" stands for."""
    own = directory.manifest.precision
    for provider in PROVIDERS:
        for candidate in _candidates(provider, own):
            wanted = precision in (None, candidate) and f"{provider}-{candidate}" in directory.manifest.calibrations
            if wanted and _can_run(directory, provider):
                return provider, candidate
    alone = find_spec("onnxruntime") is None and find_spec("openvino") is not None
    return ("openvino" if alone else "cpu"), precision


def _candidates(provider: str, own: str) -> tuple[str, ...]:
    """Return the precisions that a provider runs an engine of precision `own` in, if it is installed."""
    if find_spec(PROVIDERS[provider]) is None:
        return ()
    if provider == "openvino":
        from memedge.engine.openvino import precisions

        return precisions(own)
    return (own,)


def _can_run(directory: EngineDirectory, provider: str) -> bool:
    """Return whether this machine, and for TensorRT the plans it has, let an installed provider run the engine."""
    if provider not in ON_GPU:
        return True
    from memedge.engine import probe

    if probe.missing_for(provider) is not None:
        return False
    if provider == "cuda":
        return True
    from memedge.engine.tensorrt import find_plans

    try:
        find_plans(directory, plan_backend(provider), probe.driver().gpus[0])
    except EngineError:
        return False
    return True
