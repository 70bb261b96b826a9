"""OpenVINO on the CPU: the same engine directory, in fp32 or, on CPUs that have it, in bf16."""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import openvino
from openvino import opset13 as ops

from memedge.engine import cache
from memedge.engine.arrays import Floats, Indices
from memedge.engine.backend import Backend
from memedge.engine.directory import SCREENS, TEXT_ENCODER, UNET, EngineDirectory, Tensors
from memedge.engine.errors import EngineError, IntegrityError, ProviderError, shown
from memedge.engine.machine import usable_processors
from memedge.engine.memory import HostMemory, Tensor, reduced
from memedge.engine.openvino_core import CORE
from memedge.engine.providers import Provider

Key = TypeVar("Key")
Run = Callable[[Tensors], npt.NDArray[np.float32]]
HINTS = {"bf16": "bf16", "fp32": "f32"}
# A small UNet computes up to this many rows at once. A large one gains nothing from more than one (docs/benchmarks.md),
# and each shape that is compiled keeps a copy of the weights.
BLOCK = 16
POWERS = (BLOCK, 8, 4, 2, 1)
FULL = 0.8  # of a shape's rows: one call that is as full costs less than several of smaller shapes
SMALL = 256 << 20  # bytes of weights; below, compiling takes less than a second and is not worth a cache either


def open_backend(
    directory: EngineDirectory,
    provider: Provider,  # noqa: ARG001
    precision: str | None,
    threads: int | None,
) -> Backend:
    """Return the backend, see opening.BackendModule."""
    return OpenVinoBackend(directory, precision, threads)


def precisions(own: str) -> tuple[str, ...]:
    """Return the precisions this CPU runs an engine of precision `own` in, the fastest first."""
    if own != "fp32":
        return ()
    capable = "BF16" in CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("bf16", "fp32") if capable else ("fp32",)


def missing(directory: EngineDirectory, provider: Provider) -> str | None:  # noqa: ARG001
    """Return None: an engine of a precision that it runs lacks nothing."""
    return None


