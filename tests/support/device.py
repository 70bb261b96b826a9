"""A GPU for tests: the machine's, or, in processes that `stub_environment` is for, a driver over host memory."""

import ctypes
import os

import numpy as np
import pytest

from memedge.engine import probe, reduction

_STUBBED = "MEMEDGE_TEST_CUDA_STUB"
DEVICE_BIT = 1 << 56


class StubCounts(ctypes.Structure):
    """`counts` of cuda_stub.c, as they are when this is made."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("to_device", "to_host", "within", "live", "live_bytes"),
            *("streams", "graphs", "spoiled", "waits", "launches"),
        )
    )

    def __init__(self):
        ctypes.CDLL("libcuda.so.1").stub_counts(ctypes.byref(self))


def stub_environment(library, **settings):
    """The environment of a process in which the driver is cuda_stub.c, built as `library`."""
    path = os.pathsep.join(filter(None, (str(library.parent), os.environ.get("LD_LIBRARY_PATH"))))
    settings = {f"STUB_{name.upper()}": str(value) for name, value in settings.items()}
    return os.environ | settings | {"LD_LIBRARY_PATH": path, _STUBBED: "1"}


def open_memory(monkeypatch, index=0):
    """A CudaMemory; skips the test with a reason where there can be none."""
    if os.environ.get(_STUBBED):
        monkeypatch.setattr(reduction, "core", _CoreForStub(reduction.core))
    if probe.missing_driver():
        pytest.skip("no NVIDIA driver here")
    if absent := [name for name in ("cuda-core", "cuda-bindings") if not probe.installed(name)]:
        pytest.skip(f"no {' and '.join(absent)}")
    if reason := probe.missing_device_code():
        pytest.skip(reason)
    from memedge.engine.cuda import CudaMemory

    return CudaMemory(index)


def guidance_statistics(cond, uncond, operands):
    """docs/methods.md §1 in float64, for [R, C, H, W] each: norm, channel, flat cosines [3, R]; NaN if not finite."""
    cond, uncond = cond.astype(np.float64), uncond.astype(np.float64)
    delta = cond - uncond
    a, b = {"uncond_delta": (uncond, delta), "cond_uncond": (cond, uncond), "cond_delta": (cond, delta)}[operands]

    def cosine(axis):
        norms = [np.maximum(np.sqrt((x * x).sum(axis)), 1e-8) for x in (a, b)]
        return (a * b).sum(axis) / (norms[0] * norms[1])

    with np.errstate(all="ignore"):
        out = np.stack([np.sqrt((delta**2).sum((1, 2, 3))), cosine(1).mean((1, 2)), cosine((1, 2, 3))])
    out[:, ~np.isfinite(out).all(0)] = np.nan
    return out


class _CoreForStub:
    """The native core with a kernel that runs, as any work on a stream, when somebody waits for the stub's stream.

    The core's own kernel reaches no GPU through the stub. This one shows that what it is given is right.
    """

    CUDA_TARGETS = (75,)

    def __init__(self, core):
        if core is None:
            pytest.skip("no native core")
        self._core = core

    def __getattr__(self, name):
        return getattr(self._core, name)

    def cuda_guidance_stats(
        self, cond_ptr, uncond_ptr, out_ptr, dtype, rows, uncond_rows, channels, pixels, operands, stream, row_ptr
    ):
        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def kernel(_):
            def array(pointer, shape, dtype):
                count = int(np.prod(shape)) * np.dtype(dtype).itemsize
                memory = (ctypes.c_char * count).from_address(pointer & ~DEVICE_BIT)
                return np.frombuffer(memory, dtype).reshape(shape)

            cond = array(cond_ptr, (rows, channels, pixels, 1), dtype)
            uncond = array(uncond_ptr, (uncond_rows, channels, pixels, 1), dtype)
            row = array(row_ptr, (rows,), np.int64)
            array(out_ptr, (3, rows), np.float64)[...] = guidance_statistics(cond, uncond[row], operands)

        _kernels.append(kernel)  # a captured one is called again
        if error := ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc(ctypes.c_void_p(stream), kernel, None):
            raise RuntimeError(f"CUDA error {error}")


_kernels = []
