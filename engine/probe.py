"""What this machine can do for GPU providers: found out without importing a runtime, and without aborting.

Whoever is told that a provider can't be used here is told what exactly is missing.
"""

import ctypes
import struct
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from memedge.engine import reduction
from memedge.engine.providers import PROVIDERS, Provider

ONNX_RUNTIME = "onnxruntime"  # the module that two distributions have

_DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, in cuda.h

# What cuInit may say (cuda.h's CUresult), and what to do about it.
_ABSENT = (34, 100)  # no driver, no GPU
_REMEDIES = {
    34: "libcuda.so.1 is the CUDA toolkit's stand-in for building: take its folder out of LD_LIBRARY_PATH",
    100: "none is in this machine, or CUDA_VISIBLE_DEVICES hides it, or a container was started without --gpus all",
    802: "wait until NVIDIA's fabric manager runs, or start it",
    803: "the driver's library and kernel module are of different versions: restart the machine",
    804: "the CUDA compatibility library does not know this GPU: take its folder out of LD_LIBRARY_PATH",
    999: "load the driver's kernel module again (nvidia-modprobe -u), or restart the machine",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: its model.
        capability: its compute capability, such as (8, 9).
        memory: in bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def target(self) -> str:
        """Its compute capability as compilers write it, such as "sm89"."""
        return "sm{}{}".format(*self.capability)


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver.

    Attributes:
        cuda: the newest CUDA version it supports, such as (13, 0); None without a driver.
        gpus: in CUDA's order; none where it can't be used.
        problem: one sentence that says why it can't be used and what to do; None if it can.
        fails: whether that is a fault, rather than that no driver or no GPU is here.
    """

    cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    problem: str | None = None
    fails: bool = False


@cache
def driver() -> Driver:
    """Ask NVIDIA's driver, once per process."""
    try:
        cuda = ctypes.CDLL(_DRIVER)
    except OSError as error:
        reason = f"No NVIDIA driver is here ({error}): install it, or start the container with --gpus all."
        return Driver(None, (), reason)
    number, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    supported = (number.value // 1000, number.value % 1000 // 10)
    code = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if code:
        remedy = _REMEDIES.get(code, "install NVIDIA's driver again")
        problem = f"NVIDIA's driver gives no GPU ({_words(cuda, code)}): {remedy}."
        return Driver(supported, (), problem, fails=code not in _ABSENT)
    return Driver(supported, tuple(_gpu(cuda, index) for index in range(count.value)))


def _words(cuda: ctypes.CDLL, code: int) -> str:
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    if cuda.cuGetErrorName(code, ctypes.byref(name)) or cuda.cuGetErrorString(code, ctypes.byref(text)):
        return f"CUDA error {code}"
    return f"{(name.value or b'').decode()}: {(text.value or b'').decode()}"


def _gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(name.value.decode(errors="replace"), (major.value, minor.value), memory.value)


def missing_driver() -> str | None:
    """Return one sentence that says why no GPU can be used and what to do, or None if one can."""
    return driver().problem


def missing_device_code(index: int = 0) -> str | None:
    """Return one sentence that says why the reduction can't run on this GPU and what to do, or None if it can."""
    status = reduction.core_status()
    if status.path == "numpy":
        return f"The reduction can't run on the GPU, for the native core is not in use: {status.reason}."
    if not status.cuda:
        return (
            "memedge was built without CUDA's compiler: put nvcc 12.8 or newer on PATH and install memedge again from "
            "its source, with MEMEDGE_REQUIRE_CUDA=1."
        )
    oldest = min(status.cuda_targets or (0,))
    for gpu in driver().gpus[index : index + 1]:
        if gpu.capability < divmod(oldest, 10):
            return f"{gpu.name} is {gpu.target}, older than sm{oldest}, the oldest that memedge has device code for."
    return None


def distributions(module: str) -> dict[str, str]:
    """Return the installed distributions of a provider's module, of which there should be one, and their versions."""
    names = sorted(row.distribution for row in PROVIDERS.values() if row.module == module)
    return {name: number for name in names if (number := installed(name))}


def installed(distribution: str) -> str | None:
    """Return a distribution's version, or None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


# ONNX Runtime opens it by name when it meets the first convolution.
_CUDNN = "libcudnn.so.9"


def missing_for(provider: str) -> str | None:
    """Return what a provider lacks here, in one sentence that says what to do, or None if nothing does.

    `provider` is one of PROVIDERS. What is reported is the first of: Python packages; and for those on a GPU the driver
    and a GPU, device code in the native core, the libraries that the provider links. None is no promise: only a session
    or an engine that was opened is.
    """
    row = PROVIDERS[provider]
    if not row.on_gpu:
        return _missing_module(row)
    return _missing_packages(row) or missing_driver() or missing_device_code() or _missing_libraries(row)


def _missing_module(row: Provider) -> str | None:
    if find_spec(row.module) is None:
        return row.not_installed
    return None


def _missing_packages(row: Provider) -> str | None:
    runtimes = distributions(row.module)
    if row.module == ONNX_RUNTIME and len(runtimes) > 1:
        return (
            "onnxruntime and onnxruntime-gpu are both installed, share one module and overwrite each other: uninstall "
            f"both, then {row.remedy}."
        )
    if missing := _missing_module(row):
        return missing
    if row.module == ONNX_RUNTIME and _binary(row) is None:
        return (
            f"Provider {row.name!r} needs {row.distribution}, but what is installed is "
            f"{next(iter(runtimes), 'another build')}: uninstall it, then {row.remedy}."
        )
    absent = [name for name in ("cuda-core", "cuda-bindings") if installed(name) is None]
    if absent:
        return f"Provider {row.name!r} needs {' and '.join(absent)}: {row.remedy}."
    return None


def _missing_libraries(row: Provider) -> str | None:
    binary = _binary(row)
    if binary is None:
        return f"{row.product} has no native part for Linux here: install it again."
    folders = list(_site(row).glob(row.libraries))
    try:
        names = linked_libraries(binary)
    except (OSError, ValueError) as error:
        return f"{row.product} cannot be loaded ({error}): install it again."
    if row.module == ONNX_RUNTIME:
        names = (*names, _CUDNN)
        built_for = next((int(name.rpartition(".")[2]) for name in names if name.startswith("libcudart.so.")), 0)
        supported = driver().cuda
        if supported and supported[0] < built_for:
            return (
                f"ONNX Runtime here is built for CUDA {built_for}, but the driver supports CUDA up to "
                f"{supported[0]}.{supported[1]}: update the driver, or install an older onnxruntime-gpu."
            )
    absent = [name for name in names if not any((folder / name).is_file() for folder in folders) and not _loads(name)]
    if absent:
        return (
            f"{row.product} needs {', '.join(absent)}, not found on this machine: {row.remedy}, or add the folder to "
            "LD_LIBRARY_PATH."
        )
    return None


def _binary(row: Provider) -> Path | None:
    paths = (_site(row) / name for name in row.binaries)
    return next((path for path in paths if path.is_file()), None)


def _site(row: Provider) -> Path:
    """The folder that the provider's package lies in; wheels put their libraries into folders beside it."""
    spec = find_spec(row.module)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]).parent


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB, _DT_STRSZ = 1, 5, 10


