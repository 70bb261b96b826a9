"""TensorRT's Python modules, `tensorrt` (10 and 11) and `tensorrt_rtx`, which share most of their names."""

from importlib import import_module
from typing import Any, Literal

from memedge.engine.errors import ProviderError
from memedge.engine.providers import PROVIDERS

PlanProvider = Literal["tensorrt", "tensorrt-rtx"]


def plan_provider(provider: str) -> PlanProvider:
    """Return the name of a provider that runs plans as the type that it is."""
    return "tensorrt" if provider == "tensorrt" else "tensorrt-rtx"


def load_module(provider: PlanProvider) -> Any:
    """Import the module of a provider; raises ProviderError if it cannot be."""
    row = PROVIDERS[provider]
    try:
        return import_module(row.module)
    except (ImportError, OSError) as error:  # OSError: the package is there, its libraries are not
        raise ProviderError(f"{row.product} cannot be loaded ({error}): {row.remedy}.") from None


def make_logger(trt: Any) -> Any:
    """Return a logger for TensorRT that prints nothing and keeps the last error, in one line, as `reason`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.reason = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.reason = one_line(message)

    return Logger()


def one_line(text: str) -> str:
    """Return the text without line breaks and final stop, for a sentence of ours."""
    return " ".join(text.split()).rstrip(".") or "no reason given"
