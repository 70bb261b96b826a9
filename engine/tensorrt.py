"""TensorRT and TensorRT-RTX on an NVIDIA GPU: the plans of `memedge build`, replayed as CUDA graphs."""

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from memedge.engine import plans, probe
from memedge.engine.arrays import Floats, Indices
from memedge.engine.backend import Backend, check_own_precision
from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import EngineError, IntegrityError, ProviderError
from memedge.engine.memory import Memory, Tensor, part
from memedge.engine.plans import PlanFile
from memedge.engine.probe import Gpu
from memedge.engine.providers import Provider
from memedge.engine.tensorrt_module import PlanProvider, load_module, make_logger, plan_provider

MakeMemory = Callable[[], Memory]


def find_plans(directory: EngineDirectory, provider: PlanProvider, gpu: Gpu) -> plans.Plans:
    """Return the engine's plans for a GPU and the TensorRT that is installed; raises EngineError as plans.find does."""
    return plans.find(directory, provider, gpu.target, load_module(provider).__version__, gpu.name)


def open_backend(
    directory: EngineDirectory,
    provider: Provider,
    precision: str | None,
    threads: int | None,  # noqa: ARG001
) -> Backend:
    """Return the backend for this machine's first GPU, see opening.BackendModule."""
    check_own_precision(directory, provider.name, precision)
    from memedge.engine.cuda import CudaMemory  # here, for its packages are of the extras for GPUs

    return TensorRtBackend(directory, plan_provider(provider.name), CudaMemory, probe.driver().gpus[0])


def precisions(own: str) -> tuple[str, ...]:
    """Return what an engine of precision `own` runs in: what it was exported in."""
    return (own,)


def missing(directory: EngineDirectory, provider: Provider) -> str | None:
    """Return why there are no plans of the engine for this machine's first GPU, or None if there are."""
    try:
        find_plans(directory, plan_provider(provider.name), probe.driver().gpus[0])
    except EngineError as error:
        return str(error)
    return None


class TensorRtBackend(Backend):
    """A text encoder, a UNet, and the UNet up to each tap as TensorRT plans.

    Each thread that calls has a lane of its own: a stream, execution contexts, buffers and CUDA graphs. The weights are
    on the GPU once. Threads are best kept, in a pool: a lane is made at a thread's first call and freed when it ends.
    """

    threads = 1  # the processor only queues work

    def __init__(self, directory: EngineDirectory, provider: PlanProvider, make_memory: MakeMemory, gpu: Gpu):
        """Load the plans for this GPU.

        Args:
            directory: the engine.
            provider: "tensorrt" or "tensorrt-rtx".
            make_memory: makes the memory and stream of a lane.
            gpu: what it makes them on.

        Raises:
            ProviderError: TensorRT is not installed, or there are no plans for this GPU and this TensorRT.
            IntegrityError: a plan is damaged, or TensorRT refuses it.
        """
        trt = load_module(provider)
        found = find_plans(directory, provider, gpu)
        manifest = directory.manifest
        self.provider, self.precision = provider, manifest.precision
        self.identity = f"{provider} {trt.__version__} on {gpu.name}, plan {found.unet.plan.sha256}"
        self.most_rows = found.unet.plan.most
        self.screens = bool(found.screens)
        self._trt, self._plans = trt, found
        self._directory, self._make_memory = directory, make_memory
        self._screens: dict[int, Program] = {}
        self._loading = threading.Lock()
        self._own = threading.local()
        memory = make_memory()
        with memory.current():
            self._text_encoder = Program(trt, found.text, directory)
            self._unet = Program(trt, found.unet, directory)
        self._cached = {name: memory.upload(array) for name, array in directory.baseline.cached.items()}
        memory.wait()  # from here on they are for all threads
        self._own.lane = Lane(memory, self._text_encoder, self._unet, directory, self._cached)

    @property
    def memory(self) -> Memory:
        return self._lane().memory

    def encode(self, ids: Indices) -> Tensor:
        return self._lane().encode(ids)

    def predict(self, states: Tensor, prompt: Indices, row: Indices) -> Tensor:
        return self._lane().predict(states, prompt, row)

    def statistics(self, states: Tensor, prompt: Indices, row: Indices, uncond: Tensor, operands: str) -> Floats:
        return self._lane().statistics(states, prompt, row, uncond, operands)

    def change(self, tap: int, states: Tensor, prompt: Indices, row: Indices, reference: Tensor) -> Floats:
        return self._lane().change(tap, self._screen(tap), states, prompt, row, reference)

    def at_tap(self, tap: int, states: Tensor) -> Tensor:
        return self._lane().at_tap(tap, self._screen(tap), states)

    def _screen(self, tap: int) -> "Program":
        """Return a tap's plan, loaded when it is first asked for: of all taps, a calibrated engine uses one.

        Raises:
            ProviderError: there are no plans of taps.
            IntegrityError: it was replaced, damaged or removed since the backend was opened, or TensorRT refuses it.
        """
        found = self._plans
        if not found.screens:
            raise ProviderError(f"The plans beside {found.unet.path} hold none of the screen's: {found.rebuild}.")
        with self._loading:
            if tap not in self._screens:
                file = found.screens[tap - 1]
                plans.verify(file, found.rebuild)
                with self.memory.current():
                    self._screens[tap] = Program(self._trt, file, self._directory)
            return self._screens[tap]

    def _lane(self) -> "Lane":
        lane: Lane | None = getattr(self._own, "lane", None)
        if lane is None:
            memory = self._make_memory()
            lane = self._own.lane = Lane(memory, self._text_encoder, self._unet, self._directory, self._cached)
        return lane


