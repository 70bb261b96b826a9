"""Tensors on an NVIDIA GPU: read through `__cuda_array_interface__`, and reduced where they are.

The interface, version 3: https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html
"""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError, ProviderError, shown
from memedge.engine.foreign import LEGACY_STREAM, ForeignTensor, checked, reason, row_by_row

_DTYPES = {"<f4": "float32", "<f2": "float16", "<f8": "float64"}  # the interface has no name for bfloat16
_KEYS = {"shape", "typestr", "data", "version", "strides", "descr", "mask", "stream"}
_VERSIONS = range(4)


def read(tensor: Any, name: str, core: ModuleType) -> ForeignTensor:
    """Read a tensor [..., C, H, W] (Numba's, CuPy's) through its `__cuda_array_interface__`, without copying.

    It names the stream on which the data is ready. Where it names none, whoever passes the tensor has to have waited.

    Raises:
        InputError: a tensor of another dtype, with a mask, or whose interface cannot be used.
        ProviderError: CUDA cannot say on which GPU it is.
    """
    try:
        interface = tensor.__cuda_array_interface__
        if interface["version"] not in _VERSIONS:
            raise ValueError(f"no version is {interface['version']!r}")
        if unknown := set(interface) - _KEYS:
            raise ValueError(f"no entry is called {', '.join(map(repr, sorted(unknown)))}")
        found = _parse(interface, name, tensor)
    except InputError:
        raise
    except Exception as error:  # whatever another library raises or leaves out
        raise InputError(
            f"{name} has a __cuda_array_interface__ that cannot be read ({type(error).__name__}: {reason(error)}): "
            "copy it to the host."
        ) from error
    return replace(checked(found, name), device=_device(core, found.pointer, name))


def _parse(interface: dict[str, Any], name: str, owner: object) -> ForeignTensor:
    typestr = interface["typestr"]
    dtype = _DTYPES.get(typestr)
    if dtype is None or interface.get("descr") not in (None, [("", typestr)]):
        said = shown(repr(interface.get("descr") if dtype else typestr))
        raise InputError(
            f"{name} has the type {said}: convert it to float32 or float16, or pass bfloat16 through a library with "
            "DLPack."
        )
    if interface.get("mask") is not None:
        raise InputError(f"{name} has a mask, which the reduction does not follow: pass an array without one.")
    shape = tuple(operator.index(size) for size in interface["shape"])
    itemsize = np.dtype(dtype).itemsize
    strides, steps = row_by_row(shape), interface.get("strides")
    if steps is not None:
        pairs = [divmod(operator.index(step), itemsize) for step in steps]
        if len(pairs) != len(shape) or any(rest for _, rest in pairs):
            said = shown(str(tuple(steps)))
            raise InputError(f"{name} has strides {said}, which are not whole elements of each dimension: pass a copy.")
        strides = tuple(whole for whole, _ in pairs)
    stream = interface.get("stream")
    if stream == 0:
        raise InputError(f"{name} names stream 0, which can mean two streams: its library should name 1 or 2.")
    if stream is not None and not 0 < operator.index(stream) < 1 << 64:
        raise ValueError(f"no stream is {stream}")
    pointer, _read_only = interface["data"]
    return ForeignTensor(operator.index(pointer), shape, strides, dtype, owner, stream=stream)


def reduce(
    core: ModuleType, cond: ForeignTensor, uncond: ForeignTensor, rows: int, uncond_rows: int, operands: str
) -> tuple[npt.NDArray[np.float64], int]:
    """cond [..., C, H, W] and uncond on one GPU -> float64 [3, rows] on the host, and how many rows are not finite.

    Raises:
        InputError: tensors on different GPUs, in float64, or not contiguous.
        ProviderError: CUDA fails.
    """
    check_together({"cond": cond, "uncond": uncond})
    channels, height, width = cond.shape[-3:]
    stream = cond.stream or uncond.stream or LEGACY_STREAM
    out = np.empty((3, rows))
    with cuda_failure(cond.device):
        core.cuda_guidance_stats_to_host(
            cond.pointer,
            uncond.pointer,
            core.address(out),
            cond.dtype,
            rows,
            uncond_rows,
            channels,
            height * width,
            operands,
            device=cond.device,
            stream=stream,
            uncond_stream=uncond.stream or stream,
        )
    return out, int(np.isnan(out[0]).sum())


def check_together(tensors: dict[str, ForeignTensor]) -> None:
    """Raise InputError unless tensors, by name, are on one GPU, and as its kernels read them."""
    (first, of_first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != of_first.device:
            raise InputError(
                f"{first} is on GPU {of_first.device} and {name} on GPU {tensor.device}: move one to the other's "
                "device."
            )
    if of_first.dtype == "float64":
        raise InputError(
            f"{' and '.join(tensors)} are float64, which is not reduced on a GPU: convert them to float32."
        )
    for name, tensor in tensors.items():
        if not tensor.contiguous:
            raise InputError(
                f"{name} is on a GPU and not contiguous: pass {name}.contiguous(), or its like in other libraries."
            )
        if tensor.pointer % tensor.itemsize:
            raise InputError(f"{name} is on a GPU and begins within an element: pass a copy of it.")


@contextmanager
def cuda_failure(device: int | None) -> Iterator[None]:
    """Within `with`, the core's errors are ProviderErrors."""
    try:
        yield
    except RuntimeError as error:
        raise ProviderError(
            f"GPU {device} could not reduce the predictions ({error}): copy them to the host, or mend the GPU's driver "
            "(memedge doctor)."
        ) from error


def _device(core: ModuleType, pointer: int, name: str) -> int:
    try:
        device: int = core.cuda_device(pointer)
    except RuntimeError as error:
        raise ProviderError(f"{name} is on no GPU that CUDA can use ({error}): copy it to the host.") from error
    return device
