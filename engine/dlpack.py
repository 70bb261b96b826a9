"""Reads other libraries' tensors through DLPack, on the host or on an NVIDIA GPU, without importing those libraries.

NumPy's own `from_dlpack` knows no bfloat16 and no devices, so the capsule is read here (https://dmlc.github.io/dlpack).
"""

import ctypes
import operator
import sys
from types import ModuleType
from typing import Any

from memedge.engine.errors import InputError
from memedge.engine.foreign import (
    LEGACY_STREAM,
    MOST_DIMENSIONS,
    ForeignTensor,
    checked,
    cuda_core,
    reason,
    row_by_row,
)

# Device types whose memory the processor can read: plain and CUDA-pinned host memory.
_HOST = {1, 3}
_CUDA = {2, 13}  # plain and managed memory of an NVIDIA GPU
_OTHERS = {4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 14: "oneAPI"}
# (type code, bits): codes are 2 for IEEE floats, 4 for bfloat16.
_DTYPES = {(2, 32): "float32", (2, 16): "float16", (4, 16): "bfloat16", (2, 64): "float64"}

_SHARES_READ_ONLY = (1, 0)  # the DLPack version from which a tensor that must not be written to can be shared
_FLAGS = 0b111  # read-only, copied, and sub-bytes padded: none changes what the values mean


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


def read(tensor: Any, name: str, core: ModuleType | None = None) -> ForeignTensor:
    """Read a tensor [..., C, H, W] through `__dlpack__`, without copying, unless torch negates it lazily.

    One on a GPU is ready on CUDA's default stream: its library is asked to make that stream wait for its own work.

    Args:
        tensor: an object with `__dlpack__` and `__dlpack_device__` (torch, JAX, CuPy, ...).
        name: what to call it in errors.
        core: what reduces tensors on a GPU; without one that can, they are refused before their library is asked.

    Raises:
        InputError: a tensor on another device, that requires gradients, is of another dtype, may mean more than its
            values, is described in a way that cannot be true, or cannot be exported.
    """
    remedy = "pass a NumPy array"
    try:
        tensor = _values(tensor, name)
        device = _gpu(*_device(tensor), name)
        if device is not None:
            cuda_core(core, name)
            remedy = f"make GPU {device} current, or copy it to the host"
        stream = None if device is None else LEGACY_STREAM
        capsule = _export(tensor, {} if stream is None else {"stream": stream})
        raw = _raw(capsule, name)
    except InputError:
        raise
    except Exception as error:  # whatever another library raises
        raise InputError(f"{name} cannot be read through DLPack ({reason(error)}): {remedy}.") from error
    if _gpu(raw.device.type, raw.device.id, name) != device:
        raise InputError(
            f"{name} says that it is on one device and is exported from another (DLPack type {raw.device.type}, number "
            f"{raw.device.id}): pass a NumPy array."
        )
    return checked(_parse(raw, name, capsule, device, stream), name)


def _values(tensor: Any, name: str) -> Any:
    """The tensor whose memory holds the values: torch's negation bit, which DLPack does not carry, is resolved.

    torch's subclasses may mean anything by their memory (masks, scales, parts of a whole).
    """
    torch: Any = sys.modules.get("torch")
    of_torch = torch is not None and isinstance(tensor, torch.Tensor)
    if of_torch and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise InputError(
            f"{name} is a {type(tensor).__name__}, which can mean more than its values: pass a plain torch.Tensor."
        )
    if getattr(tensor, "requires_grad", False) is True:
        raise InputError(f"{name} requires gradients, which the reduction does not follow: pass {name}.detach().")
    return tensor.resolve_neg() if of_torch and tensor.is_neg() else tensor


def _device(tensor: Any) -> tuple[int, int]:
    kind, number = tensor.__dlpack_device__()
    return operator.index(kind), operator.index(number)


def _gpu(kind: int, number: int, name: str) -> int | None:
    """The number of the NVIDIA GPU that DLPack's device is, None for host memory; an InputError for other devices."""
    if kind in _CUDA:
        return number
    if kind not in _HOST:
        device = _OTHERS.get(kind, f"DLPack type {kind}")
        raise InputError(f"{name} is on a device ({device}) that is not an NVIDIA GPU: copy it to the host first.")
    return None


def _export(tensor: Any, stream: dict[str, int]) -> object:
    try:
        return tensor.__dlpack__(max_version=_SHARES_READ_ONLY, **stream)
    except TypeError:  # a library older than that argument
        return tensor.__dlpack__(**stream)


def _raw(capsule: object, name: str) -> _Tensor:
    """The struct in the capsule, which keeps it alive."""
    label = _get_name(capsule)
    if label == b"dltensor_versioned":
        managed = _ManagedTensorVersioned.from_address(_get_pointer(capsule, label))
        if managed.major != _SHARES_READ_ONLY[0]:
            raise InputError(f"{name} comes as DLPack {managed.major}, which is not known here: pass a NumPy array.")
        if managed.flags & ~_FLAGS:
            raise InputError(
                f"{name} has DLPack flags {managed.flags:#x}, which are not known here: pass a NumPy array."
            )
        raw: _Tensor = managed.tensor
        return raw
    if label == b"dltensor":
        return _Tensor.from_address(_get_pointer(capsule, label))
    raise InputError(f"{name} exports no DLPack tensor (capsule {label!r}): pass a NumPy array.")


def _parse(raw: _Tensor, name: str, capsule: object, device: int | None, stream: int | None) -> ForeignTensor:
    dtype = _DTYPES.get((raw.dtype.code, raw.dtype.bits)) if raw.dtype.lanes == 1 else None
    if dtype is None:
        raise InputError(
            f"{name} has DLPack type code {raw.dtype.code} with {raw.dtype.bits} bits: "
            "convert it to float32, float16 or bfloat16."
        )
    if not 0 <= raw.ndim <= MOST_DIMENSIONS or (raw.ndim and not raw.shape):
        raise InputError(f"{name} has {raw.ndim} dimensions or no shape: give [..., C, H, W].")
    shape = tuple(raw.shape[: raw.ndim])
    strides = tuple(raw.strides[: raw.ndim]) if raw.strides else row_by_row(shape)
    pointer = raw.data + raw.byte_offset if raw.data else 0
    return ForeignTensor(pointer, shape, strides, dtype, capsule, device, stream)
