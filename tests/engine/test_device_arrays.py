"""Tensors on a GPU: what the core is asked to do with them, by fake tensors in host memory, and the truth on a GPU."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from device_tensors import LEGACY, CudaArray, Dlpack, OldDlpack, memory

from memedge import GuidanceStats, InputError, guidance_stats
from memedge.engine import numpy_reduction, reduction
from memedge.engine.errors import NotFiniteError, ProviderError
from memedge.engine.reduction import reduce_indexed, reduce_rows


@pytest.fixture
def core(monkeypatch):
    """A core that plays the GPU: it notes each call and reduces what the pointers point to."""
    core = SimpleNamespace(CUDA_TARGETS=(75,), calls=[], error=None)
    core.address = lambda array: array.ctypes.data
    core.cuda_device = lambda pointer: 5  # noqa: ARG005

    def to_host(
        cond, uncond, out, dtype, rows, uncond_rows, channels, pixels, operands, *, device, stream, uncond_stream
    ):
        if core.error:
            raise RuntimeError(core.error)
        core.calls.append((cond, uncond, device, stream, uncond_stream))
        c, u = memory(cond, (rows, channels, pixels), dtype), memory(uncond, (uncond_rows, channels, pixels), dtype)
        result = np.frombuffer((ctypes.c_double * (3 * rows)).from_address(out)).reshape(3, rows)
        numpy_reduction.guidance_stats(c, u, None, dtype, operands, result)

    core.cuda_guidance_stats_to_host = to_host
    monkeypatch.setattr(reduction, "core", core)
    return core


def tensors(dtype=torch.float32, rows=(3, 2), shared=(2,)):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*lead, 4, 6, 5, generator=generator).to(dtype) for lead in (rows, shared))


def expected(cond, uncond, **options):
    """The same tensors, reduced in host memory in NumPy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction, "core", None)
        return reduce_rows(cond, uncond, **options)


@pytest.mark.parametrize("operands", reduction.OPERANDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [2, 13])
@pytest.mark.parametrize("fake", [Dlpack, OldDlpack])
def test_dlpack_is_reduced_where_it_is(core, fake, kind, dtype, operands):
    cond, uncond = tensors(dtype)
    on_gpu = fake(cond, (kind, 3)), fake(uncond, (kind, 3))
    rows = reduce_rows(*on_gpu, operands)
    truth = expected(cond, uncond, operands=operands)
    np.testing.assert_array_equal(rows.norm, truth.norm)
    np.testing.assert_array_equal(rows.channel, truth.channel)
    np.testing.assert_array_equal(rows.flat, truth.flat)
    assert rows.norm.shape == (3, 2)
    assert core.calls == [(cond.data_ptr(), uncond.data_ptr(), 3, LEGACY, LEGACY)]
    assert on_gpu[0].streams == on_gpu[1].streams == [LEGACY]


def test_the_public_function_takes_them(core):
    cond, uncond = tensors()
    stats = guidance_stats(Dlpack(cond), Dlpack(uncond), alignment="flat")
    assert isinstance(stats, GuidanceStats) and len(core.calls) == 1
    np.testing.assert_array_equal(stats.alignment, expected(cond, uncond).flat)


def test_a_view_starts_where_its_memory_starts(core):
    base, uncond = tensors()
    reduce_rows(Dlpack(base[1]), Dlpack(uncond))
    assert core.calls[0][0] == base.data_ptr() + base[0].numel() * 4


