"""CudaMemory on the driver over host memory: what it allocates, moves and waits for; run by test_memory.py."""

import ctypes
import gc
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from types import SimpleNamespace
from weakref import ref

import device
import fake_tensorrt
import numpy as np
import pytest
from cuda.bindings import driver

from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine import cuda, ort_graphs
from memedge.engine.engine import Engine
from memedge.engine.errors import EngineError, ProviderError
from memedge.engine.memory import Tensor
from memedge.engine.probe import Gpu
from memedge.engine.tensorrt import TensorRtBackend

pytestmark = pytest.mark.gpu
KIB = np.zeros(256, np.float32)


@pytest.fixture
def memory(monkeypatch):
    return device.open_memory(monkeypatch)


class Since:
    """How much each count has grown since this was made."""

    def __init__(self):
        self._start = device.StubCounts()

    def __getattr__(self, name):
        return getattr(device.StubCounts(), name) - getattr(self._start, name)


def test_only_downloads_wait_and_nothing_else_crosses(memory):
    a, b = memory.empty(KIB.shape, KIB.dtype), memory.empty(KIB.shape, KIB.dtype)
    again = memory.capture(lambda: memory.copy(a, b))
    memory.download(a)
    since = Since()
    for _ in range(3):
        memory.write(KIB, a)
        again()
        memory.copy(b, a)
    assert since.waits == 0
    memory.download(b)
    assert (since.waits, since.launches) == (1, 3)
    assert (since.to_device, since.to_host, since.within) == (3 * KIB.nbytes, KIB.nbytes, 6 * KIB.nbytes)


def test_all_memory_and_every_handle_goes_back(monkeypatch):
    gc.collect()
    since = Since()
    memory = device.open_memory(monkeypatch)
    a, b = memory.upload(KIB), memory.empty((3, 5), np.float16)
    again = memory.capture(partial(memory.copy, a, a))
    again()
    assert (since.live, since.streams, since.graphs) == (2, 1, 1)
    assert since.live_bytes == KIB.nbytes + 30
    del b, again
    memory.download(a)
    assert (since.live, since.graphs) == (1, 0)
    del a, memory
    gc.collect()
    assert (since.live, since.live_bytes, since.streams, since.graphs) == (0, 0, 0, 0)


def test_memory_that_is_freed_is_used_up_to_then(memory):
    target = memory.empty(KIB.shape, KIB.dtype)
    source = memory.upload(KIB + 7)
    memory.copy(source, target)
    del source  # its memory is overwritten when it is freed
    np.testing.assert_array_equal(memory.download(target), KIB + 7)


def test_garbage_is_not_captured(memory):
    since = Since()
    tensors = [memory.upload(KIB) for _ in range(3)]
    target = memory.empty(KIB.shape, KIB.dtype)
    elsewhere = [memory.upload(KIB)]
    calls = []

    def work():
        calls.append(None)
        if len(calls) == 2:  # the call that is recorded
            tensors.pop()
            thread = threading.Thread(target=elsewhere.clear)
            thread.start()
            thread.join(10)
            assert not thread.is_alive()
        memory.copy(tensors[0], target)

    again = memory.capture(work)
    again()
    again()
    memory.download(target)
    assert since.spoiled == 0
    assert since.live == 3


def test_garbage_of_other_threads_waits_for_nobody(memory):
    since = Since()
    tensors = [memory.upload(KIB)]
    with memory.current():
        thread = threading.Thread(target=tensors.clear)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    later = memory.empty((1,), np.float32)
    memory.download(later)
    assert since.live == 1


