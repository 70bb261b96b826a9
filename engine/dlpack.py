"""Reads other libraries' tensors through DLPack, on the host or on an NVIDIA GPU, without importing those libraries.

NumPy's own `from_dlpack` knows no bfloat16 and no devices, so the capsule is read here (https://dmlc.github.io/dlpack).
"""

import ctypes
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError

# Device types whose memory the processor can read: plain and CUDA-pinned host memory.
_HOST = {1, 3}
_CUDA = {2, 13}  # plain and managed memory of an NVIDIA GPU
_OTHERS = {4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 14: "oneAPI"}
# (type code, bits): codes are 2 for IEEE floats, 4 for bfloat16.
_DTYPES = {(2, 32): "float32", (2, 16): "float16", (4, 16): "bfloat16", (2, 64): "float64"}
_TYPESTR = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float64": "<f8"}

LEGACY_STREAM = 1  # CUDA's default stream, in DLPack as in CUDA itself: the other streams' producers wait for it
_SHARES_READ_ONLY = (1, 0)  # the DLPack version from which a tensor that must not be written to can be shared


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensorVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_get_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))


@dataclass(frozen=True)
class ForeignTensor:
    """A tensor of another library. Its memory lives as long as `owner` does.

    Attributes:
        pointer: address of the first element.
        shape: its dimensions.
        strides: in elements, one per dimension.
        dtype: "float32", "float16", "bfloat16" or "float64".
        owner: what keeps the memory alive.
        device: the number of the NVIDIA GPU that holds it; None: host memory.
        stream: the CUDA stream on which it is ready, a cudaStream_t; None: on any.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    owner: object
    device: int | None = None
    stream: int | None = None

    @property
    def __array_interface__(self) -> dict[str, Any]:
        itemsize = np.dtype(_TYPESTR[self.dtype]).itemsize
        return {
            "version": 3,
            "data": (self.pointer, True),
            "shape": self.shape,
            "strides": tuple(stride * itemsize for stride in self.strides),
            "typestr": _TYPESTR[self.dtype],
        }

    def array(self) -> npt.NDArray[Any]:
        """The same host memory as a read-only array that keeps it alive; bfloat16 as its bits, uint16."""
        return np.asarray(self)


def gpu(tensor: Any, name: str) -> int | None:
    """The number of the NVIDIA GPU that the tensor is on, None for host memory; an InputError for other devices."""
    kind, number = (int(part) for part in tensor.__dlpack_device__())
    if kind in _CUDA:
        return number
    if kind not in _HOST:
        device = _OTHERS.get(kind, f"DLPack type {kind}")
        raise InputError(f"{name} is on a device ({device}) that is not an NVIDIA GPU: copy it to the host first.")
    return None


def read(tensor: Any, name: str) -> ForeignTensor:
    """Read a tensor through `__dlpack__`, without copying.

    One on a GPU is ready on CUDA's default stream: its library is asked to make that stream wait for its own work.

    Args:
        tensor: an object with `__dlpack__` and `__dlpack_device__` (torch, JAX, CuPy, ...).
        name: what to call it in errors.

    Raises:
        InputError: a tensor on another device, that requires gradients, is of another dtype or cannot be exported.
    """
    if getattr(tensor, "requires_grad", False) is True:
        raise InputError(f"{name} requires gradients, which the reduction does not follow: pass {name}.detach().")
    device = gpu(tensor, name)
    stream = None if device is None else LEGACY_STREAM
    try:
        capsule = _export(tensor, {} if stream is None else {"stream": stream})
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        remedy = "pass a NumPy array" if device is None else f"make GPU {device} current, or copy it to the host"
        raise InputError(f"{name} cannot be read through DLPack ({error}): {remedy}.") from error
    return replace(_parse(capsule, name), device=device, stream=stream)


def _export(tensor: Any, stream: dict[str, int]) -> object:
    try:
        return tensor.__dlpack__(max_version=_SHARES_READ_ONLY, **stream)
    except TypeError:  # a library older than that argument
        return tensor.__dlpack__(**stream)


def _parse(capsule: object, name: str) -> ForeignTensor:
    label = _get_name(capsule)
    if label == b"dltensor_versioned":
        managed = _ManagedTensorVersioned.from_address(_get_pointer(capsule, label))
        if managed.major != _SHARES_READ_ONLY[0]:
            raise InputError(f"{name} comes as DLPack {managed.major}, which is not known here: pass a NumPy array.")
        raw = managed.tensor
    elif label == b"dltensor":
        raw = _Tensor.from_address(_get_pointer(capsule, label))
    else:
        raise InputError(f"{name} exports no DLPack tensor (capsule {label!r}): pass a NumPy array.")
    dtype = _DTYPES.get((raw.dtype.code, raw.dtype.bits)) if raw.dtype.lanes == 1 else None
    if dtype is None:
        raise InputError(
            f"{name} has DLPack type code {raw.dtype.code} with {raw.dtype.bits} bits: "
            "convert it to float32, float16 or bfloat16."
        )
    shape = tuple(raw.shape[: raw.ndim])
    if raw.strides:
        strides = tuple(raw.strides[: raw.ndim])
    else:  # contiguous, row by row
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(raw.ndim))
    return ForeignTensor((raw.data or 0) + raw.byte_offset, shape, strides, dtype, capsule)
