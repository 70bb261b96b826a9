"""A tensor in another library's memory: what its library says of it is checked before anything reads there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError, shown

LEGACY_STREAM = 1  # CUDA's default stream, in DLPack as in CUDA itself: the other streams' producers wait for it
MOST_DIMENSIONS = 64  # NumPy's

_TYPESTR = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float64": "<f8"}
_ADDRESSES = 1 << 57  # no memory of a process lies beyond: processors map at most 57 bits
_REMEDY = "its library describes it wrongly, so pass a NumPy array"


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
    def itemsize(self) -> int:
        """Bytes of one element."""
        return np.dtype(_TYPESTR[self.dtype]).itemsize

    @property
    def __array_interface__(self) -> dict[str, Any]:
        pairs = zip(self.shape, self.strides, strict=True)
        return {
            "version": 3,
            "data": (self.pointer, True),
            "shape": self.shape,
            "strides": tuple(0 if size == 1 else stride * self.itemsize for size, stride in pairs),
            "typestr": _TYPESTR[self.dtype],
        }

    def array(self) -> npt.NDArray[Any]:
        """The same host memory as a read-only array that keeps it alive; bfloat16 as its bits, uint16."""
        return np.asarray(self)

    @property
    def contiguous(self) -> bool:
        """Whether it lies row by row without gaps; a dimension of size 1 may have any stride."""
        pairs = zip(self.shape, self.strides, row_by_row(self.shape), strict=True)
        return all(size == 1 or own == step for size, own, step in pairs)


def row_by_row(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor without gaps."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def check_shape(shape: tuple[int, ...], name: str) -> None:
    """Raise InputError for what is no [..., C, H, W] or holds no values."""
    if not 3 <= len(shape) <= MOST_DIMENSIONS:
        raise InputError(f"{name} has shape {shown(str(shape))}: give [..., C, H, W].")
    if min(shape) < 0:
        raise InputError(f"{name} has shape {shown(str(shape))}, with a size below 0: {_REMEDY}.")
    if 0 in shape:
        raise InputError(f"{name} has shape {shown(str(shape))} and so no values: leave empty batches out.")


def checked(tensor: ForeignTensor, name: str) -> ForeignTensor:
    """Return the tensor, [..., C, H, W], if its values can lie where its library says.

    Whether memory is there, nobody can ask: a library that names memory which is not its own still ends the process.

    Raises:
        InputError: a shape that the reduction does not take, no address, or one that no memory has.
    """
    check_shape(tensor.shape, name)
    if not tensor.pointer:
        raise InputError(
            f"{name} has shape {shown(str(tensor.shape))} and no memory: pass a tensor that holds its values."
        )
    reach = [(size - 1) * stride * tensor.itemsize for size, stride in zip(tensor.shape, tensor.strides, strict=True)]
    lowest = tensor.pointer + sum(step for step in reach if step < 0)
    highest = tensor.pointer + sum(step for step in reach if step > 0) + tensor.itemsize
    if lowest < 0 or highest > _ADDRESSES or math.prod(tensor.shape) * tensor.itemsize >= _ADDRESSES:
        raise InputError(f"{name} has values at addresses that no memory has: {_REMEDY}.")
    return tensor


def cuda_core(core: ModuleType | None, name: str) -> ModuleType:
    """The core, if it has device code to reduce this tensor with; else an InputError."""
    if core is None or core.CUDA_TARGETS is None:
        raise InputError(
            f"{name} is on an NVIDIA GPU, and this build of memedge has no CUDA code (memedge doctor says why): "
            "copy it to the host, or reinstall memedge where nvcc is."
        )
    return core


def reason(error: Exception) -> str:
    """What another library's error says, in one line."""
    lines = str(error).strip().splitlines()
    return shown(lines[0].rstrip(".:")) if lines else type(error).__name__
