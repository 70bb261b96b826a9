"""ONNX Runtime on the CPU or on an NVIDIA GPU: the same code on either's memory."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from memedge.engine.arrays import Floats, Indices
from memedge.engine.backend import Backend, check_own_precision
from memedge.engine.directory import (
    GRADIENT,
    NOISE_GRADIENT,
    PREFIX,
    SCREENS,
    TEXT_ENCODER,
    UNET,
    EngineDirectory,
    Tensors,
)
from memedge.engine.errors import EngineError, IntegrityError, ProviderError, shown
from memedge.engine.machine import usable_processors
from memedge.engine.memory import HostMemory, Memory, Tensor, part, reduced
from memedge.engine.native import CALLS
from memedge.engine.ort_calls import bind, run
from memedge.engine.ort_graphs import NOT_RECORDED, Recordings, quiet, run_options, sizes
from memedge.engine.providers import Provider

LOG = logging.getLogger("memedge")
# What lies in memory from the forward to the backward pass comes and goes in ever other sizes, of which an arena keeps
# more than is used: at SD 1.4's size 16.8 GB instead of 12.3, for a tenth of the time.
GRADIENTS = (GRADIENT, NOISE_GRADIENT)
# What ONNX Runtime calls the providers; ours are called as the memory's device.
EXECUTION_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_backend(directory: EngineDirectory, provider: Provider, precision: str | None, threads: int | None) -> Backend:
    """Return the backend for "cpu" or "cuda", see opening.BackendModule."""
    check_own_precision(directory, provider.name, precision)
    memory: Memory
    if provider.on_gpu:
        from memedge.engine.cuda import CudaMemory  # here, for its packages are of the extras for GPUs

        memory, threads = CudaMemory(), 1
    else:
        memory = HostMemory(threads)
    own = directory.manifest.precision
    return OrtBackend(directory.path, directory.baseline.cached, own, memory, threads, graph=directory.graph)


def precisions(own: str) -> tuple[str, ...]:
    """Return what an engine of precision `own` runs in: what it was exported in."""
    return (own,)


def missing(directory: EngineDirectory, provider: Provider) -> str | None:  # noqa: ARG001
    """Return None: any engine can be run."""
    return None


class OrtBackend(Backend):
    """A text encoder and a UNet as ONNX Runtime sessions that read and write tensors where they lie.

    On the CPU several threads run at once; on a GPU they take turns to queue their work on its one stream. There, calls
    of few rows can be recorded as CUDA graphs (engine/ort_graphs.py).
    """

    def __init__(
        self,
        folder: Path,
        cached: Tensors,
        precision: str,
        memory: Memory,
        threads: int | None = None,
        *,
        graph: Callable[[str], Path] | None = None,
    ):
        """Load both graphs in `folder`, to run where `memory` is.

        Args:
            folder: holds the graphs.
            cached: the UNet's cached inputs.
            precision: what the graphs were exported in; it is reported, not chosen here.
            memory: where to run.
            threads: of the processor's; default: as many as this process may use.
            graph: returns the path of a graph that was checked; default: it is an export's own, in `folder`.

        Raises:
            ProviderError: ONNX Runtime does not run on that device here.
            IntegrityError: ONNX Runtime refuses a graph.
        """
        self.provider, self._execution_provider = memory.device, EXECUTION_PROVIDERS[memory.device]
        self.threads = threads or usable_processors()
        self.precision = precision
        self.forks = memory.device == "cpu"
        if precision == "int8":
            # Its products are scaled by the largest value in the call: rows must not meet others' values there.
            self.most_rows = 1
        # There, ONNX Runtime plans each convolution anew when the number of rows changes: on an H100, at SD 1.4's size
        # in fp16, that takes 600 ms, and a call of four rows 24.
        self.one_shape = memory.device == "cuda"
        self.identity = f"onnxruntime {onnxruntime.__version__} on {memory.name}"
        self._memory = memory
        if self.provider == "cuda":
            onnxruntime.preload_dlls()  # CUDA's libraries from the nvidia wheels, which no search path leads to
            # Else a line for each of cuDNN's plans that does not fit, before one that does is taken; errors are raised.
            onnxruntime.set_default_logger_severity(4)
        self._folder, self._graph = folder, graph or folder.joinpath
        self._text_encoder = self._session(self._graph(TEXT_ENCODER))
        self._unet = self._session(self._graph(UNET))
        # To ask a session takes as long as to bind all of its inputs.
        self._outputs = {
            session: (output.name, output.shape[1:])
            for session in (self._text_encoder, self._unet)
            for output in session.get_outputs()
        }
        self._draws = len(next(iter(cached.values()))) // 2
        self._cached = {name: memory.upload(array) for name, array in cached.items()}
        self._sessions: dict[str, Any] = {}  # of other graphs, by file name
        self._loading = threading.Lock()
        self._recordings = Recordings(memory)
        self._tried: set[int] = set()  # numbers of rows that were recorded, or could not be
        self._own = threading.local()  # sessions may be shared between threads, bindings not
        # None on the processor: there ONNX Runtime looks in vain for an entry in them, a tenth of a millisecond a call.
        self._options = run_options(NOT_RECORDED) if self.provider == "cuda" else None

    @property
    def memory(self) -> Memory:
        return self._memory

    def record(self, most: int) -> None:
        if self.provider != "cuda":
            return
        with self._loading:
            wanted = [rows for rows in sizes(self._draws, most) if rows not in self._tried]
            self._tried.update(wanted)
            try:
                if wanted and not self._recordings.prompts:
                    self._recordings.record_text(partial(self._session, self._graph(TEXT_ENCODER), recorded=True), 1)
                for rows in wanted:
                    make = partial(self._session, self._graph(UNET), recorded=True)
                    self._recordings.record_unet(make, rows, self._cached)
            except EngineError as error:
                LOG.warning("calls of few rows stay slower, for a CUDA graph of them was not to be had: %s", error)

    def padded(self, rows: int, most: int) -> int:
        full = super().padded(rows, most)
        return min((size for size in self._recordings.rows if rows <= size <= most), default=full)

    def encode(self, ids: Indices) -> Tensor:
        if len(ids) in self._recordings.prompts:
            return self._recordings.encode(ids)
        return self._run(self._bindings()[0], self._text_encoder, {"ids": self._memory.upload(ids)}, len(ids))

    def predict(self, states: Tensor, prompt: Indices, row: Indices) -> Tensor:
        if self._recordings.takes(states, row):
            return self._recordings.predict(states, prompt, row)
        return self._predict(states, prompt, self._memory.upload(row))

    def statistics(self, states: Tensor, prompt: Indices, row: Indices, uncond: Tensor, operands: str) -> Floats:
        if self._recordings.takes(states, row):
            return self._recordings.statistics(states, prompt, row, uncond, operands)
        rows = self._memory.upload(row)
        return reduced(self._memory, self._predict(states, prompt, rows), uncond, rows, operands)

    def change(self, tap: int, states: Tensor, prompt: Indices, row: Indices, reference: Tensor) -> Floats:
        given = {"states": states, "prompt": self._memory.upload(prompt), "row": self._memory.upload(row)}
        found = self._screen(tap, "change", {**given, "reference": reference}, len(row))
        return self._memory.download(found).astype(np.float64)

    def at_tap(self, tap: int, states: Tensor) -> Tensor:
        session = self._further(SCREENS[tap - 1])
        (shape,) = (value.shape[1:] for value in session.get_inputs() if value.name == "reference")
        memory, first = self._memory, np.zeros(1, np.int64)
        nothing = memory.upload(np.zeros((self._draws, *shape), np.float32))
        given = {"states": states, "prompt": memory.upload(first), "reference": nothing}
        # Row by row: int8's products are scaled by the largest value in the call.
        rows = [
            memory.download(self._screen(tap, "tap", {**given, "row": memory.upload(first + row)}, 1))
            for row in range(self._draws)
        ]
        return memory.upload(np.concatenate(rows))

    def _screen(self, tap: int, output: str, inputs: dict[str, Tensor], rows: int) -> Tensor:
        """Return one output of a tap's graph; this thread's binding has the cached inputs in it."""
        session = self._further(SCREENS[tap - 1])
        bindings: dict[tuple[int, str], tuple[Any, list[int]]] = self._own.__dict__.setdefault("screens", {})
        if (tap, output) not in bindings:
            (shape,) = (value.shape[1:] for value in session.get_outputs() if value.name == output)
            binding, _ = bindings[tap, output] = session.io_binding(), shape
            asked = {value.name for value in session.get_inputs()}
            for name in asked & self._cached.keys():
                self._bind(binding.bind_input, name, self._cached[name])
        binding, shape = bindings[tap, output]
        result = self._memory.empty((rows, *shape), np.float32)
        self._call(binding, session, inputs, {output: result}, rows)
        return result

    def predict_at(
        self,
        states: Tensor,
        prompt: Indices,
        row: Indices,
        latents: npt.NDArray[np.float32],
        timestep: int,
        guidance: float | None,
    ) -> Tensor:
        memory = self._memory
        if not hasattr(self._own, "free"):
            self._own.free = self._further(PREFIX).io_binding(), self._unet.io_binding()
        prefix, unet = self._own.free
        # The UNet takes 2n rows; those that are not filled are not asked for.
        cached = {name: memory.empty(tensor.shape, tensor.dtype) for name, tensor in self._cached.items()}
        filled = {name: part(tensor, 0, len(latents)) for name, tensor in cached.items()}
        given = {"sample": memory.upload(latents), "timestep": memory.upload(np.full(len(latents), timestep))}
        if guidance is not None:
            given["guidance"] = memory.upload(np.full(len(latents), guidance))
        self._call(prefix, self._further(PREFIX), given, filled, len(latents))
        rows = {"states": states, "prompt": memory.upload(prompt), "row": memory.upload(row)}
        return self._run(unet, self._unet, {**rows, **cached}, len(row))

    def run_graph(
        self, name: str, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]
    ) -> list[npt.NDArray[Any]]:
        session = self._further(name)
        asked, made = ({value.name for value in values} for values in (session.get_inputs(), session.get_outputs()))
        if not (set(inputs) <= asked <= {*inputs, *self._cached} and set(outputs) <= made):
            raise IntegrityError(f"{self._folder / name} is not the graph that it should be: export the engine again.")
        binding = session.io_binding()
        given = {**self._cached, **{value: self._memory.upload(array) for value, array in inputs.items()}}
        for value in asked:
            self._bind(binding.bind_input, value, given[value])
        for value in outputs:
            binding.bind_output(value)  # on the host, where ONNX Runtime finds room for it
        with CALLS:
            self._run_bound(session, binding, None, len(inputs["row"]))
        found: list[npt.NDArray[Any]] = binding.copy_outputs_to_cpu()
        return found

    def _further(self, name: str) -> Any:
        """Return the session of another graph, loaded when it is first asked for."""
        with self._loading:
            if name not in self._sessions:
                self._sessions[name] = self._session(self._graph(name), arena=name not in GRADIENTS)
            return self._sessions[name]

    def _predict(self, states: Tensor, prompt: Indices, row: Tensor) -> Tensor:
        inputs = {"states": states, "prompt": self._memory.upload(prompt), "row": row}
        return self._run(self._bindings()[1], self._unet, inputs, row.shape[0])

    def _session(self, path: Path, *, arena: bool = True, recorded: bool = False) -> Any:
        options = onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
        options.intra_op_num_threads = self.threads
        # Threads that wait by spinning take cores from the rest of a server; measured, one prompt on two cores: 18.6 ms
        # spinning, 14.9 ms not, and equal in batches.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # warnings are about graph clean-ups, which users can do nothing about
        settings: dict[str, str] = {}
        disabled: list[str] = []
        if self.provider == "cpu" and self.precision == "fp16":
            # The processor computes in float32. Weights widened at load, as ONNX Runtime would, take more than twice
            # the memory of an engine that was made small: so each is widened when it is used and let go, and the file
            # is mapped. Measured at SD 1.4's size (2.0 GB): 2.1 GB resident instead of 5.0, the UNet loaded in 0.3 s
            # instead of 26; a row takes 7.2 s instead of 5.7.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # else all weights are widened first
            options.enable_mem_pattern = False
            options.enable_cpu_mem_arena = False
            disabled = ["ConstantFolding"]
        if self.provider == "cuda":
            # What was asked for is what runs: no node on the processor, and float32 without TF32's 10 bits.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            settings = {
                "device_id": str(self._memory.index),
                "user_compute_stream": str(self._memory.stream),
                "use_tf32": "0",
                # By default every algorithm is run before the first call of each shape.
                "cudnn_conv_algo_search": "HEURISTIC",
                "enable_cuda_graph": "1" if recorded else "0",
            }
        try:
            # Without `enable_fallback=0` it would print that it goes on without the provider, and do so.
            chosen = [(self._execution_provider, settings)]
            with quiet if self.provider == "cuda" else nullcontext():
                session = onnxruntime.InferenceSession(
                    path, options, providers=chosen, enable_fallback=0, disabled_optimizers=disabled
                )
        except Exception as error:  # ONNX Runtime's errors share no public base class
            reason = shown(str(error).strip().partition("\n")[0], 240)
            if self.provider == "cuda":
                raise ProviderError(
                    f"ONNX Runtime cannot run {path} on the GPU ({reason}): `memedge doctor` says what is missing."
                ) from None
            raise IntegrityError(f"ONNX Runtime cannot load {path} ({reason}): export the engine again.") from None
        if session.get_providers()[0] != self._execution_provider:
            raise ProviderError(
                f"ONNX Runtime gave {session.get_providers()[0]} instead of {self._execution_provider}: "
                "`memedge doctor` says what is missing here."
            )
        for output in session.get_outputs():
            if not all(isinstance(size, int) for size in output.shape[1:]):
                raise IntegrityError(
                    f"{path} gives {output.name} of unknown shape {output.shape}: export the engine again."
                )
        return session

    def _bindings(self) -> tuple[Any, Any]:
        """Return this thread's bindings; the UNet's has the cached inputs in it, once and for all calls."""
        if not hasattr(self._own, "bindings"):
            unet = self._unet.io_binding()
            for name, tensor in self._cached.items():
                self._bind(unet.bind_input, name, tensor)
            self._own.bindings = self._text_encoder.io_binding(), unet
        bindings: tuple[Any, Any] = self._own.bindings
        return bindings

    def _run(self, binding: Any, session: Any, inputs: dict[str, Tensor], rows: int) -> Tensor:
        name, shape = self._outputs[session]
        result = self._memory.empty((rows, *shape), np.float32)
        self._call(binding, session, inputs, {name: result}, rows)
        return result

    def _call(
        self, binding: Any, session: Any, inputs: dict[str, Tensor], outputs: dict[str, Tensor], rows: int
    ) -> None:
        for name, tensor in inputs.items():
            self._bind(binding.bind_input, name, tensor)
        for name, tensor in outputs.items():
            self._bind(binding.bind_output, name, tensor)
        self._run_bound(session, binding, self._options, rows)

    def _run_bound(self, session: Any, binding: Any, options: Any, rows: int) -> None:
        run(self._memory, session, binding, options, rows)

    def _bind(self, bind_call: Any, name: str, tensor: Tensor) -> None:
        bind(self._memory, bind_call, name, tensor)