@pytest.mark.parametrize(
    ("cond_stream", "uncond_stream", "called"),
    [
        ({"stream": 7}, {"stream": 7}, (7, 7)),
        ({"stream": 7}, {"stream": 9}, (7, 9)),
        ({"stream": 2}, {"stream": None}, (2, 2)),
        ({"stream": None}, {"stream": 9}, (9, 9)),
        ({}, {"version": 2}, (LEGACY, LEGACY)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_cuda_array_interface(core, dtype, cond_stream, uncond_stream, called):
    cond, uncond = (tensor.numpy().astype(dtype) for tensor in tensors())
    strided = {"strides": cond.strides} | cond_stream
    rows = reduce_rows(CudaArray(cond, **strided), CudaArray(uncond, **uncond_stream))
    np.testing.assert_array_equal(rows.norm, expected(cond, uncond).norm)
    assert core.calls == [(cond.ctypes.data, uncond.ctypes.data, 5, *called)]


def test_both_interfaces_together(core):
    cond, uncond = tensors()
    reduce_rows(Dlpack(cond, (2, 5)), CudaArray(uncond.numpy(), stream=9))
    assert core.calls[0][2:] == (5, LEGACY, 9)


@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_are_not_finite_are_an_error(core, side):
    pair = tensors()
    pair[side][-1, ..., 2, 3, 4] = torch.nan
    with pytest.raises(NotFiniteError, match=r"of 6 predictions.*first: row"):
        reduce_rows(*(Dlpack(tensor) for tensor in pair))
    assert core.calls


def test_dimensions_of_size_one_have_any_stride(core):
    cond = torch.randn(1, 4, 6, 5).as_strided((1, 4, 6, 5), (7, 30, 5, 1))
    reduce_rows(Dlpack(cond), Dlpack(cond[0]))
    assert core.calls


COND, UNCOND = tensors()
DEVICE = CudaArray(UNCOND.numpy())


@pytest.mark.parametrize(
    ("cond", "uncond", "message"),
    [
        (Dlpack(COND), UNCOND, "one is on a GPU and one in host memory"),
        (COND.numpy(), DEVICE, "one is on a GPU and one in host memory"),
        (Dlpack(COND), Dlpack(UNCOND, (2, 1)), "cond is on GPU 0 and uncond on GPU 1"),
        (Dlpack(COND), DEVICE, "cond is on GPU 0 and uncond on GPU 5"),
        (Dlpack(COND.double()), Dlpack(UNCOND.double()), "float64.*convert them to float32"),
        (Dlpack(COND.half()), Dlpack(UNCOND), "cond is float16 and uncond is float32"),
        (
            Dlpack(COND.transpose(3, 4)),
            Dlpack(UNCOND.transpose(2, 3)),
            r"cond is on a GPU and not contiguous.*cond\.con",
        ),
        (Dlpack(COND), Dlpack(UNCOND[:1].expand(2, 4, 6, 5)), r"uncond is on a GPU and not contiguous"),
        (Dlpack(COND[..., ::2]), Dlpack(UNCOND[..., ::2]), "not contiguous"),
        (CudaArray(COND.numpy()[:, ::-1], strides=(960, -480, 120, 20, 4)), DEVICE, "cond is on a GPU and not contig"),
        (Dlpack(COND.int()), Dlpack(UNCOND), "cond has DLPack type code 0 with 32 bits"),
        (CudaArray(COND.numpy().astype(">f4")), DEVICE, "cond has the type '>f4': convert"),
        (CudaArray(COND.numpy(), typestr="|V2"), DEVICE, "through a library with DLPack"),
        (CudaArray(COND.numpy(), mask=DEVICE), DEVICE, "cond has a mask"),
        (CudaArray(COND.numpy(), stream=0), DEVICE, "stream 0"),
        (CudaArray(COND.numpy(), stream=-1), DEVICE, "no stream is -1"),
        (CudaArray(COND.numpy(), stream=1 << 64), DEVICE, "no stream is 1844"),
        (
            CudaArray(COND.numpy(), strides=(960, 480, 120, 20, 6)),
            DEVICE,
            r"strides \(960, .* 6\), which are not whole",
        ),
        (CudaArray(COND.numpy(), strides=(5, 7, 4)), DEVICE, "not whole elements of each dimension"),
        (CudaArray(COND.numpy(), strides=()), DEVICE, "not whole elements of each dimension"),
        (CudaArray(COND.numpy(), strides=(1 << 62, 480, 120, 20, 4)), DEVICE, "addresses that no memory has"),
        (CudaArray(COND.numpy(), shape=(-3, 2, 4, 6, 5)), DEVICE, "with a size below 0"),
        (CudaArray(COND.numpy(), shape=(3.0, 2, 4, 6, 5)), DEVICE, "cannot be read .TypeError.*'float'.*copy it"),
        (CudaArray(COND.numpy(), shape=None), DEVICE, "cannot be read .TypeError"),
        (CudaArray(COND.numpy(), data=None), DEVICE, "cannot be read .TypeError"),
        (CudaArray(COND.numpy(), data=(0, False)), DEVICE, "no memory: pass"),
        (CudaArray(COND.numpy(), data=(1 << 70, False)), DEVICE, "addresses that no memory has"),
        (CudaArray(COND.numpy(), data=(COND.data_ptr() + 2, False)), DEVICE, "cond is on a GPU and begins within"),
        (CudaArray(COND.numpy(), version=4), DEVICE, "no version is 4"),
        (CudaArray(COND.numpy(), offset=16), DEVICE, "no entry is called 'offset'"),
        (CudaArray(COND.numpy(), descr=[("", "<i4")]), DEVICE, r"has the type \[\('', '<i4'\)\]"),
        (SimpleNamespace(__cuda_array_interface__={}), DEVICE, "cannot be read .KeyError: 'version'"),
        (SimpleNamespace(__cuda_array_interface__=None), DEVICE, "cannot be read .TypeError"),
        (CudaArray(COND.numpy()[:0], data=(0, False)), DEVICE, "no values"),
        (Dlpack(COND), Dlpack(UNCOND[:, :3]), "must be the same"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(core, cond, uncond, message):
    with pytest.raises(InputError, match=message):
        reduce_rows(cond, uncond)
    assert not core.calls


@pytest.mark.parametrize(("said", "exported"), [((1, 0), (2, 0)), ((2, 0), (1, 0)), ((2, 0), (2, 1))])
def test_memory_elsewhere_than_said_is_not_read(core, said, exported):
    class Elsewhere(Dlpack):
        def __dlpack_device__(self):
            return said

        def __dlpack__(self, *, stream=None, max_version=None):
            return super().__dlpack__(stream=stream, max_version=max_version)

    with pytest.raises(InputError, match=r"says that it is on one device and is exported from another \(DLPack type"):
        reduce_rows(Elsewhere(COND, exported), Dlpack(UNCOND))
    assert not core.calls


def test_a_description_that_repeats_the_type_is_fine(core):
    reduce_rows(CudaArray(COND.numpy(), descr=[("", "<f4")]), DEVICE)
    assert core.calls


def test_an_index_is_for_host_memory(core):
    with pytest.raises(InputError, match="on a GPU"):
        reduce_indexed(Dlpack(COND[0]), Dlpack(UNCOND), np.zeros(2, np.int64), "uncond_delta", None)
    assert not core.calls


def test_what_the_library_says_is_passed_on(core):
    class Elsewhere(Dlpack):
        def __dlpack__(self, **_):
            raise BufferError("the current device is 0")

    with pytest.raises(InputError, match=r"cond cannot be read .*the current device is 0\): make GPU 1 current"):
        reduce_rows(Elsewhere(COND, (2, 1)), Dlpack(UNCOND))
    assert not core.calls


def test_what_cuda_says_is_passed_on(core):
    core.error = "CUDA guidance statistics: out of memory"
    with pytest.raises(ProviderError, match=r"GPU 0 could not reduce .*out of memory\): copy"):
        reduce_rows(Dlpack(COND), Dlpack(UNCOND))

    def no_driver(_):
        raise RuntimeError("no driver")

    core.cuda_device = no_driver
    with pytest.raises(ProviderError, match=r"uncond is on no GPU .*\(no driver\): copy"):
        reduce_rows(Dlpack(COND), DEVICE)


@pytest.mark.parametrize("without", [None, SimpleNamespace(CUDA_TARGETS=None)], ids=["numpy", "native"])
def test_a_build_without_cuda_says_so_and_asks_for_nothing(monkeypatch, without):
    monkeypatch.setattr(reduction, "core", without)
    cond = Dlpack(COND)
    for pair in ((cond, Dlpack(UNCOND)), (DEVICE, DEVICE)):
        with pytest.raises(InputError, match=r"cond is on an NVIDIA GPU, and this build .*no CUDA code.*nvcc"):
            reduce_rows(*pair)
    assert not cond.streams


def on_gpu(*arrays):
    if not reduction.core_status().cuda:
        pytest.skip("the native core was built without nvcc")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU, or PyTorch cannot use it")
    return tuple(array.cuda() for array in arrays)


def assert_equal_to_host(rows, cond, uncond):
    truth = reduce_rows(cond.cpu(), uncond.cpu())
    np.testing.assert_allclose(rows.norm, truth.norm, rtol=1e-6)
    np.testing.assert_allclose(rows.channel, truth.channel, rtol=0, atol=1e-6)
    np.testing.assert_allclose(rows.flat, truth.flat, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_tensors_of_torch(dtype):
    cond, uncond = on_gpu(*tensors(dtype))
    assert_equal_to_host(reduce_rows(cond, uncond), cond, uncond)


class Interface:
    """Torch's `__cuda_array_interface__`, with the stream that version 3 adds."""

    def __init__(self, tensor, stream):
        self.tensor = tensor
        self.__cuda_array_interface__ = tensor.__cuda_array_interface__ | {"version": 3, "stream": stream}


@pytest.mark.gpu
@pytest.mark.parametrize("through", ["DLPack", "interface"])
def test_gpu_work_on_another_stream_comes_first(through):
    """The values are written on a side stream, behind work that takes a while; nobody waits for it."""
    final, uncond = on_gpu(torch.randn(64, 4, 64, 64), torch.randn(4, 64, 64))
    slow = torch.randn(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    for _ in range(10):
        cond = torch.zeros_like(final)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            for _ in range(20):
                slow = slow @ slow.softmax(0)
            cond.copy_(final)
            if through == "DLPack":
                rows = reduce_rows(cond, uncond)
            else:
                rows = reduce_rows(*(Interface(x, side.cuda_stream) for x in (cond, uncond)))
        assert_equal_to_host(rows, final, uncond)


@pytest.mark.gpu
def test_gpu_errors_leave_the_gpu_usable():
    cond, uncond = on_gpu(*tensors())
    with pytest.raises(InputError, match="contiguous"):
        reduce_rows(cond.transpose(3, 4), uncond.transpose(2, 3))
    bad = cond.clone()
    bad[1, 1, 2, 3, 4] = torch.inf
    with pytest.raises(NotFiniteError, match="1 of 6"):
        reduce_rows(bad, uncond)
    assert_equal_to_host(reduce_rows(cond, uncond), cond, uncond)