def linked_libraries(path: Path) -> tuple[str, ...]:
    """Return the names of the libraries that an ELF file links: its DT_NEEDED entries, in order.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no little-endian 64-bit ELF file, or a damaged one.
    """
    with path.open("rb") as file:
        if file.read(6) != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is no little-endian 64-bit ELF file")
        try:
            return _linked_libraries(file)
        except (struct.error, StopIteration, ValueError):
            raise ValueError(f"{path} is a damaged ELF file") from None


def _linked_libraries(file: BinaryIO) -> tuple[str, ...]:
    """ELF-64 object file format: header, program headers, dynamic section, its string table."""
    file.seek(32)
    (start,) = struct.unpack("<Q", file.read(8))
    file.seek(54)
    size, number = struct.unpack("<HH", file.read(4))
    segments = []  # type, offset in the file, address, size in the file
    for index in range(number):
        file.seek(start + index * size)
        kind, _, offset, address, _, length = struct.unpack("<IIQQQQ", file.read(40))
        segments.append((kind, offset, address, length))
    entries: list[tuple[int, int]] = []
    for kind, offset, _, length in segments:
        if kind == _PT_DYNAMIC:
            file.seek(offset)
            entries += struct.iter_unpack("<qQ", file.read(length))
    tags = dict(entries)
    if _DT_STRTAB not in tags:
        return ()
    table = next(
        offset + tags[_DT_STRTAB] - address
        for kind, offset, address, length in segments
        if kind == _PT_LOAD and address <= tags[_DT_STRTAB] < address + length
    )
    file.seek(table)
    names = file.read(tags[_DT_STRSZ])
    return tuple(names[value : names.index(b"\0", value)].decode() for tag, value in entries if tag == _DT_NEEDED)
