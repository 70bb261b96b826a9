"""The steps' reduction against its definition in float64, on both paths; what does not fit is refused."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from device_tensors import LEGACY, CudaArray, Dlpack, memory

from memedge import InputError
from memedge.engine import numpy_reduction, reduction
from memedge.engine.errors import NotFiniteError, ProviderError
from memedge.engine.guidance_step import StepReduction

SHAPE = (3, 4, 5, 7)


@pytest.fixture(params=["native", "numpy"])
def path(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(reduction, "core", None)
    elif reduction.core is None:
        pytest.skip("the native core was not built")


def steps(dtype, count=3, shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator).to(dtype) for _ in range(3)] for _ in range(count)]


def norms(values):
    return np.sqrt((values**2).sum((1, 2, 3)))


def expected(given, scale, shift):
    """Norm, change and move of each step, and its map, by the definition."""
    found, before = [], None
    for tensors in given:
        x, cond, uncond = (tensor.double().numpy() for tensor in tensors)
        eps, delta = scale * cond + shift * x, scale * (cond - uncond)
        nothing = np.zeros(len(x))
        change, move = (nothing, nothing) if before is None else (norms(eps - before[1]), norms(x - before[0]))
        found.append((norms(delta), change, move, (delta**2).sum(1)))
        before = x, eps
    return found


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.6, 0.8)])
def test_steps_are_as_defined(dtype, scale, shift):
    given, taken = steps(dtype), StepReduction()
    for tensors, (norm, change, move, map) in zip(given, expected(given, scale, shift), strict=True):
        found = taken.step(*tensors, scale, shift)
        for own, value in ((found.norm, norm), (found.change, change), (found.move, move), (taken.map(), map)):
            np.testing.assert_allclose(own, value, rtol=2e-6)


@pytest.mark.usefixtures("path")
def test_a_row_of_many_pixels_loses_no_digits():
    given, taken = steps(torch.float32, 2, (1, 2, 300, 301)), StepReduction()
    for tensors, (norm, change, move, _) in zip(given, expected(given, 1.0, 0.0), strict=True):
        found = taken.step(*tensors)
        np.testing.assert_allclose([found.norm, found.change, found.move], [norm, change, move], rtol=1e-6)


@pytest.mark.usefixtures("path")
def test_the_callers_tensors_may_change_after_a_step():
    given, taken = steps(torch.float32, 2), StepReduction()
    first = [tensor.clone() for tensor in given[0]]
    taken.step(*first)
    for tensor in first:
        tensor.zero_()
    np.testing.assert_allclose(taken.step(*given[1]).change, expected(given, 1.0, 0.0)[1][1], rtol=1e-6)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_gives_no_statistics(which, value):
    taken = StepReduction()
    taken.step(*steps(torch.float32)[0])
    tensors = steps(torch.float32)[1]
    tensors[which][1, 2, 3, 4] = value
    with pytest.raises(NotFiniteError, match="1 of 3 images"):
        taken.step(*tensors)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t[0], t[1], t[2][:2]], "same of all three"),
        (lambda t: [tensor[0] for tensor in t], "B, C, H, W"),
        (lambda t: [t[0].half(), *t[1:]], "x is float16 and eps_cond is float32"),
        (lambda t: ["x", *t[1:]], "x is a str"),
        (lambda t: [tensor[:0] for tensor in t], "no values|same of all three"),
        (lambda t: [tensor[:2] for tensor in t], "at the first step"),
        (lambda t: [tensor.double() for tensor in t], "x is float64, and was not at the first step"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    tensors, taken = steps(torch.float32)[0], StepReduction()
    taken.step(*tensors)
    with pytest.raises(InputError, match=message):
        taken.step(*change(tensors))


def test_without_a_step_there_is_no_map():
    with pytest.raises(InputError, match="no step"):
        StepReduction().map()


class Memory:
    """A GPU's memory, in the host's."""

    def __init__(self, size, device):
        self.device, self.values = device, np.full(size, 0xFF, np.uint8)

    @property
    def address(self):
        return self.values.ctypes.data

    def download(self, host):
        host.view(np.uint8).reshape(-1)[:] = self.values


@pytest.fixture
def gpu(monkeypatch):
    """A core that plays the GPU: it notes each call and reduces what the pointers point to."""
    core = SimpleNamespace(CUDA_TARGETS=(75,), calls=[], error=None, DeviceMemory=Memory)
    core.address = lambda array: array.ctypes.data
    core.cuda_device = lambda _pointer: 5

    def step(x, cond, uncond, last_x, last_eps, map, out, dtype, first, scale, shift, *sizes, device, streams):
        if core.error:
            raise RuntimeError(core.error)
        core.calls.append((device, streams))
        rows, channels, pixels = sizes
        shape = rows, channels, 1, pixels
        given = [memory(pointer, shape, dtype) for pointer in (x, cond, uncond)]
        kept = [memory(pointer, shape, "float32") for pointer in (last_x, last_eps)]
        result = np.frombuffer((ctypes.c_double * (3 * rows)).from_address(out)).reshape(3, rows)
        last = None if first else tuple(values.copy() for values in kept)
        found = numpy_reduction.guidance_step(*given, last, dtype, (scale, shift), result)
        for values, new in zip(kept, found[:2], strict=True):
            values[:] = new
        ctypes.memmove(map, found[2].ctypes.data, found[2].nbytes)

    core.cuda_guidance_step = step
    monkeypatch.setattr(reduction, "core", core)
    return core


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_all_stays_there_but_three_numbers(gpu, dtype):
    given, taken = steps(dtype), StepReduction()
    for tensors, (norm, change, move, map) in zip(given, expected(given, 0.6, 0.8), strict=True):
        on_gpu = [Dlpack(tensor, (2, 3)) for tensor in tensors]
        found = taken.step(*on_gpu, 0.6, 0.8)
        for own, value in ((found.norm, norm), (found.change, change), (found.move, move), (taken.map(), map)):
            np.testing.assert_allclose(own, value, rtol=2e-6)
        assert [tensor.streams for tensor in on_gpu] == [[LEGACY]] * 3
    assert gpu.calls == [(3, [LEGACY])] * 3


def test_streams_that_tensors_name_are_waited_for(gpu):
    tensors = [tensor.numpy() for tensor in steps(torch.float32)[0]]
    StepReduction().step(*(CudaArray(array, stream=stream) for array, stream in zip(tensors, (7, 9, 7), strict=True)))
    StepReduction().step(*(CudaArray(array) for array in tensors))
    assert gpu.calls == [(5, [7, 9]), (5, [LEGACY])]


def test_what_a_gpu_does_not_take_is_refused(gpu):
    tensors = steps(torch.float32)[0]
    on_gpu = [Dlpack(tensor) for tensor in tensors]
    with pytest.raises(InputError, match="eps_cond on GPU 1: move one to the other's device"):
        StepReduction().step(on_gpu[0], Dlpack(tensors[1], (2, 1)), on_gpu[2])
    with pytest.raises(InputError, match="some are on a GPU and some in host memory"):
        StepReduction().step(*on_gpu[:2], tensors[2])
    with pytest.raises(InputError, match="float64"):
        StepReduction().step(*(Dlpack(tensor.double()) for tensor in tensors))
    with pytest.raises(InputError, match="not contiguous"):
        StepReduction().step(*(Dlpack(tensor.transpose(2, 3)) for tensor in tensors))
    taken = StepReduction()
    taken.step(*on_gpu)
    with pytest.raises(InputError, match="or is on another device"):
        taken.step(*(Dlpack(tensor, (2, 1)) for tensor in tensors))
    gpu.error = "out of memory"
    with pytest.raises(ProviderError, match=r"GPU 0 could not reduce the predictions \(out of memory"):
        taken.step(*on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_real_gpu(dtype):
    if not reduction.core_status().cuda or not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU, or the native core was built without nvcc")
    given, taken = steps(dtype, shape=(3, 4, 64, 64)), StepReduction()
    for tensors, (norm, change, move, map) in zip(given, expected(given, 0.6, 0.8), strict=True):
        found = taken.step(*(tensor.cuda() for tensor in tensors), 0.6, 0.8)
        for own, value in ((found.norm, norm), (found.change, change), (found.move, move), (taken.map(), map)):
            np.testing.assert_allclose(own, value, rtol=2e-6)
