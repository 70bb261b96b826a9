"""The CUDA reduction without a GPU: its source run on the CPU against serial.h, and what nvcc makes of it."""

import ast
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

_core = pytest.importorskip("memedge._core", reason="the native core was not built", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # "unroll" is nvcc's
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
KERNELS = 3 * 3 * 2  # dtypes, operands, 16-byte loads or not
TARGETS = ast.literal_eval(re.search(r"^CUDA_TARGETS = (.*)$", (ROOT / "setup.py").read_text(), re.M)[1])


def output(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=[[], SANITIZERS], ids=["plain", "sanitizers"])
def check(request, tmp_path_factory):
    """The kernel's source as a program for the CPU."""
    if not (compiler := shutil.which("g++")):
        pytest.skip("no g++")
    program = tmp_path_factory.mktemp("check") / "check"
    source = ROOT / "tests/csrc/check_cuda_kernel.cc"
    output(compiler, "-std=c++17", "-O1", *request.param, *WARNINGS, f"-I{ROOT / 'csrc'}", source, "-o", program)
    return program


@pytest.mark.slow
def test_agrees_with_the_serial_truth_in_both_thread_orders(check):
    assert ", 0 failures" in output(check)


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "code"), [("race", 1), ("divergence", -6), ("alignment", -6)])
def test_mistakes_are_found(check, mistake, code):
    assert subprocess.run([check, mistake], capture_output=True).returncode == code


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The kernel for every target, and what the assembler says about it."""
    if not (nvcc := shutil.which("nvcc")):
        pytest.skip("no nvcc")
    binary = tmp_path_factory.mktemp("nvcc") / "kernel.o"
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in TARGETS]
    source = ROOT / "csrc/guidance_stats.cu"
    return binary, output(
        nvcc, "-O3", "-std=c++17", "-Werror=all-warnings", *targets, "-Xptxas=-v", "-c", source, "-o", binary
    )


@pytest.mark.slow
def test_no_target_spills_registers(compiled):
    _, report = compiled
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) == KERNELS * len(TARGETS)
    assert set(frames) == {("0", "0", "0")}


@pytest.mark.slow
def test_vector_kernels_load_16_bytes_at_a_time(compiled):
    installed = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    cuobjdump = shutil.which("cuobjdump") or (installed and installed[-1])
    if not cuobjdump:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    kernels = output(cuobjdump, "-sass", compiled[0]).split("Function : ")[1:]
    assert len(kernels) == KERNELS * len(TARGETS)
    for kernel in kernels:
        name = kernel.split(maxsplit=1)[0]
        wide = [".128" in load for load in re.findall(r"\bLDG\.\S+", kernel)]
        assert wide
        assert not any(wide) if "Lj1EE" in name else all(wide), name


@pytest.fixture
def launch():
    if not _core.CUDA_TARGETS:
        pytest.skip("the native core was built without nvcc")
    return lambda **change: _core.cuda_guidance_stats(
        **{
            "cond_ptr": 16,
            "uncond_ptr": 16,
            "out_ptr": 16,
            "dtype": "float32",
            "rows": 2,
            "uncond_rows": 1,
            "channels": 4,
            "pixels": 4,
        }
        | change
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cond_ptr": 0}, ValueError, "null"),
        ({"pixels": 0}, ValueError, "zero"),
        ({"rows": 3, "uncond_rows": 2}, ValueError, "multiple"),
        ({"dtype": "float64"}, ValueError, "dtype 'float64'"),
        ({"operands": "both"}, ValueError, "operands 'both'"),
        ({"cond_ptr": 18}, RuntimeError, "items' size"),
        ({"out_ptr": 20}, RuntimeError, "multiple of 8"),
        ({"rows": 1 << 31}, RuntimeError, "more rows"),
    ],
)
def test_wrong_arguments_are_refused(launch, change, error, message):
    with pytest.raises(error, match=message):
        launch(**change)


def test_no_driver_is_an_error_that_says_so(launch):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver")
    with pytest.raises(RuntimeError, match="driver"):
        launch()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 2, 4, 64, 64), (3, 1, 3, 7, 5), (2, 2, 16, 96, 96), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("operands", ["uncond_delta", "cond_uncond", "cond_delta"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.skipif(not _core.CUDA_TARGETS, reason="the native core was built without nvcc")
def test_the_gpu_agrees_with_the_cpu_core(dtype, operands, shape):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU, or PyTorch cannot use it")
    rows, uncond_rows, channels, height, width = shape
    cond, uncond = (torch.randn(r, channels, height * width).to(getattr(torch, dtype)) for r in (rows, uncond_rows))
    expected = torch.empty(3, rows, dtype=torch.float64)
    sizes = dtype, rows, uncond_rows, channels, height * width, operands
    _core.guidance_stats(cond.data_ptr(), uncond.data_ptr(), expected.data_ptr(), *sizes)
    on_gpu = [x.cuda() for x in (cond, uncond)]
    results = []
    for _ in range(2):
        out = torch.full((3, rows), -7.0, dtype=torch.float64, device="cuda")
        pointers = (x.data_ptr() for x in (*on_gpu, out))
        _core.cuda_guidance_stats(*pointers, *sizes, torch.cuda.current_stream().cuda_stream)
        results.append(out.cpu())
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], expected, rtol=1e-6, atol=1e-6)
