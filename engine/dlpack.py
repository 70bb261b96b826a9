"""Reads other libraries' tensors through DLPack, without importing those libraries.

NumPy's own `from_dlpack` knows no bfloat16 and no devices, so the capsule is read here (https://dmlc.github.io/dlpack).
"""

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError

# Device types whose memory the processor can read: plain and CUDA-pinned host memory.
_HOST = {1, 3}
_DEVICES = {2: "CUDA", 4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 13: "CUDA managed memory", 14: "oneAPI"}
# (type code, bits): codes are 2 for IEEE floats, 4 for bfloat16.
_DTYPES = {(2, 32): "float32", (2, 16): "float16", (4, 16): "bfloat16", (2, 64): "float64"}
_TYPESTR = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float64": "<f8"}

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
        owner: the capsule that keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    owner: object

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
        """The same memory as a read-only array that keeps it alive; bfloat16 as its bits, uint16."""
        return np.asarray(self)


def read(tensor: Any, name: str) -> ForeignTensor:
    """Read a tensor in host memory through `__dlpack__`, without copying.

    Args:
        tensor: an object with `__dlpack__` and `__dlpack_device__` (torch, JAX, CuPy, ...).
        name: what to call it in errors.

    Raises:
        InputError: a tensor that is on a device, requires gradients, is of another dtype or cannot be exported.
    """
    if getattr(tensor, "requires_grad", False) is True:
        raise InputError(f"{name} requires gradients, which the reduction does not follow: pass {name}.detach().")
    device = int(tensor.__dlpack_device__()[0])
    if device not in _HOST:
        raise device_error(name, _DEVICES.get(device, f"DLPack type {device}"))
    try:
        capsule = _export(tensor)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be read through DLPack ({error}): pass a NumPy array.") from error
    return _parse(capsule, name)


def device_error(name: str, device: str) -> InputError:
    """The error for a tensor that is not in host memory."""
    return InputError(
        f"{name} is on a device ({device}), and reducing there needs the CUDA build, which this version does not have: "
        "copy it to the host first."
    )


def _export(tensor: Any) -> object:
    try:
        return tensor.__dlpack__(max_version=_SHARES_READ_ONLY)
    except TypeError:  # a library older than that argument
        return tensor.__dlpack__()


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
