"""TensorRT's Python modules, `tensorrt` (10 and 11) and `tensorrt_rtx`, which share most of their names."""

from importlib import import_module
from typing import Any

from memedge.engine.errors import ProviderError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def load_module(backend: str) -> Any:
    """Import the module of "tensorrt" or "tensorrt-rtx"; raises ProviderError if it cannot be."""
    try:
        return import_module(MODULES[backend])
    except (ImportError, OSError, RuntimeError) as error:  # its libraries are loaded by the import
        raise ProviderError(
            f"{backend} cannot be imported ({error}): run `python -m pip install 'memedge[{backend}]'`."
        ) from None


def make_logger(trt: Any) -> Any:
    """Return a logger for TensorRT that prints nothing and keeps the last error, in one line, as `reason`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.reason = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.reason = " ".join(message.split())

    return Logger()