class OpenVinoBackend(Backend):
    """A text encoder (always fp32: it is a hundredth of the work) and a UNet, compiled for fixed shapes.

    Shapes are fixed because OpenVINO takes 1.5 times as long per row on shapes it did not know at compile time.
    """

    provider = "openvino"

    def __init__(self, directory: EngineDirectory, precision: str | None, threads: int | None = None):
        """Compile both graphs for `threads` threads (default: as many as this process may use).

        Raises:
            ProviderError: OpenVINO cannot run the engine in `precision` (default: bf16 where the CPU has it) here.
            IntegrityError: OpenVINO refuses a graph.
        """
        own = directory.manifest.precision
        able = precisions(own)
        if not able:
            raise ProviderError(f"Provider 'openvino' runs fp32 engines, and {directory.path} is {own}: use 'cpu'.")
        self.precision = precision or able[0]
        if self.precision not in able:
            raise ProviderError(
                f"Provider 'openvino' cannot run {directory.path} in {self.precision!r} on this CPU: "
                f"use {' or '.join(able)}."
            )
        self.threads = threads or usable_processors()
        self._memory = HostMemory(self.threads)
        name = CORE.get_property("CPU", "FULL_DEVICE_NAME")
        self.identity = f"openvino {openvino.get_version()} on {name}"
        self._directory, self._cached = directory, directory.baseline.cached
        size = sum(entry.size for file, entry in directory.manifest.files.items() if file.startswith(UNET))
        self._small = size < SMALL
        draws = directory.manifest.draws
        # Many prompts, all rows of one prompt, those of its first timestep; and whatever is left, one by one.
        sizes = {BLOCK, 2 * draws, draws, 1} if self._small else {1}
        self._sizes = sorted((size for size in sizes if size <= BLOCK), reverse=True)
        text_encoder = self._read(TEXT_ENCODER, {"ids": [1, directory.ids_width]})
        self._text_encoder = self._compile(text_encoder, "fp32", {})
        self._unets = {1: self._compile_unet(1)}
        self._screens: dict[tuple[int, int], Run] = {}  # by tap and rows
        self._compiling = threading.Lock()

    @property
    def memory(self) -> HostMemory:
        return self._memory

    def prepare(self) -> None:
        """Compile powers of two too: a second each, and 11 rows take three calls instead of six."""
        if self._small:
            for size in POWERS:
                self._unet(size)
            self._sizes = sorted({*self._sizes, *POWERS}, reverse=True)

    def encode(self, ids: Indices) -> Tensor:
        states = np.concatenate([self._text_encoder({"ids": ids[i : i + 1]}) for i in range(len(ids))])
        return self._memory.upload(states)

    def predict(self, states: Tensor, prompt: Indices, row: Indices) -> Tensor:
        return self._memory.upload(self._in_shapes(self._unet, states, prompt, row, {}))

    def change(self, tap: int, states: Tensor, prompt: Indices, row: Indices, reference: Tensor) -> Floats:
        against = {"reference": self._memory.download(reference)}
        found = self._in_shapes(lambda rows: self._screen(tap, rows), states, prompt, row, against)
        return found.astype(np.float64)

    def at_tap(self, tap: int, states: Tensor) -> Tensor:
        graph = self._compile_screen(tap, 1, "tap")  # once, so it isn't kept
        state = self._memory.download(states)[:1]
        nothing = np.zeros((self._directory.manifest.draws, *self._directory.manifest.taps[tap - 1].shape), np.float32)
        rows = [
            graph({"states": state, "prompt": np.zeros(1, np.int64), "row": np.array([row]), "reference": nothing})
            for row in range(len(nothing))
        ]
        return self._memory.upload(np.concatenate(rows))

    def _in_shapes(
        self, graph: Callable[[int], Run], states: Tensor, prompt: Indices, row: Indices, further: Tensors
    ) -> npt.NDArray[np.float32]:
        """Return a graph's output for R rows, in calls of the numbers of rows that it is compiled for."""
        embeddings = self._memory.download(states)
        parts = []
        start = 0
        while start < len(row):
            left = len(row) - start
            rows = next(size for size in self._sizes if size == 1 or left > FULL * size)
            part = np.minimum(np.arange(start, start + rows), len(row) - 1)  # the last row fills up
            # As many prompts as rows, whatever they are, so that one compiled shape serves all.
            inputs: Tensors = {"states": embeddings[prompt[part]], "prompt": np.arange(rows), "row": row[part]}
            parts.append(graph(rows)(inputs | further)[:left])
            start += rows
        return np.concatenate(parts)

    def statistics(self, states: Tensor, prompt: Indices, row: Indices, uncond: Tensor, operands: str) -> Floats:
        prediction = self.predict(states, prompt, row)
        return reduced(self._memory, prediction, uncond, self._memory.upload(row), operands)

    def _unet(self, rows: int) -> Run:
        return self._kept(self._unets, rows, lambda: self._compile_unet(rows))

    def _screen(self, tap: int, rows: int) -> Run:
        return self._kept(self._screens, (tap, rows), lambda: self._compile_screen(tap, rows, "change"))

    def _kept(self, compiled: dict[Key, Run], key: Key, compile_it: Callable[[], Run]) -> Run:
        if key not in compiled:
            with self._compiling:
                if key not in compiled:
                    compiled[key] = compile_it()
        return compiled[key]

    def _compile_screen(self, tap: int, rows: int, output: str) -> Run:
        """Return a tap's graph with one output, in fp32 as the text encoder: it is as little work."""
        manifest = self._directory.manifest
        shapes = {"states": [rows, *manifest.states_shape], "prompt": [rows], "row": [rows]}
        shapes["reference"] = [manifest.draws, *manifest.taps[tap - 1].shape]
        model = self._read(SCREENS[tap - 1], shapes)
        for result in model.get_results():
            if output not in result.input_value(0).get_names():
                model.remove_result(result)
        asked = {name for value in model.inputs for name in value.get_names()}
        constant = {name: array for name, array in self._cached.items() if name in asked}
        return self._compile(model, "fp32", constant)

    def _compile_unet(self, rows: int) -> Run:
        manifest = self._directory.manifest
        shapes = {"states": [rows, *manifest.states_shape], "prompt": [rows], "row": [rows]}
        model = self._read(UNET, shapes)
        if self.precision == "fp32":
            return self._compile(model, "fp32", self._cached)
        last = _take_last_convolution(model, self._directory.file(UNET))
        first, second = self._compile(model, self.precision, self._cached), self._compile(last, "fp32", {})
        return lambda inputs: second({"features": first(inputs)})

    def _read(self, name: str, shapes: dict[str, list[int]]) -> Any:
        path = self._directory.graph(name)
        try:
            model = CORE.read_model(path)
            model.reshape(shapes)
        except Exception as error:
            raise IntegrityError(f"OpenVINO cannot load {path} ({_reason(error)}): export the engine again.") from None
        return model

    def _compile(self, model: Any, precision: str, constant: Tensors) -> Run:
        options = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            # Each process would pin its threads to the same cores: two of one thread came to less than one.
            "ENABLE_CPU_PINNING": False,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if not self._small:
            # In the user's cache alone: a stranger's engine may come with compiled models, and OpenVINO verifies none.
            folders = (folder for folder in cache.writable(self._directory) if folder != self._directory.path)
            if folder := next(folders, None):
                options["CACHE_DIR"] = str(folder / "plans" / "openvino")
        try:
            compiled = CORE.compile_model(model, "CPU", options)
        except Exception as error:
            raise IntegrityError(
                f"OpenVINO cannot compile a graph of {self._directory.path} ({_reason(error)}): export the engine "
                "again, or use provider 'cpu'."
            ) from None
        given = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if given != HINTS[precision]:
            raise ProviderError(f"OpenVINO computes in {given} instead of {HINTS[precision]}: use provider 'cpu'.")
        return _Requests(compiled, constant)


