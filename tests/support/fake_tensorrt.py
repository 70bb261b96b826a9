"""A stand-in for TensorRT's Python module on the processor: a plan is an ONNX file, which ONNX Runtime executes.

It has the names that engine/tensorrt.py uses and no others (tests/export/test_tensorrt_names.py checks those against
the real ones), and it refuses what TensorRT leaves undefined: contexts used by two threads at once, inputs without a
shape, tensors without an address, too little scratch memory, more rows than the plan was built for, and any other
number of references than an engine has draws.
"""

import enum
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from memedge.engine import plans
from memedge.engine.directory import SCREENS, TEXT_ENCODER, UNET, EngineDirectory

__version__ = "11.4.0.106"
SCRATCH = 4096
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}

refusals: set[str] = set()  # what fails: "load", "context", "shape", "run", "capture"
contexts: list["Context"] = []
caches: list["RuntimeCache"] = []


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    INTERNAL_ERROR, ERROR = Severity.INTERNAL_ERROR, Severity.ERROR

    def __init__(self):
        pass


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0


def plan(folder: Path, name: str, most: int) -> bytes:
    """The graph `name` of an engine directory as a plan for at most this many rows."""
    model = onnx.load(folder / name)  # with its weights
    onnx.helper.set_model_props(model, {"most": str(most)})
    return model.SerializeToString()


def record_plans(folder: Path, most: int, screens: Sequence[str] = SCREENS) -> EngineDirectory:
    """Record plans of an engine, of both providers and for an "sm89" called "Card"; `screens`: of which taps' graphs.

    Calls take `most` rows, and three prompts of the text encoder.
    """
    directory = EngineDirectory.open(folder)
    screens = screens[: len(directory.manifest.taps)]
    for provider in ("tensorrt", "tensorrt-rtx"):
        files = []
        for component, name in (("text", TEXT_ENCODER), ("unet", UNET), *zip(plans.SCREENS, screens, strict=False)):
            rows = 3 if component == "text" else most
            content = memoryview(plan(folder, name, rows))
            fields = {"component": component, "backend": provider, "target": "sm89", "version": __version__}
            entry = plans.describe(content, gpu="Card", most=rows, seconds=1.0, peak_memory=1, **fields)
            files.append((entry, content))
        plans.record(plans.writable_folder(directory), directory, files)
    return directory


class Runtime:
    def __init__(self, logger: ILogger):
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "Engine | None":
        if "load" in refusals:
            self._logger.log(ILogger.Severity.ERROR, "the plan is of another version")
            return None
        return Engine(serialized_engine, self._logger)


class RuntimeCache:
    """The kernels are called "kernels", and there is one more after each serialisation."""

    def __init__(self):
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        assert bytes(blob).startswith(b"kernels")
        self.content = bytes(blob)
        return True

    def serialize(self) -> bytes:
        self.content += b"kernels"
        return self.content


class RuntimeConfig:
    cache: RuntimeCache | None = None
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
    cuda_graph_strategy = None
    strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        caches.append(cache)
        return True


class Engine:
    device_memory_size_v2 = SCRATCH

    def __init__(self, content: bytes, logger: ILogger):
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.most = int(self.session.get_modelmeta().custom_metadata_map["most"])
        self.logger = logger
        self._names = [v.name for v in (*self.session.get_inputs(), *self.session.get_outputs())]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    @property
    def draws(self) -> int:
        """Half of the rows that are cached; all of them are the same number."""
        return next(v.shape[0] for v in self.session.get_inputs() if v.name.startswith("cached")) // 2

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: ExecutionContextAllocationStrategy | RuntimeConfig) -> "Context | None":
        if isinstance(how, RuntimeConfig):
            assert how.dynamic_shapes_kernel_specialization_strategy is DynamicShapesKernelSpecializationStrategy.EAGER
            how = how.strategy
        assert how is ExecutionContextAllocationStrategy.USER_MANAGED
        if "context" in refusals:
            self.logger.log(ILogger.Severity.ERROR, "out of memory")
            return None
        context = Context(self)
        contexts.append(context)
        return context


class Context:
    def __init__(self, engine: Engine):
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = 0
        self._busy = threading.Lock()
        self.threads: set[int] = set()
        self.runs = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory
        self._scratch = size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        (declared,) = (i.shape for i in self._engine.session.get_inputs() if i.name == name)
        fits = len(shape) == len(declared) and all(
            size == known if isinstance(known, int) else self._takes(name, size)
            for size, known in zip(shape, declared, strict=True)
        )
        self._shapes[name] = tuple(shape)
        return fits and "shape" not in refusals

    def _takes(self, name: str, size: int) -> bool:
        return size == self._engine.draws if name == "reference" else 1 <= size <= self._engine.most

    def set_tensor_address(self, name: str, memory: int) -> bool:
        names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        self._addresses[name] = memory
        return name in names and memory != 0

    def is_stream_capturable(self, _stream: int) -> bool:
        return "capture" not in refusals

    def execute_async_v3(self, _stream: int) -> bool:
        if "run" in refusals:
            self._engine.logger.log(ILogger.Severity.ERROR, "illegal memory access")
            return False
        assert self._scratch >= SCRATCH
        assert self._busy.acquire(blocking=False), "one execution context in two threads"
        try:
            self._execute()
        finally:
            self._busy.release()
        self.threads.add(threading.get_ident())
        self.runs += 1
        return True

    def _execute(self) -> None:
        session = self._engine.session
        binding = session.io_binding()
        for value in session.get_inputs():
            shape = self._shapes.get(value.name) or value.shape
            assert all(isinstance(size, int) for size in shape), f"{value.name} has no shape"
            binding.bind_input(value.name, "cpu", 0, TYPES[value.type], shape, self._addresses[value.name])
        rows = _rows(self._shapes)
        for value in session.get_outputs():
            shape = (rows, *value.shape[1:])
            binding.bind_output(value.name, "cpu", 0, TYPES[value.type], shape, self._addresses[value.name])
        session.run_with_iobinding(binding)


def _rows(shapes: dict[str, tuple[int, ...]]) -> int:
    return shapes["row"][0] if "row" in shapes else shapes["ids"][0]
