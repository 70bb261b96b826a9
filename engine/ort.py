"""ONNX Runtime on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.directory import TEXT_ENCODER, UNET, Tensors
from memedge.engine.errors import IntegrityError, ProviderError
from memedge.engine.machine import usable_processors

try:
    import onnxruntime
except ImportError:
    raise ProviderError(
        "Provider 'cpu' needs ONNX Runtime, which is not installed: run `python -m pip install 'memedge[cpu]'`."
    ) from None

EXECUTION_PROVIDER = "CPUExecutionProvider"


class OrtBackend:
    """A text encoder and a UNet as ONNX Runtime sessions, which several threads may run at once."""

    provider = "cpu"

    def __init__(self, folder: Path, cached: Tensors, precision: str, threads: int | None = None):
        """Load both graphs in `folder`, to run on `threads` threads (default: as many as this process may use).

        `cached` are the UNet's cached inputs. `precision` is what the graphs were exported in; it is reported, not
        chosen here.

        Raises:
            ProviderError: ONNX Runtime did not give the CPU provider.
            IntegrityError: ONNX Runtime refuses a graph.
        """
        self.threads = threads or usable_processors()
        self.precision = precision
        self.identity = f"onnxruntime {onnxruntime.__version__}"
        self._text_encoder = self._session(folder / TEXT_ENCODER)
        self._unet = self._session(folder / UNET)
        # Bound as they are, call after call: no copies, and no conversion of many arrays per call.
        self._cached = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in cached.items()}

    def _session(self, path: Path) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        # Threads that wait by spinning take cores from the rest of a server; measured, one prompt on two cores: 18.6 ms
        # spinning, 14.9 ms not, and equal in batches.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
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
        self, states: npt.NDArray[np.float32], prompt: npt.NDArray[np.int64], row: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        binding = self._unet.io_binding()  # one per call: sessions may be shared between threads, bindings not
        for name, value in self._cached.items():
            binding.bind_ortvalue_input(name, value)
        for name, array in (("states", states), ("prompt", prompt), ("row", row)):
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("prediction")
        self._unet.run_with_iobinding(binding)
        prediction: npt.NDArray[np.float32] = binding.get_outputs()[0].numpy()
        return prediction