class Program:
    """A plan whose weights are on the GPU; makes execution contexts, which must not be shared between threads."""

    def __init__(self, trt: Any, file: PlanFile, directory: EngineDirectory):
        self._path, self._is_rtx, self._directory = file.path, file.plan.backend == "tensorrt-rtx", directory
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(file.path.read_bytes())
        if self._engine is None:
            raise IntegrityError(
                f"TensorRT cannot load {file.path} ({self._logger.reason}): run `memedge build` again."
            )
        self.names = {self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)}
        self.most = file.plan.most
        self.scratch = max(1, self._engine.device_memory_size_v2)
        self._making = threading.Lock()
        managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._how = self._configure(trt, managed) if self._is_rtx else managed

    def _configure(self, trt: Any, managed: Any) -> Any:
        """Return how TensorRT-RTX is to run the plan.

        It compiles kernels for this GPU at a shape's first call, which are kept beside the plan. LAZY would leave the
        slow ones, used until then, in our CUDA graphs.
        """
        runtime_config = self._engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(managed)
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
        runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # ours hold the reduction too
        self._kernels = runtime_config.create_runtime_cache()
        kept = plans.read_cache(self._path.parent, self._directory, self._cache_name)
        if kept:
            self._kernels.deserialize(kept)  # False for another driver's or GPU's: they are compiled anew
        runtime_config.set_runtime_cache(self._kernels)
        return runtime_config

    @property
    def _cache_name(self) -> str:
        return f"runtime-{self._path.stem}.cache"

    def keep_kernels(self) -> None:
        """Keep what was compiled so far for the next process."""
        if self._is_rtx:
            content = memoryview(self._kernels.serialize())
            with suppress(OSError):  # a full disk or a read-only folder: the next process compiles for itself
                plans.record_cache(self._path.parent, self._directory, self._cache_name, content)

    def context(
        self, memory: Memory, shapes: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], scratch: Tensor
    ) -> Any:
        """Return a context for inputs of these shapes, which reads and writes these tensors.

        `scratch`, uint8 [at least self.scratch], may serve several contexts that run one after the other.

        Raises:
            EngineError: TensorRT refuses; with its reason.
        """
        with self._making, memory.current():
            context = self._engine.create_execution_context(self._how)
        done = context is not None
        if done:
            context.set_device_memory(scratch.pointer, scratch.nbytes)
            done = all(context.set_input_shape(name, shape) for name, shape in shapes.items())
            done = done and all(context.set_tensor_address(name, t.pointer) for name, t in tensors.items())
        if not done:
            raise EngineError(f"TensorRT cannot prepare {self._path} for {shapes} ({self._logger.reason}).")
        return context

    def run(self, context: Any, memory: Memory) -> None:
        """Queue one execution; raises EngineError with TensorRT's reason."""
        with memory.current():
            done = context.execute_async_v3(memory.stream)
        if not done:
            raise EngineError(f"TensorRT cannot run {self._path} ({self._logger.reason}): see `memedge doctor`.")

    def can_capture(self, context: Any, memory: Memory) -> bool:
        """Return whether the context's work can be recorded in a CUDA graph."""
        return not self._is_rtx or bool(context.is_stream_capturable(memory.stream))