@pytest.mark.parametrize("name", ["empty", "upload", "write", "download", "launch", "capture"])
def test_what_cannot_be_captured_is_refused_and_the_memory_stays_usable(memory, name):
    since = Since()
    tensor = memory.upload(KIB)
    again = memory.capture(lambda: memory.copy(tensor, tensor))
    forbidden = {
        "empty": lambda: memory.empty((1,), np.float32),
        "upload": lambda: memory.upload(KIB),
        "write": lambda: memory.write(KIB, tensor),
        "download": lambda: memory.download(tensor),
        "launch": again,
        "capture": lambda: memory.capture(lambda: None),
    }[name]
    calls = []

    def work():
        calls.append(None)
        if len(calls) == 2:
            forbidden()

    with pytest.raises(RuntimeError, match="captured"):
        memory.capture(work)
    np.testing.assert_array_equal(memory.download(tensor), KIB)
    assert (since.spoiled, since.graphs) == (0, 1)


def test_foreign_work_that_spoils_a_capture_is_an_error_with_cudas_words(memory):
    since = Since()
    calls = []

    def work():
        calls.append(None)
        if len(calls) == 2:
            driver.cuStreamSynchronize(memory.stream)

    with pytest.raises(EngineError, match="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: operation failed"):
        memory.capture(work)
    assert (since.spoiled, since.graphs) == (1, 0)
    assert memory.download(memory.upload(KIB)).shape == KIB.shape


def test_other_threads_work_stays_out_of_a_capture(memory):
    """It waits until the capture has ended, and is done once."""
    mine, others, seen = (memory.upload(KIB) for _ in range(3))
    threads = []

    def work():
        threads.append(threading.Thread(target=memory.copy, args=(others, seen)))
        threads[-1].start()
        memory.copy(mine, mine)

    again = memory.capture(work)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    memory.download(seen)
    since = Since()
    again()
    memory.download(mine)
    assert since.within == KIB.nbytes


def test_sent_arrays_are_not_hoarded(memory, monkeypatch):
    monkeypatch.setattr(cuda, "_KEPT_BYTES", 10 * KIB.nbytes)
    target = memory.empty(KIB.shape, KIB.dtype)
    since = Since()
    for _ in range(35):
        memory.write(KIB, target)
        assert sum(array.nbytes for array in memory._kept) <= 11 * KIB.nbytes
    assert since.waits == 3


def test_the_threads_current_gpu_stays_what_it_was(monkeypatch):
    _, before = driver.cuCtxGetCurrent()
    memory = device.open_memory(monkeypatch, index=1)
    memory.download(memory.upload(KIB))
    assert int(driver.cuCtxGetCurrent()[1]) == int(before)
    with memory.current():
        assert int(driver.cuCtxGetDevice()[1]) == 1
    _, other = driver.cuDevicePrimaryCtxRetain(0)
    driver.cuCtxPushCurrent(other)
    try:
        memory.download(memory.upload(KIB))
        assert int(driver.cuCtxGetDevice()[1]) == 0
    finally:
        driver.cuCtxPopCurrent()


def test_other_threads_captures_forbid_nothing_while_the_memory_is_used(memory):
    """By the thread's mode, which is what it was before again afterwards."""

    def mode():
        _, found = driver.cuThreadExchangeStreamCaptureMode(modes.CU_STREAM_CAPTURE_MODE_GLOBAL)
        driver.cuThreadExchangeStreamCaptureMode(found)
        return found

    modes = driver.CUstreamCaptureMode
    assert mode() == modes.CU_STREAM_CAPTURE_MODE_GLOBAL
    with memory.current():
        with memory.current():
            assert mode() == modes.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        assert mode() == modes.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    assert mode() == modes.CU_STREAM_CAPTURE_MODE_GLOBAL


class CopyingSession:
    """One as ONNX Runtime's that records: it queues a copy of its input to its output, in whichever thread it runs."""

    def __init__(self, memory):
        self._memory, self.threads, self._bound = memory, set(), {}

    def get_outputs(self):
        return [SimpleNamespace(name="out", shape=["rows", *KIB.shape])]

    def io_binding(self):
        return SimpleNamespace(bind_input=self._bind, bind_output=self._bind)

    def _bind(self, name, _device, _index, _dtype, _shape, pointer):
        self._bound[name] = pointer

    def run_with_iobinding(self, _binding, _options):
        self.threads.add(threading.get_ident())
        driver.cuMemcpyDtoDAsync(self._bound["out"], self._bound["in"], KIB.nbytes, self._memory.stream)


