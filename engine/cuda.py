"""An NVIDIA GPU's memory, and a stream of work on it."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine import probe, reduction
from memedge.engine.errors import EngineError, ProviderError, not_installed
from memedge.engine.memory import Tensor, check_reduction, check_sizes

try:
    from cuda.bindings import driver
    from cuda.core import Device
except ImportError:
    raise ProviderError(not_installed("A GPU", "cuda-core with cuda-bindings", "cuda")) from None

# CUDA may read what is sent to the GPU after the call: copies of it are kept until the queue is known to be past them.
_KEPT_BYTES = 1 << 28
_THREAD_LOCAL = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_SMALLER = "use a smaller --batch-size, build plans with a smaller --max-batch, or free memory that other programs hold"


class CudaMemory:
    """One GPU's memory and a stream of its own, which waits for no other stream.

    One thread at a time queues work; others wait, also while one downloads or captures. Threads that should not wait
    for one another have a CudaMemory each.

    A tensor's memory goes back to the GPU when the tensor is garbage collected, after the work that was queued before.

    Attributes:
        stream: the stream's handle, a cudaStream_t, for TensorRT, ONNX Runtime and other libraries to queue work on;
            such work is queued within `current()`.
    """

    device = "cuda"

    def __init__(self, index: int = 0):
        """Open a GPU.

        Raises:
            ProviderError: there is no such GPU here, its driver can't be used, or memedge was built without device
                code.
        """
        if reason := probe.missing_driver() or probe.missing_device_code(index):
            raise ProviderError(reason)
        gpus = len(probe.driver().gpus)
        if not 0 <= index < gpus:
            raise ProviderError(f"There is no GPU {index} here: use one from 0 to {gpus - 1}.")
        self.index, self.name = index, probe.driver().gpus[index].name
        try:
            device = Device(index)
            before = _checked(driver.cuCtxGetCurrent())
            try:
                device.set_current()
                self._context = device.context.handle
                self._queue = device.create_stream()
                self._pool = device.memory_resource
            finally:
                _checked(driver.cuCtxSetCurrent(before))
        except Exception as error:  # cuda-core makes its errors' class known nowhere
            raise ProviderError(f"GPU {index} cannot be used ({error}): run `memedge doctor`.") from None
        self.stream = int(self._queue.handle)
        self._core: Any = reduction.core
        self._lock = threading.RLock()
        self._capturing = False
        self._kept: list[npt.NDArray[Any]] = []
        self._kept_bytes = 0
        self._unused: deque[Callable[[], None]] = deque()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU this thread's current one, and this thread the only one that queues work, within the block.

        Captures of other threads, as ONNX Runtime's of another engine, don't forbid anything here.
        """
        with self._lock:
            _checked(driver.cuCtxPushCurrent(self._context))
            try:
                mode = _checked(driver.cuThreadExchangeStreamCaptureMode(_THREAD_LOCAL))
                try:
                    yield
                finally:
                    _checked(driver.cuThreadExchangeStreamCaptureMode(mode))
            finally:
                _checked(driver.cuCtxPopCurrent())

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Tensor:
        dtype = np.dtype(dtype)
        tensor = Tensor(0, tuple(shape), dtype, None)
        with self._queueing():
            self._release_unused()
            try:
                buffer = self._pool.allocate(max(1, tensor.nbytes), stream=self._queue)
            except Exception as error:
                raise _allocation_error(error, tensor.nbytes, self.index) from None
        return Tensor(int(buffer.handle), tensor.shape, dtype, _Owner(self, buffer.close))

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        tensor = self.empty(array.shape, array.dtype)
        self.write(array, tensor)
        return tensor

    def write(self, array: npt.NDArray[Any], target: Tensor) -> None:
        check_sizes(array.nbytes, target)
        source = np.array(array, order="C")
        with self._queueing():
            self._kept.append(source)
            self._kept_bytes += source.nbytes
            _checked(driver.cuMemcpyHtoDAsync(target.pointer, source.ctypes.data, source.nbytes, self.stream))
            if self._kept_bytes > _KEPT_BYTES:
                self._wait()

    def copy(self, source: Tensor, target: Tensor) -> None:
        check_sizes(source.nbytes, target)
        with self.current():
            _checked(driver.cuMemcpyDtoDAsync(target.pointer, source.pointer, source.nbytes, self.stream))

    def download(self, tensor: Tensor) -> npt.NDArray[Any]:
        array = np.empty(tensor.shape, tensor.dtype)
        with self._queueing():
            _checked(driver.cuMemcpyDtoHAsync(array.ctypes.data, tensor.pointer, tensor.nbytes, self.stream))
            self._wait()
        return array

    def wait(self) -> None:
        with self._queueing():
            self._wait()

    def reduce(self, cond: Tensor, uncond: Tensor, row: Tensor, operands: str, out: Tensor) -> None:
        check_reduction(cond, uncond, row, operands, out)
        rows, channels, height, width = cond.shape
        with self.current():
            try:
                self._core.cuda_guidance_stats(
                    cond_ptr=cond.pointer,
                    uncond_ptr=uncond.pointer,
                    out_ptr=out.pointer,
                    dtype=cond.dtype.name,
                    rows=rows,
                    uncond_rows=uncond.shape[0],
                    channels=channels,
                    pixels=height * width,
                    operands=operands,
                    stream=self.stream,
                    row_ptr=row.pointer,
                )
            except RuntimeError as error:
                raise EngineError(f"The GPU did not take the reduction ({error}): run `memedge doctor`.") from None

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        with self._queueing():
            work()  # kernels are loaded and TensorRT settles its shapes at the first call, which cannot be captured
            self._capturing = True
            try:
                graph = self._record(work)
            finally:
                self._capturing = False
                self._release_unused()
            try:
                executable = _checked(driver.cuGraphInstantiate(graph, 0))
            finally:
                _checked(driver.cuGraphDestroy(graph))
        return _Graph(self, executable)

    def _record(self, work: Callable[[], None]) -> Any:
        """Return what work queues as a CUgraph; other threads' calls on other streams don't disturb it."""
        _checked(driver.cuStreamBeginCapture(self.stream, _THREAD_LOCAL))
        try:
            work()
        except BaseException:
            _, graph = driver.cuStreamEndCapture(self.stream)
            if int(graph):
                _checked(driver.cuGraphDestroy(graph))
            raise
        return _checked(driver.cuStreamEndCapture(self.stream))

    @contextlib.contextmanager
    def _queueing(self) -> Iterator[None]:
        """`current`, for what cannot be captured."""
        with self.current():
            if self._capturing:
                raise RuntimeError("Only copies, reductions and other libraries' work can be captured.")
            yield

    def _wait(self) -> None:
        """Wait for all work; other threads run meanwhile, but queue nothing."""
        _checked(driver.cuStreamSynchronize(self.stream))
        self._kept.clear()
        self._kept_bytes = 0

    def _discard(self, release: Callable[[], None]) -> None:
        """Call `release` when work may be queued: now, or where that would wait or be captured, a little later.

        Garbage collection calls this at any moment, in any thread.
        """
        self._unused.append(release)
        if self._lock.acquire(blocking=False):
            try:
                if not self._capturing:
                    with self.current():
                        self._release_unused()
            finally:
                self._lock.release()

    def _release_unused(self) -> None:
        while self._unused:
            with contextlib.suppress(Exception):  # a GPU that fails says so to whoever waits for it next
                self._unused.popleft()()


