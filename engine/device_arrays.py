"""Tensors on an NVIDIA GPU: read through `__cuda_array_interface__`, and reduced where they are.

The interface, version 3: https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html
"""

import math
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.dlpack import LEGACY_STREAM, ForeignTensor
from memedge.engine.errors import InputError, ProviderError

_DTYPES = {"<f4": "float32", "<f2": "float16", "<f8": "float64"}  # the interface has no name for bfloat16


def cuda_core(core: ModuleType | None, name: str) -> ModuleType:
    """The core, if it has device code to reduce this tensor with; else an InputError."""
    if core is None or core.CUDA_TARGETS is None:
        raise InputError(
            f"{name} is on an NVIDIA GPU, and this build of memedge has no CUDA code (memedge doctor says why): "
            "copy it to the host, or reinstall memedge where nvcc is."
        )
    return core


def read(tensor: Any, name: str, core: ModuleType) -> ForeignTensor:
    """Read a tensor (Numba's, CuPy's) through its `__cuda_array_interface__`, without copying.

    It names the stream on which the data is ready. Where it names none, whoever passes the tensor has to have waited.

    Raises:
        InputError: a tensor of another dtype, with a mask, or whose interface cannot be used.
        ProviderError: CUDA cannot say on which GPU it is.
    """
    interface = tensor.__cuda_array_interface__
    dtype = _DTYPES.get(interface["typestr"])
    if dtype is None:
        raise InputError(
            f"{name} has the type {interface['typestr']!r}: convert it to float32 or float16, or pass bfloat16 "
            "through a library with DLPack."
        )
    if interface.get("mask") is not None:
        raise InputError(f"{name} has a mask, which the reduction does not follow: pass an array without one.")
    shape, itemsize = tuple(interface["shape"]), np.dtype(dtype).itemsize
    strides = interface.get("strides") or tuple(math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape)))
    stream = interface.get("stream")
    if stream == 0:
        raise InputError(f"{name} names stream 0, which can mean two streams: its library should name 1 or 2.")
    pointer = interface["data"][0]
    return ForeignTensor(
        pointer,
        shape,
        tuple(stride // itemsize for stride in strides),
        dtype,
        tensor,
        _device(core, pointer, name) if pointer else 0,  # an empty array has no address
        stream,
    )


def reduce(
    core: ModuleType, cond: ForeignTensor, uncond: ForeignTensor, rows: int, uncond_rows: int, operands: str
) -> tuple[npt.NDArray[np.float64], int]:
    """cond [..., C, H, W] and uncond on one GPU -> float64 [3, rows] on the host, and how many rows are not finite.

    Raises:
        InputError: tensors on different GPUs, in float64, or not contiguous.
        ProviderError: CUDA fails.
    """
    if cond.device != uncond.device:
        raise InputError(
            f"cond is on GPU {cond.device} and uncond on GPU {uncond.device}: move one to the other's device."
        )
    if cond.dtype == "float64":
        raise InputError("cond and uncond are float64, which is not reduced on a GPU: convert them to float32.")
    for name, tensor in (("cond", cond), ("uncond", uncond)):
        if not _contiguous(tensor):
            raise InputError(
                f"{name} is on a GPU and not contiguous: pass {name}.contiguous(), or its like in other libraries."
            )
    channels, height, width = cond.shape[-3:]
    stream = cond.stream or uncond.stream or LEGACY_STREAM
    out = np.empty((3, rows))
    try:
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
    except RuntimeError as error:
        raise ProviderError(
            f"GPU {cond.device} could not reduce the predictions ({error}): copy them to the host, or mend the GPU's "
            "driver (memedge doctor)."
        ) from error
    return out, int(np.isnan(out[0]).sum())


def _device(core: ModuleType, pointer: int, name: str) -> int:
    try:
        device: int = core.cuda_device(pointer)
    except RuntimeError as error:
        raise ProviderError(f"{name} is on no GPU that CUDA can use ({error}): copy it to the host.") from error
    return device


def _contiguous(tensor: ForeignTensor) -> bool:
    """Row by row without gaps; the stride of a dimension of size 1 says nothing."""
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
