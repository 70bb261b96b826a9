"""What GPU providers lack on a machine: found out, named, and told with a remedy."""

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import device
import pytest
from numpy._core import _multiarray_umath

from memedge.engine import probe, reduction
from memedge.engine.probe import Driver, Gpu

DRIVER = Driver((13, 0), (Gpu("GPU", (8, 9), 1 << 34),), None)
LINKED = ["libcublas.so.13", "libcudart.so.13", "libc.so.6"]
MODULES = {"cuda": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def elf(names):
    """A little-endian ELF-64 file with two segments, of code and of dynamic entries, that links `names`."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
    places = [strings.index(name.encode() + b"\0") for name in names]
    entries = [(1, place) for place in places] + [(5, 0x10000 + 64 + 2 * 56), (10, len(strings)), (0, 0)]
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    at = 64 + 2 * 56 + len(strings)
    header = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    )
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x10000, 0, at, at, 4096)
    section = struct.pack("<IIQQQQQQ", 2, 6, at, 0x10000 + at, 0, len(dynamic), len(dynamic), 8)
    return header + load + section + strings + dynamic


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty site-packages, the only one; a GPU; device code; no library on the system but C's."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for module in MODULES.values():
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(probe, "driver", lambda: DRIVER)
    monkeypatch.setattr(probe, "missing_device_code", lambda: None)
    monkeypatch.setattr(probe, "_loads", lambda name: name == "libc.so.6")
    return tmp_path


def install(site, *distributions):
    for name in distributions:
        folder = site / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


def put(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def complete(site, provider):
    """Everything that the provider needs; returns where its native part and its libraries lie."""
    binary, libraries = {
        "cuda": ("onnxruntime/capi/libonnxruntime_providers_cuda.so", "nvidia/cu13/lib"),
        "tensorrt": ("tensorrt_bindings/tensorrt.so", "tensorrt_libs"),
        "tensorrt-rtx": ("tensorrt_rtx_bindings/tensorrt_rtx.so", "tensorrt_rtx_libs"),
    }[provider]
    put(site / MODULES[provider] / "__init__.py", b"raise AssertionError('imported')")
    put(site / binary, elf(LINKED))
    for name in LINKED[:2]:
        put(site / libraries / name)
    if provider == "cuda":
        put(site / "nvidia/cudnn/lib/libcudnn.so.9")
        install(site, "onnxruntime-gpu")
    install(site, "cuda-core", "cuda-bindings")
    return site / binary, site / libraries


@pytest.mark.parametrize("provider", MODULES)
def test_nothing_is_missing_where_all_is_there_and_nothing_is_imported(site, provider):
    complete(site, provider)
    assert probe.missing_for(provider) is None


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("provider", MODULES)
def test_without_the_package_it_says_which_extra(provider):
    message = probe.missing_for(provider)
    assert "not installed" in message
    assert f"pip install 'memedge[{provider}]'" in message


@pytest.mark.parametrize("provider", MODULES)
def test_every_missing_library_is_named_and_no_other(site, provider):
    _, libraries = complete(site, provider)
    (libraries / "libcublas.so.13").unlink()
    message = probe.missing_for(provider)
    assert "needs libcublas.so.13, not found" in message
    (libraries / "libcudart.so.13").unlink()
    assert "needs libcublas.so.13, libcudart.so.13, not found" in probe.missing_for(provider)


def test_cudnn_is_needed_though_it_is_not_linked(site):
    complete(site, "cuda")
    (site / "nvidia/cudnn/lib/libcudnn.so.9").unlink()
    assert "needs libcudnn.so.9, not found" in probe.missing_for("cuda")


def test_libraries_of_the_system_count(site, monkeypatch):
    _, libraries = complete(site, "cuda")
    (libraries / "libcublas.so.13").unlink()
    monkeypatch.setattr(probe, "_loads", lambda name: name in ("libc.so.6", "libcublas.so.13"))
    assert probe.missing_for("cuda") is None


@pytest.mark.parametrize("provider", MODULES)
@pytest.mark.parametrize("absent", ["cuda-core", "cuda-bindings"])
def test_cudas_python_packages_are_needed(site, provider, absent):
    complete(site, provider)
    (site / f"{absent.replace('-', '_')}-1.0.dist-info/METADATA").unlink()
    (site / f"{absent.replace('-', '_')}-1.0.dist-info").rmdir()
    assert f"needs {absent}: run" in probe.missing_for(provider)


def test_two_onnx_runtimes_are_one_broken(site):
    complete(site, "cuda")
    install(site, "onnxruntime")
    assert "both installed" in probe.missing_for("cuda")
    assert list(probe.distributions("onnxruntime")) == ["onnxruntime", "onnxruntime-gpu"]


def test_the_onnx_runtime_for_processors_is_not_enough(site):
    put(site / "onnxruntime/__init__.py")
    install(site, "onnxruntime", "cuda-core", "cuda-bindings")
    assert "what is installed is onnxruntime: uninstall it" in probe.missing_for("cuda")


def test_the_driver_must_know_the_cuda_that_onnx_runtime_was_built_for(site, monkeypatch):
    complete(site, "cuda")
    monkeypatch.setattr(probe, "driver", lambda: Driver((12, 4), DRIVER.gpus, None))
    assert "built for CUDA 13, but the driver supports CUDA up to 12.4" in probe.missing_for("cuda")


@pytest.mark.parametrize("content", [b"", b"not an ELF file", elf(LINKED)[:150], elf(LINKED)[:-40]])
def test_a_damaged_native_part_is_told(site, content):
    binary, _ = complete(site, "cuda")
    binary.write_bytes(content)
    assert "install it again" in probe.missing_for("cuda")


def test_what_is_missing_is_told_in_order(site, monkeypatch):
    """Packages, driver, device code, libraries: the later ones mean nothing without the earlier ones."""
    _, libraries = complete(site, "cuda")
    (libraries / "libcublas.so.13").unlink()
    monkeypatch.setattr(probe, "missing_device_code", lambda: "no device code")
    monkeypatch.setattr(probe, "driver", lambda: Driver(None, (), "no driver"))
    install(site, "onnxruntime")
    seen = [probe.missing_for("cuda")]
    (site / "onnxruntime-1.0.dist-info/METADATA").unlink()
    (site / "onnxruntime-1.0.dist-info").rmdir()
    seen.append(probe.missing_for("cuda"))
    monkeypatch.setattr(probe, "driver", lambda: DRIVER)
    seen.append(probe.missing_for("cuda"))
    monkeypatch.setattr(probe, "missing_device_code", lambda: None)
    seen.append(probe.missing_for("cuda"))
    parts = ("both installed", "no driver", "no device code", "libcublas.so.13")
    assert all(part in message for part, message in zip(parts, seen, strict=True)), seen


def test_linked_libraries_agree_with_the_systems_own_reader():
    if not (readelf := shutil.which("readelf")):
        pytest.skip("no readelf")
    library = Path(_multiarray_umath.__file__)
    done = subprocess.run([readelf, "-dW", library], capture_output=True, text=True, env={"LC_ALL": "C"})
    expected = [line.split("[")[1].rstrip("]\n") for line in done.stdout.splitlines() if "(NEEDED)" in line]
    assert expected
    assert list(probe.linked_libraries(library)) == expected


@pytest.mark.parametrize(
    ("cuda", "path", "part"),
    [(False, "native", "MEMEDGE_REQUIRE_CUDA=1"), (True, "native", None), (False, "numpy", "because it is")],
)
def test_device_code_is_missing_where_it_was_not_built(monkeypatch, cuda, path, part):
    monkeypatch.setattr(probe, "driver", lambda: DRIVER)
    status = reduction.CoreStatus(path, "because it is", "avx2", ("avx2",), "GCC", cuda, (75,) if cuda else None)
    monkeypatch.setattr(reduction, "core_status", lambda: status)
    message = probe.missing_device_code()
    assert message is None if part is None else part in message


def test_gpus_older_than_the_device_code_are_told(monkeypatch):
    status = reduction.CoreStatus("native", "", "avx2", ("avx2",), "GCC", True, (75, 80, 120))
    monkeypatch.setattr(reduction, "core_status", lambda: status)
    gpus = tuple(Gpu("GPU", capability, 1 << 34) for capability in [(7, 0), (7, 5), (12, 1)])
    monkeypatch.setattr(probe, "driver", lambda: Driver((12, 4), gpus))
    assert [probe.missing_device_code(index) is None for index in range(3)] == [False, True, True]
    assert "GPU is sm70, older than sm75" in probe.missing_device_code()


def test_without_a_driver_it_says_so(monkeypatch):
    monkeypatch.setattr(probe, "_DRIVER", "libno-driver-here.so.1")
    found = probe.driver.__wrapped__()
    assert (found.cuda, found.gpus) == (None, ())
    assert "No NVIDIA driver" in found.problem
    assert "--gpus all" in found.problem


def ask_stub(library, code, **settings):
    environment = device.stub_environment(library, **settings)
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_driver_is_asked_for_its_gpus(cuda_stub):
    found = ask_stub(cuda_stub, "from memedge.engine.probe import *; print(driver())", memory=8 << 30)
    gpus = tuple(Gpu(f"Stub GPU {index}", (8, 9), 8 << 30) for index in range(2))
    assert found.strip() == str(Driver((13, 0), gpus, None))
    assert gpus[0].target == "sm89"


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (100, ["CUDA_ERROR_NO_DEVICE: no CUDA-capable device", "CUDA_VISIBLE_DEVICES"]),
        (803, ["CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "restart the machine"]),
        (999, ["CUDA_ERROR_UNKNOWN: unknown error", "nvidia-modprobe"]),
        (34, ["stand-in for building"]),
        (777, ["CUDA error 777", "install NVIDIA's driver again"]),
    ],
)
def test_a_driver_that_does_not_start_is_told_in_cudas_words_with_a_remedy(cuda_stub, code, parts):
    pytest.importorskip("cuda.core")
    script = (
        "from memedge.engine import probe, cuda, errors\n"
        "print(probe.missing_driver())\n"
        "try:\n"
        "    cuda.CudaMemory()\n"
        "except errors.ProviderError as error:\n"
        "    print(error)\n"
    )
    lines = ask_stub(cuda_stub, script, init=code).splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert all(part in lines[0] for part in parts)


def test_probing_imports_no_runtime():
    code = (
        "import sys; from memedge.engine import probe\n"
        "for provider in ('cuda', 'tensorrt', 'tensorrt-rtx'): probe.missing_for(provider)\n"
        "heavy = ('onnxruntime', 'tensorrt', 'tensorrt_rtx', 'cuda.core', 'torch')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
