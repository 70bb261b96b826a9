"""ONNX Runtime on the CPU."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.directory import TEXT_ENCODER, UNET
from memedge.engine.errors import IntegrityError, ProviderError

try:
    import onnxruntime
except ImportError:
    raise ProviderError(
        "Provider 'cpu' needs ONNX Runtime, which is not installed: run `python -m pip install 'memedge[cpu]'`."
    ) from None

EXECUTION_PROVIDER = "CPUExecutionProvider"


def usable_processors() -> int:
    """Return how many processors this process may use, which under taskset or in a container is not all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class OrtBackend:
    """A text encoder and a UNet as ONNX Runtime sessions, whose `run` may be called from several threads."""

    provider = "cpu"

    def __init__(self, folder: Path, precision: str, threads: int | None = None):
        """Load both graphs in `folder`, to run on `threads` threads (default: as many as this process may use).

        `precision` is what the graphs were exported in; it is reported, not chosen here.

        Raises:
            ProviderError: ONNX Runtime did not give the CPU provider.
            IntegrityError: ONNX Runtime refuses a graph.
        """
        self.threads = threads or usable_processors()
        self.precision = precision
        self._text_encoder = self._session(folder / TEXT_ENCODER)
        self._unet = self._session(folder / UNET)

    def _session(self, path: Path) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # warnings are about graph clean-ups, which users can do nothing about
        try:
            session = onnxruntime.InferenceSession(path, options, providers=[EXECUTION_PROVIDER])
        except Exception as error:  # ONNX Runtime's errors share no public base class
            reason = str(error).strip().splitlines()[0]
            raise IntegrityError(f"ONNX Runtime cannot load {path} ({reason}): export the engine again.") from None
        if session.get_providers() != [EXECUTION_PROVIDER]:
            raise ProviderError(f"ONNX Runtime gave {session.get_providers()} instead of {EXECUTION_PROVIDER}.")
        return session

    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        states: npt.NDArray[np.float32] = self._text_encoder.run(["states"], {"ids": ids})[0]
        return states

    def predict(
        self, sample: npt.NDArray[np.float32], timestep: npt.NDArray[np.int64], states: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        feeds = {"sample": sample, "timestep": timestep, "states": states}
        prediction: npt.NDArray[np.float32] = self._unet.run(["prediction"], feeds)[0]
        return prediction
