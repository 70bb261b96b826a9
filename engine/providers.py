"""The execution providers: one row each says what a provider is, what it can do and how to get it.

Everything else reads this table: who opens backends (engine/opening.py), what is missing (engine/probe.py), `memedge
doctor`, help texts and errors. A new provider is a file with a backend, and a row. This module imports nothing of size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from memedge.engine.errors import ProviderError, install, not_installed


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        name: what --provider calls it.
        product: what executes the graphs.
        module: which is imported.
        distribution: the package on PyPI that `module` comes from.
        backend: our module with the backend. It has `open_backend`, `precisions` and `missing` (opening.BackendModule).
        on_gpu: whether it needs an NVIDIA GPU.
        gradients: whether it runs gradient graphs.
        other_latents: whether it runs the UNet on other latents than the engine's own noise.
        binaries: of a GPU provider, the native part: the first of these that exists, in the folders beside `module`.
        libraries: where wheels put what the native part links, in the folders beside `module`.
    """

    name: str
    product: str
    module: str
    distribution: str
    backend: str
    on_gpu: bool = False
    gradients: bool = False
    other_latents: bool = False
    binaries: tuple[str, ...] = ()
    libraries: str = ""

    @property
    def remedy(self) -> str:
        """How to install it; the extra is called like the provider."""
        return install(self.name)

    @property
    def not_installed(self) -> str:
        """The one sentence for a provider whose runtime is not installed."""
        return not_installed(f"Provider {self.name!r}", self.product, self.name)


_ROWS = (
    Provider(
        name="tensorrt",
        product="TensorRT",
        module="tensorrt",
        distribution="tensorrt-cu13",
        backend="memedge.engine.tensorrt",
        on_gpu=True,
        binaries=("tensorrt_bindings/tensorrt.so", "tensorrt/tensorrt.so"),
        libraries="tensorrt_libs",
    ),
    Provider(
        name="tensorrt-rtx",
        product="TensorRT-RTX",
        module="tensorrt_rtx",
        distribution="tensorrt-rtx-cu13",
        backend="memedge.engine.tensorrt",
        on_gpu=True,
        binaries=("tensorrt_rtx_bindings/tensorrt_rtx.so",),
        libraries="tensorrt_rtx_libs",
    ),
    Provider(
        name="cuda",
        product="ONNX Runtime for GPUs",
        module="onnxruntime",
        distribution="onnxruntime-gpu",
        backend="memedge.engine.ort",
        on_gpu=True,
        gradients=True,
        other_latents=True,
        binaries=("onnxruntime/capi/libonnxruntime_providers_cuda.so",),
        libraries="nvidia/*/lib",
    ),
    Provider(
        name="openvino",
        product="OpenVINO",
        module="openvino",
        distribution="openvino",
        backend="memedge.engine.openvino",
    ),
    Provider(
        name="cpu",
        product="ONNX Runtime",
        module="onnxruntime",
        distribution="onnxruntime",
        backend="memedge.engine.ort",
        gradients=True,
        other_latents=True,
    ),
)
PROVIDERS = {row.name: row for row in _ROWS}  # in the order in which "auto" tries them: the fastest first


def find(name: str) -> Provider:
    """Return the row of a provider; raises ProviderError if there is none of that name."""
    if name not in PROVIDERS:
        names = ", ".join(("auto", *PROVIDERS))
        raise ProviderError(f"This version of memedge has no provider {name!r}: use one of {names}.")
    return PROVIDERS[name]


def check_gradients(name: str) -> None:
    """Raise ProviderError if a provider computes no gradients."""
    if not find(name).gradients:
        choice = _names(row.gradients for row in _ROWS)
        raise ProviderError(f"Provider {name!r} computes no gradients: use provider {choice}.")


def check_other_latents(name: str) -> None:
    """Raise ProviderError if a provider computes on the engine's own noise only."""
    if not find(name).other_latents:
        choice = _names(row.other_latents for row in _ROWS)
        raise ProviderError(
            f"Provider {name!r} computes on the engine's own noise only, and this needs other latents: use provider "
            f"{choice}."
        )


def _names(chosen: Iterable[bool]) -> str:
    """Return the rows that are chosen in words, those on the CPU first."""
    return " or ".join(repr(row.name) for row, yes in reversed(list(zip(_ROWS, chosen, strict=True))) if yes)