class Recorded:
    """Work that is queued as it is the first time, and from then on as a CUDA graph, if it can be captured.

    Not sooner, for TensorRT-RTX compiles kernels at the first call, and may say that nothing can be captured till then.
    """

    def __init__(self, program: Program, context: Any, memory: Memory, work: Callable[[], None]):
        self._program, self._context, self._memory, self._work = program, context, memory, work
        self._has_run = False
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self._replay is not None:
            self._replay()
        elif self._has_run and self._program.can_capture(self._context, self._memory):
            self._replay = self._memory.capture(self._work)  # which does it, too
        else:
            self._work()
            if not self._has_run:
                self._program.keep_kernels()
                self._has_run = True


@dataclass(frozen=True)
class AtTap:
    """What a lane keeps for a tap, for the largest calls.

    Attributes:
        value: float32 [rows, …], the tap's; only `at_tap` reads it.
        change: float32 [rows, C].
        scratch: uint8, for its contexts.
    """

    value: Tensor
    change: Tensor
    scratch: Tensor


class Lane:
    """One thread's stream, buffers, execution contexts and CUDA graphs.

    A context and a graph belong to one number of rows: graphs hold what TensorRT chose for it. Contexts share their
    scratch memory, as one runs at a time. The UNet gets as many prompts as rows, so that nothing else varies; those
    that no row is for are whatever was there before.
    """

    def __init__(
        self,
        memory: Memory,
        text_encoder: Program,
        unet: Program,
        directory: EngineDirectory,
        cached: dict[str, Tensor],
    ):
        """Allocate buffers for the largest calls; raises EngineError if the GPU has no room for them."""
        self.memory = memory
        self._text_encoder, self._unet, self._cached = text_encoder, unet, cached
        manifest = directory.manifest
        prompts, rows = text_encoder.most, unet.most
        self._ids = memory.empty((prompts, directory.ids_width), np.int64)
        self._encoded = memory.empty((prompts, *manifest.states_shape), np.float32)
        self._states = memory.empty((rows, *manifest.states_shape), np.float32)
        self._prompt, self._row = memory.empty((rows,), np.int64), memory.empty((rows,), np.int64)
        self._prediction = memory.empty((rows, *manifest.latent_shape), np.float32)
        self._statistics = memory.empty((3 * rows,), np.float64)
        self._scratch = memory.empty((max(text_encoder.scratch, unet.scratch),), np.uint8)
        self._taps, self._draws = manifest.taps, manifest.draws
        self._at_taps: dict[int, AtTap] = {}
        self._encodings: dict[int, Recorded] = {}
        self._contexts: dict[int, Any] = {}
        self._reductions: dict[tuple[int, str, int], Recorded] = {}
        self._changes: dict[tuple[int, int, int], tuple[Recorded, Tensor]] = {}  # by tap, rows and reference, with it

    def encode(self, ids: Indices) -> Tensor:
        """Return the states of ids, as Backend.encode."""
        states = self.memory.empty((len(ids), *self._encoded.shape[1:]), np.float32)
        for start in range(0, len(ids), self._text_encoder.most):
            some = ids[start : start + self._text_encoder.most]
            count = len(some)
            self.memory.write(some, part(self._ids, 0, count))
            self._encoding(count)()
            self.memory.copy(part(self._encoded, 0, count), part(states, start, count))
        return states

    def predict(self, states: Tensor, prompt: Indices, row: Indices) -> Tensor:
        """Return predictions, as Backend.predict."""
        count = len(row)
        self._put(states, prompt, row)
        self._unet.run(self._context(count), self.memory)
        prediction = self.memory.empty((count, *self._prediction.shape[1:]), np.float32)
        self.memory.copy(part(self._prediction, 0, count), prediction)
        return prediction

    def statistics(self, states: Tensor, prompt: Indices, row: Indices, uncond: Tensor, operands: str) -> Floats:
        """Return statistics, as Backend.statistics: UNet and reduction are one CUDA graph."""
        self._put(states, prompt, row)
        self._reduction(len(row), uncond, operands)()
        return self.memory.download(part(self._statistics, 0, 3 * len(row))).reshape(3, len(row))

    def change(
        self, tap: int, program: Program, states: Tensor, prompt: Indices, row: Indices, reference: Tensor
    ) -> Floats:
        """Return changes at a tap, as Backend.change, by its program: one CUDA graph."""
        count = len(row)
        self._put(states, prompt, row)
        self._change(tap, program, count, reference)()
        return self.memory.download(part(self._at(tap, program).change, 0, count)).astype(np.float64)

    def at_tap(self, tap: int, program: Program, states: Tensor) -> Tensor:
        """Return a tap's value, as Backend.at_tap, by its program; once for all, so nothing is recorded or kept."""
        at = self._at(tap, program)
        nothing = self.memory.upload(np.zeros((self._draws, *at.value.shape[1:]), np.float32))
        found = self.memory.empty(nothing.shape, np.float32)
        for start in range(0, self._draws, program.most):
            row = np.arange(start, min(start + program.most, self._draws), dtype=np.int64)
            self._put(part(states, 0, 1), np.zeros(len(row), np.int64), row)
            context = self._tap_context(tap, program, len(row), nothing)
            program.run(context, self.memory)
            self.memory.copy(part(at.value, 0, len(row)), part(found, start, len(row)))
            self.memory.wait()  # a context must outlive its work
        return found

    def _put(self, states: Tensor, prompt: Indices, row: Indices) -> None:
        count = len(row)
        self.memory.copy(states, part(self._states, 0, states.shape[0]))
        self.memory.write(prompt, part(self._prompt, 0, count))
        self.memory.write(row, part(self._row, 0, count))

    def _encoding(self, count: int) -> Recorded:
        if count not in self._encodings:
            program, memory = self._text_encoder, self.memory
            tensors = {"ids": self._ids, "states": self._encoded}
            context = program.context(memory, {"ids": (count, *self._ids.shape[1:])}, tensors, self._scratch)
            self._encodings[count] = Recorded(program, context, memory, lambda: program.run(context, memory))
        return self._encodings[count]

    def _context(self, count: int) -> Any:
        if count not in self._contexts:
            inputs = {"states": self._states, "prompt": self._prompt, "row": self._row}
            shapes = {name: (count, *tensor.shape[1:]) for name, tensor in inputs.items()}
            tensors = {**inputs, **self._cached, "prediction": self._prediction}
            self._contexts[count] = self._unet.context(self.memory, shapes, tensors, self._scratch)
        return self._contexts[count]

    def _reduction(self, count: int, uncond: Tensor, operands: str) -> Recorded:
        key = (count, operands, uncond.pointer)
        if key not in self._reductions:
            # Locals, for a lane that its own closures held would outlive its thread till the next garbage collection.
            context, memory, unet = self._context(count), self.memory, self._unet
            prediction, row = part(self._prediction, 0, count), part(self._row, 0, count)
            out = Tensor(self._statistics.pointer, (3, count), self._statistics.dtype, self._statistics.owner)

            def work() -> None:
                unet.run(context, memory)
                memory.reduce(prediction, uncond, row, operands, out)

            self._reductions[key] = Recorded(unet, context, memory, work)
        return self._reductions[key]

    def _change(self, tap: int, program: Program, count: int, reference: Tensor) -> Recorded:
        """Return the graph of a tap's changes; the context reads the reference where it lies, on whatever thread."""
        key = (tap, count, reference.pointer)
        if key not in self._changes:
            context, memory = self._tap_context(tap, program, count, reference), self.memory
            recorded = Recorded(program, context, memory, lambda: program.run(context, memory))
            self._changes[key] = recorded, reference  # which must live as long
        return self._changes[key][0]

    def _tap_context(self, tap: int, program: Program, count: int, reference: Tensor) -> Any:
        at = self._at(tap, program)
        inputs = {"states": self._states, "prompt": self._prompt, "row": self._row}
        shapes = {name: (count, *tensor.shape[1:]) for name, tensor in inputs.items()}
        cached = {name: tensor for name, tensor in self._cached.items() if name in program.names}
        tensors = {**inputs, **cached, "reference": reference, "tap": at.value, "change": at.change}
        return program.context(self.memory, {**shapes, "reference": reference.shape}, tensors, at.scratch)

    def _at(self, tap: int, program: Program) -> AtTap:
        if tap not in self._at_taps:
            known, memory = self._taps[tap - 1], self.memory
            # The lane's own, if it is large enough: it was allocated for plans of more layers.
            enough = program.scratch <= self._scratch.nbytes
            self._at_taps[tap] = AtTap(
                value=memory.empty((program.most, *known.shape), np.float32),
                change=memory.empty((program.most, known.channels), np.float32),
                scratch=self._scratch if enough else memory.empty((program.scratch,), np.uint8),
            )
        return self._at_taps[tap]
