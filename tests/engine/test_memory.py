"""Memory: the host's, and a GPU's; where there is no GPU, on a driver over host memory."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import device
import numpy as np
import pytest

from memedge.engine import reduction
from memedge.engine.memory import HostMemory, Tensor

HERE = Path(__file__).parent


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def memory(request, monkeypatch):
    return HostMemory(threads=2) if request.param == "host" else device.open_memory(monkeypatch)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int64, np.bool_])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1,), (), (0, 4)], ids=str)
def test_what_goes_up_comes_down(memory, shape, dtype):
    array = np.asarray(normal(*shape) * 9).astype(dtype)
    tensor = memory.upload(array)
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == (shape, dtype, array.nbytes)
    back = memory.download(tensor)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, array, strict=True)


def test_values_are_those_of_the_array_however_it_is_strided(memory):
    array = normal(6, 8)[::2, ::-3].T
    target = memory.empty(array.shape, array.dtype)
    memory.write(array, target)
    for tensor in (memory.upload(array), target):
        np.testing.assert_array_equal(memory.download(tensor), array)


def test_what_was_written_may_change_and_what_was_downloaded_does_not(memory):
    target = memory.empty((4, 5), np.float32)
    array = np.full((4, 5), 1, np.float32)
    memory.write(array, target)
    array[:] = 2
    first = memory.download(target)
    memory.write(array, target)
    del array
    second = memory.download(target)
    first += 10
    np.testing.assert_array_equal(first, np.full((4, 5), 11))
    np.testing.assert_array_equal(second, np.full((4, 5), 2))
    np.testing.assert_array_equal(memory.download(target), second)


def test_work_is_done_in_order(memory):
    a, b, seen = (memory.empty((1000,), np.float32) for _ in range(3))
    results = []
    for value in range(5):
        memory.write(np.full(1000, value, np.float32), a)
        memory.copy(a, b)
        memory.write(np.full(1000, -1, np.float32), a)
        memory.copy(b, seen)
        results.append(memory.download(seen))
    for value, result in enumerate(results):
        np.testing.assert_array_equal(result, np.full(1000, value))


def test_parts_of_a_tensor_share_its_memory(memory):
    whole = memory.empty((4, 3), np.float32)
    memory.write(np.zeros((4, 3), np.float32), whole)
    row = Tensor(whole.pointer + 24, (3,), whole.dtype, whole.owner)
    memory.write(np.arange(3, dtype=np.float32), row)
    memory.copy(row, Tensor(whole.pointer, (1, 3), whole.dtype, whole.owner))
    del whole  # the parts keep it
    np.testing.assert_array_equal(memory.download(row), [0, 1, 2])
    rows = memory.download(Tensor(row.pointer - 24, (4, 3), row.dtype, row.owner))
    np.testing.assert_array_equal(rows, [[0, 1, 2], [0, 0, 0], [0, 1, 2], [0, 0, 0]])


def test_sizes_must_agree(memory):
    small, large = memory.empty((3,), np.float32), memory.empty((4,), np.float32)
    with pytest.raises(ValueError, match="12 bytes"):
        memory.copy(small, large)
    with pytest.raises(ValueError, match="32 bytes"):
        memory.write(np.zeros(4), large)


def prepared(memory, cond, uncond, row):
    return [memory.upload(x) for x in (cond, uncond, row)], memory.empty((3, len(cond)), np.float64)


@pytest.mark.parametrize("operands", ["uncond_delta", "cond_uncond", "cond_delta"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("rows", "shape"), [((0, 1, 2), (4, 8, 8)), ((2, 0, 2, 2), (3, 5, 7)), ((1,), (4, 64, 64))])
def test_the_reduction_pairs_rows_and_agrees_with_float64(memory, rows, shape, dtype, operands):
    cond, uncond = normal(len(rows), *shape, dtype=dtype), normal(3, *shape, seed=1, dtype=dtype)
    inputs, out = prepared(memory, cond, uncond, np.array(rows))
    memory.reduce(*inputs, operands, out)
    expected = device.guidance_statistics(cond, uncond[list(rows)], operands)
    np.testing.assert_allclose(memory.download(out), expected, rtol=1e-5, atol=1e-6)


def test_rows_that_are_not_finite_are_nan_and_others_are_not(memory):
    cond, uncond = normal(3, 4, 6, 6), normal(2, 4, 6, 6, seed=1)
    cond[1, 2, 3, 4] = np.inf
    uncond[1, 0, 0, 0] = np.nan
    inputs, out = prepared(memory, cond, uncond, np.array([0, 0, 1]))
    memory.reduce(*inputs, "uncond_delta", out)
    assert np.isnan(memory.download(out)).all(0).tolist() == [False, True, True]
    assert np.isnan(memory.download(out)).any(0).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cond": np.zeros((2, 4, 3, 3))}, "float32 or both float16"),
        ({"uncond": np.zeros((1, 4, 3, 3), np.float16)}, "uncond float16"),
        ({"uncond": np.zeros((1, 4, 3, 4), np.float32)}, "C, H, W"),
        ({"uncond": np.zeros((0, 4, 3, 3), np.float32)}, "C, H, W"),
        ({"cond": np.zeros((2, 4, 9), np.float32)}, "C, H, W"),
        ({"row": np.zeros(2, np.int32)}, "row is int32"),
        ({"row": np.zeros(3, np.int64)}, r"of shape \(2,\)"),
        ({"out": np.zeros((3, 2), np.float32)}, "out is float32"),
        ({"out": np.zeros((2, 3))}, r"of shape \(3, 2\)"),
        ({"operands": "both"}, "'both'"),
    ],
)
def test_reductions_that_would_read_elsewhere_are_refused(memory, wrong, message):
    given = {
        "cond": np.zeros((2, 4, 3, 3), np.float32),
        "uncond": np.zeros((1, 4, 3, 3), np.float32),
        "row": np.zeros(2, np.int64),
        "operands": "uncond_delta",
        "out": np.zeros((3, 2)),
    } | wrong
    given = {name: value if isinstance(value, str) else memory.upload(value) for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        memory.reduce(**given)


def test_captured_work_is_done_again_on_what_lies_there_then(memory):
    cond, uncond = memory.empty((2, 4, 8, 8), np.float32), memory.upload(normal(1, 4, 8, 8, seed=9))
    row, kept = memory.upload(np.zeros(2, np.int64)), memory.empty((2, 4, 8, 8), np.float32)
    out = memory.empty((3, 2), np.float64)

    def work():
        memory.reduce(cond, uncond, row, "uncond_delta", out)
        memory.copy(cond, kept)

    memory.write(normal(2, 4, 8, 8), cond)
    again = memory.capture(work)
    for seed in (1, 2):
        array = normal(2, 4, 8, 8, seed=seed)
        memory.write(array, cond)
        again()
        expected = device.guidance_statistics(array, normal(1, 4, 8, 8, seed=9), "uncond_delta")
        np.testing.assert_allclose(memory.download(out), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(memory.download(kept), array)


def test_threads_share_a_memory(memory):
    def use(thread):
        a, b = memory.empty((64, 65), np.float32), memory.empty((64, 65), np.float32)
        for turn in range(30):
            array = np.full((64, 65), 100 * thread + turn, np.float32)
            memory.write(array, a)
            memory.copy(a, b)
            array[:] = -1
            if not (memory.download(b) == 100 * thread + turn).all():
                return False
            a = memory.empty((64, 65), np.float32)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(8)))


def test_host_memory_shares_an_uploaded_array_and_never_writes_to_it():
    memory = HostMemory()
    array = normal(3, 4)
    tensor = memory.upload(array)
    assert tensor.pointer == array.ctypes.data
    other = memory.upload(normal(3, 4, seed=1))
    for change in (lambda: memory.write(normal(3, 4), tensor), lambda: memory.copy(other, tensor)):
        with pytest.raises(ValueError, match="read-only"):
            change()
    np.testing.assert_array_equal(array, normal(3, 4))
    array[:] = 0  # the caller's stays writeable


@pytest.fixture
def stub(cuda_stub):
    pytest.importorskip("cuda.core")
    if reduction.core_status().path == "numpy":
        pytest.skip("no native core")
    return cuda_stub


@pytest.mark.slow
def test_cuda_memory_on_a_driver_over_host_memory(stub):
    """Everything above that needs a GPU, and what only a driver that counts can show."""
    files = [str(HERE / "test_memory.py"), str(HERE / "cuda_stub_checks.py")]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    environment = device.stub_environment(stub, memory=64 << 20)
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout


def test_cuda_memory_that_is_in_use_when_python_ends_says_nothing(stub):
    code = (
        "import device, numpy, pytest\n"
        "memory = device.open_memory(pytest.MonkeyPatch())\n"
        "tensor = memory.upload(numpy.zeros(4))\n"
        "again = memory.capture(lambda: None)\n"
        "loop = [tensor]\n"
        "loop.append(loop)\n"
    )
    environment = device.stub_environment(stub) | {"PYTHONPATH": str(HERE.parent / "support")}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_native_cores_own_launch_is_called_as_it_is_defined(stub):
    """CUDA's runtime, linked into the core, asks the driver over host memory for more than that has."""
    if not reduction.core_status().cuda:
        pytest.skip("the native core was built without nvcc")
    code = (
        "import numpy as np\n"
        "from memedge.engine import cuda, errors\n"
        "memory = cuda.CudaMemory(1)\n"
        "arrays = np.zeros((2, 4, 3, 3), np.float32), np.zeros((1, 4, 3, 3), np.float32), np.zeros(2, np.int64)\n"
        "try:\n"
        "    memory.reduce(*map(memory.upload, arrays), 'uncond_delta', memory.empty((3, 2), np.float64))\n"
        "except errors.EngineError as error:\n"
        "    print(error)\n"
    )
    environment = device.stub_environment(stub)
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert "did not take the reduction (CUDA guidance statistics: operation not supported)" in done.stdout, done.stderr
