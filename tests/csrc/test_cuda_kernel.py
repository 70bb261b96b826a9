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
def program(request, tmp_path_factory):
    """Builds a check, which includes the source it checks, for the CPU."""
    if not (compiler := shutil.which("g++")):
        pytest.skip("no g++")
    built = {}

    def build(name):
        if name not in built:
            built[name] = tmp_path_factory.mktemp("check") / name
            source = ROOT / "tests/csrc" / f"{name}.cc"
            flags = ["-std=c++17", "-O1", *request.param, *WARNINGS, f"-I{ROOT / 'csrc'}"]
            output(compiler, *flags, source, "-o", built[name])
        return built[name]

    return build


@pytest.mark.slow
def test_agrees_with_the_serial_truth_in_both_thread_orders(program):
    assert ", 0 failures" in output(program("check_cuda_kernel"))


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "code"), [("race", 1), ("divergence", -6), ("alignment", -6)])
def test_mistakes_are_found(program, mistake, code):
    assert subprocess.run([program("check_cuda_kernel"), mistake], capture_output=True).returncode == code


@pytest.mark.slow
def test_whatever_fails_nothing_is_left_behind(program):
    assert "0 failures" in output(program("check_to_host"))


@pytest.mark.slow
def test_a_step_agrees_with_the_cpus(program):
    assert "0 failures" in output(program("check_guidance_step"))


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
        pytest.skip("no cuobjdump: python -m pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    kernels = output(cuobjdump, "-sass", compiled[0]).split("Function : ")[1:]
    assert len(kernels) == KERNELS * len(TARGETS)
    for kernel in kernels:
        name = kernel.split(maxsplit=1)[0]
        loads = re.findall(r"\bLDG\.\S+", kernel)
        wide = [".128" in load for load in loads]
        if "Lj1EE" in name:
            assert loads and not any(wide), name
        else:  # beside the values, only the row's entry in the index
            assert any(wide) and [".64" in load for load in loads if ".128" not in load] == [True], name


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
        ({"row_ptr": 20}, RuntimeError, "multiple of 8"),
        ({"rows": 1 << 31}, RuntimeError, "more rows"),
        ({"rows": 1, "uncond_rows": 1 << 31, "row_ptr": 16}, RuntimeError, "more rows"),
    ],
)
def test_wrong_arguments_are_refused(launch, change, error, message):
    with pytest.raises(error, match=message):
        launch(**change)


def test_no_driver_is_an_error_that_says_so(launch):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver")
    sizes = {"dtype": "float32", "rows": 1, "uncond_rows": 1, "channels": 1, "pixels": 1, "operands": "cond_delta"}
    pointers = {"cond_ptr": 16, "uncond_ptr": 16, "out_ptr": 16}
    for call in (
        launch,
        lambda: _core.cuda_guidance_stats_to_host(**pointers, **sizes, device=0, stream=1, uncond_stream=1),
        lambda: _core.cuda_device(16),
    ):
        with pytest.raises(RuntimeError, match="driver"):
            call()