def test_recorded_calls_run_in_one_thread_in_the_order_they_come_in(memory):
    """With the GPU current there, and without waiting for anything before the download."""
    session = CopyingSession(memory)
    recorded = ort_graphs.Recorded(session, memory, {"in": ((1, *KIB.shape), np.float32)}, {})
    call, since = ort_graphs.OneThread(), Since()
    call(lambda: recorded.check({"in": KIB[None]}, {"in": KIB[None] + 1}))
    assert since.waits == 2

    def use(number):
        def work():
            output = recorded({"in": memory.upload(KIB[None] + number)})
            own = memory.empty(output.shape, output.dtype)
            memory.copy(output, own)
            return own

        found = [call(work) for _ in range(5)]
        return all((memory.download(each) == number).all() for each in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(use, range(8)))
    assert len(session.threads) == 1


@pytest.fixture
def lazy_tensorrt(monkeypatch):
    """The stand-in for TensorRT on the driver's memory: what a context queues is done when the driver comes to it.

    Yields what was done too late: work of a context that is no more.
    """
    kernels, late = [], []

    def execute(context, stream):
        twin, known = copy(context), ref(context)
        twin._addresses = {name: pointer & ~device.DEVICE_BIT for name, pointer in context._addresses.items()}

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def kernel(_):
            if known() is None:
                late.append(twin)
            twin._execute()

        kernels.append(kernel)  # a captured one is called again
        return ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc(ctypes.c_void_p(stream), kernel, None) == 0

    monkeypatch.setattr(fake_tensorrt.Context, "execute_async_v3", execute)
    monkeypatch.setattr(fake_tensorrt, "contexts", SimpleNamespace(append=lambda _: None))  # which keeps none alive
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, fake_tensorrt)
    return late


@pytest.mark.parametrize("provider", ["tensorrt", "tensorrt-rtx"])
def test_tensorrts_lanes_screen_on_a_driver_that_is_late(memory, lazy_tensorrt, provider, tmp_path):  # noqa: ARG001
    """One graph per call, and two threads that share the reference; nothing is allocated or waited for in a capture."""
    directory = fake_tensorrt.record_plans(shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine"), 4)
    true = Engine.open(EMBEDDED_ENGINE, "cpu", None, 1)
    own = Engine(directory, TensorRtBackend(directory, provider, cuda.CudaMemory, Gpu("Card", (8, 9), 1 << 34)))
    since, ids = Since(), own.tokenize(["a red bicycle", "the sea", ""])[0]

    def agrees(tap):
        states, expected = own.encode(ids), true.changes(true.encode(ids), tap)
        for launches in (0, 0, 1, 1):  # plain; done and recorded; from then on
            before = device.StubCounts().launches
            found = own.changes(states, tap)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())
            assert device.StubCounts().launches - before == launches
        return True

    taps = range(1, 1 + len(directory.manifest.taps))
    assert all(map(agrees, taps))
    with ThreadPoolExecutor(1) as pool:
        assert all(pool.map(agrees, taps))
    assert since.spoiled == 0
    assert lazy_tensorrt == []


def test_out_of_memory_says_what_to_do_and_is_no_end(memory):
    with pytest.raises(EngineError, match=r"no 128.0 MiB left \(CUDA_ERROR_OUT_OF_MEMORY.*smaller --batch-size"):
        memory.empty((32, 1 << 20), np.float32)
    memory.download(memory.upload(KIB))


def test_errors_carry_cudas_name_and_text(memory):
    with pytest.raises(EngineError, match="CUDA_ERROR_INVALID_VALUE: invalid argument"):
        memory.copy(Tensor(KIB.ctypes.data, KIB.shape, KIB.dtype, KIB), memory.empty(KIB.shape, KIB.dtype))


def test_there_is_no_third_gpu(monkeypatch):
    with pytest.raises(ProviderError, match="no GPU 2 here: use one from 0 to 1"):
        device.open_memory(monkeypatch, index=2)
