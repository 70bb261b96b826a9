"""Who runs an engine: the choice of a provider, and its backend."""

from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

from memedge.engine import probe
from memedge.engine.backend import Backend
from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import ProviderError
from memedge.engine.manifest import key_of
from memedge.engine.providers import PROVIDERS, Provider, check_gradients, find


class BackendModule(Protocol):
    """What the module of a backend holds beside it."""

    def open_backend(
        self, directory: EngineDirectory, provider: Provider, precision: str | None, threads: int | None
    ) -> Backend:
        """Return the backend.

        Raises:
            ProviderError: it cannot run the engine here, or not in this precision.
        """

    def precisions(self, own: str) -> tuple[str, ...]:
        """Return the precisions in which it runs an engine of precision `own` here, the fastest first."""

    def missing(self, directory: EngineDirectory, provider: Provider) -> str | None:
        """Return what the engine lacks to be run here, in one sentence that says what to do, or None."""


def backend_module(provider: Provider) -> BackendModule:
    """Import the module of a provider's backend, which imports its runtime.

    Raises:
        ProviderError: the runtime is not installed, or cannot be loaded.
    """
    if find_spec(provider.module) is None:
        raise ProviderError(provider.not_installed)
    try:
        return cast(BackendModule, import_module(provider.backend))
    except ImportError as error:
        raise ProviderError(f"{provider.product} cannot be loaded ({error}): {provider.remedy}.") from None


def open_backend(
    directory: EngineDirectory, provider: str, precision: str | None, threads: int | None, *, gradients: bool = False
) -> Backend:
    """Return the backend for a provider.

    Args:
        directory: the engine.
        provider: one of PROVIDERS, or "auto": the first of them that is installed, can run the engine and is calibrated
            in it, in the first of its precisions that is. In an engine without calibrations it is "cpu", which the
            export computed the baseline with, if that is installed.
        precision: of the UNet; default: the provider's best.
        threads: per call; default: as many as this process may use.
        gradients: take a provider that computes gradients.

    Raises:
        ProviderError: an unknown provider, one that cannot run here, or a precision that cannot be had.
    """
    if provider == "auto":
        provider, precision = automatic(directory, precision, gradients)
    row = find(provider)
    if gradients:
        check_gradients(provider)
    if row.on_gpu:
        if directory.manifest.precision == "int8":
            raise ProviderError(
                f"{directory.path} is an int8 engine, which GPUs do not run: export one in fp16 or fp32."
            )
        if missing := probe.missing_for(provider):
            raise ProviderError(missing)
    return backend_module(row).open_backend(directory, row, precision, threads)


def automatic(directory: EngineDirectory, precision: str | None, gradients: bool) -> tuple[str, str | None]:
    """Return the provider and precision that "auto" stands for."""
    rows = [row for row in PROVIDERS.values() if row.gradients or not gradients]
    calibrated = directory.manifest.calibrations
    # What is cheap to know comes first: some answers load a runtime.
    known = [row for row in rows if any(key.startswith(f"{row.name}-") for key in calibrated)]
    for provider, candidate in _runnable(directory, known):
        if precision in (None, candidate) and key_of(provider, candidate) in calibrated:
            return provider, candidate
    here = [row.name for row in reversed(rows) if not row.on_gpu and find_spec(row.module)]
    return (here or ["cpu"])[0], precision


def runnable(directory: EngineDirectory) -> list[tuple[str, str]]:
    """Return each provider that can run an engine here with each of its precisions, in the order of "auto".

    Were the engine calibrated for all of them, "auto" would be the first.
    """
    return list(_runnable(directory, PROVIDERS.values()))


def _runnable(directory: EngineDirectory, rows: Iterable[Provider]) -> Iterator[tuple[str, str]]:
    own = directory.manifest.precision
    for row in rows:
        if (row.on_gpu and own == "int8") or probe.missing_for(row.name):
            continue
        module = backend_module(row)
        for precision in module.precisions(own):
            if module.missing(directory, row) is None:
                yield row.name, precision