class _Owner:
    """Keeps something on the GPU as long as this object lives."""

    def __init__(self, memory: CudaMemory, release: Callable[[], None]):
        self._memory, self._release = memory, release

    def __del__(self) -> None:
        self._memory._discard(self._release)


class _Graph:
    """Recorded work; each call queues it once."""

    def __init__(self, memory: CudaMemory, executable: Any):
        self._memory, self._executable = memory, executable
        # CUDA destroys a graph that is still running when it has ended.
        self._owner = _Owner(memory, lambda: _checked(driver.cuGraphExecDestroy(executable)))

    def __call__(self) -> None:
        with self._memory._queueing():
            _checked(driver.cuGraphLaunch(self._executable, self._memory.stream))


def _checked(result: tuple[Any, ...]) -> Any:
    """Return what a driver call gave, if anything; raises EngineError with CUDA's name and text for what went wrong."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(error)
        reason = f"{error.name}: {text.decode() if text else 'no description'}"
        if error == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise EngineError(f"The GPU is out of memory ({reason}): {_SMALLER}.")
        raise EngineError(f"The GPU failed ({reason}): start this process again, or run `memedge doctor`.")
    return values[0] if values else None


def _allocation_error(error: Exception, nbytes: int, index: int) -> EngineError:
    if "OUT_OF_MEMORY" in str(error):
        return EngineError(f"GPU {index} has no {nbytes / 2**20:.1f} MiB left ({error}): {_SMALLER}.")
    return EngineError(f"GPU {index} gave no memory ({error}): start this process again, or run `memedge doctor`.")