def _take_last_convolution(model: Any, path: Path) -> Any:
    """Cut the UNet before its last convolution, which becomes a model of its own, to be run in fp32.

    Δ is small beside ε, so what bf16 rounds off in ε is much of Δ. On the embedded model 70 % of that error arises in
    this one convolution, half a percent of the work.
    """
    result = model.get_results()[0]
    node = result.input_value(0).get_node()
    while node.get_type_name() != "Convolution":
        if node.get_type_name() not in ("Add", "Convert"):
            raise IntegrityError(f"{path} does not end in a convolution, as UNets do: run it in fp32.")
        node = node.input_value(0).get_node()
    features = node.input_value(0)
    entrance = ops.parameter(features.get_partial_shape(), features.get_element_type(), name="features")
    node.input(0).replace_source_output(entrance.output(0))
    last = openvino.Model([result], [entrance])
    last.input(0).set_names({"features"})
    body = ops.result(features)
    model.remove_result(result)
    model.add_results([body])
    return last


class _Requests:
    """Runs a compiled model from any number of threads: each call takes a request that is free, or makes one."""

    def __init__(self, compiled: Any, constant: Tensors):
        self._compiled = compiled
        self._constant = {name: openvino.Tensor(array, shared_memory=True) for name, array in constant.items()}
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, inputs: Tensors) -> npt.NDArray[np.float32]:
        try:
            request = self._free.get_nowait()
        except queue.Empty:
            request = self._compiled.create_infer_request()
            for name, tensor in self._constant.items():
                request.set_tensor(name, tensor)
        try:
            request.infer(inputs, share_inputs=True)
            return np.array(request.get_output_tensor(0).data)  # a copy: the request's own memory is used again
        except Exception as error:
            raise EngineError(f"OpenVINO cannot compute ({_reason(error)}): export the engine again.") from None
        finally:
            self._free.put(request)


def _reason(error: Exception) -> str:
    """Return what an error of OpenVINO says, a RuntimeError of many lines, in one: the last that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(lines[-1] if lines else type(error).__name__)
