"""Where tensors lie and work on them is queued: a protocol for the host and for GPUs, and the host's implementation.

A backend computes in one memory; what is done with its outputs there (copies, the reduction, the way back to the host)
is written once, for any memory.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from memedge.engine import reduction
from memedge.engine.machine import usable_processors

_PREDICTIONS = (np.dtype(np.float32), np.dtype(np.float16))


@dataclass(frozen=True, slots=True)
class Tensor:
    """A contiguous array in some memory: where it lies, and what keeps it alive.

    Attributes:
        pointer: address of its first byte, in the memory that made it.
        shape: its dimensions.
        dtype: its items' type, in this machine's byte order.
        owner: what must not be garbage collected while the tensor is in use. Tensors may share it: a part of a tensor
            is a Tensor with a later pointer, a smaller shape and the same owner.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Memory(Protocol):
    """One device's memory and the queue of work on it.

    A call may return before its work is done. Work is done in the order of the calls. `download` and `wait` return when
    all work before them is done. Several threads may call at once; their calls then mix in one queue.

    Attributes:
        device: "cpu" or "cuda", as ONNX Runtime calls it.
        index: which of those devices.
        name: what the device is called.
        stream: the queue, a cudaStream_t as a number; 0 on the host, which has none.
    """

    device: str
    index: int
    name: str
    stream: int

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Tensor:
        """Return a new tensor whose values are whatever lies there; raises EngineError if it finds no room."""

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        """Return a tensor with the array's values; raises EngineError if it finds no room.

        It may share the array's memory: don't change the array while the tensor lives, nor write to the tensor. Tensors
        that are written to come from `empty`.
        """

    def write(self, array: npt.NDArray[Any], target: Tensor) -> None:
        """Copy a host array into a tensor of as many bytes, whatever the shapes; the array may be changed afterwards.

        Raises:
            ValueError: they differ in size.
        """

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy a tensor into another of as many bytes, both in this memory; raises ValueError if they differ in size.

        They don't overlap.
        """

    def download(self, tensor: Tensor) -> npt.NDArray[Any]:
        """Wait for all work before, and return the tensor's values as an array that belongs to the caller."""

    def reduce(self, cond: Tensor, uncond: Tensor, row: Tensor, operands: str, out: Tensor) -> None:
        """Compute the statistics of each guidance vector Δ = ε_c − ε_0 (docs/methods.md §1).

        Args:
            cond: ε_c, float32 or float16 [R, C, H, W].
            uncond: ε_0, [K, C, H, W] of the same dtype.
            row: int64 [R], which of the K is each row's ε_0.
            operands: the cosine's pair, one of reduction.OPERANDS.
            out: float64 [3, R]: the norms, the cosines over channels and the flat ones; NaN where a row is not finite.

        Raises:
            ValueError: shapes or dtypes that don't fit together.
        """

    def current(self) -> AbstractContextManager[None]:
        """Return the context within which other libraries queue their work here; one thread at a time on a GPU."""

    def wait(self) -> None:
        """Wait for all work before. After this its results are there for all threads and queues."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do `work`, record what it queues, and return a function that queues it again, on the same tensors, for less.

        `work` calls `copy`, `reduce` and foreign launches on this memory's queue, nothing else. It is called more than
        once, here and later, and must do the same each time. The caller keeps every tensor that `work` uses alive as
        long as the returned function.
        """


class HostMemory:
    """The processor's memory; there is no queue: every call returns when its work is done."""

    device = "cpu"
    index = 0
    name = "cpu"
    stream = 0

    def __init__(self, threads: int | None = None):
        """Reduce with at most `threads` threads (default: as many as this process may use)."""
        self._threads = threads or usable_processors()

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Tensor:
        return _tensor(np.empty(shape, dtype))

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        """Return a tensor that shares the array if it is contiguous; writing to either's memory is then refused."""
        shared = np.asarray(array, order="C").view()
        shared.flags.writeable = False
        return _tensor(shared)

    def write(self, array: npt.NDArray[Any], target: Tensor) -> None:
        check_sizes(array.nbytes, target)
        _view(target, array.dtype, array.shape)[...] = array

    def copy(self, source: Tensor, target: Tensor) -> None:
        check_sizes(source.nbytes, target)
        _view(target)[...] = _view(source, target.dtype, target.shape)

    def download(self, tensor: Tensor) -> npt.NDArray[Any]:
        return _view(tensor).copy()

    def reduce(self, cond: Tensor, uncond: Tensor, row: Tensor, operands: str, out: Tensor) -> None:
        check_reduction(cond, uncond, row, operands, out)
        _view(out)[...] = reduction.reduce_indexed(_view(cond), _view(uncond), _view(row), operands, self._threads)

    def wait(self) -> None:
        pass

    def current(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


def part(tensor: Tensor, start: int, count: int) -> Tensor:
    """Return items start … start + count − 1 of a tensor [n, …], where they lie."""
    shape = (count, *tensor.shape[1:])
    offset = start * (tensor.nbytes // tensor.shape[0])
    return Tensor(tensor.pointer + offset, shape, tensor.dtype, tensor.owner)


def take(memory: Memory, tensor: Tensor, items: npt.NDArray[np.int64]) -> Tensor:
    """Return the items [k, …] of a tensor [n, …], in ascending order: where they lie, if they are neighbours."""
    first, count = int(items[0]), len(items)
    if int(items[-1]) == first + count - 1:
        return part(tensor, first, count)
    chosen = memory.empty((count, *tensor.shape[1:]), tensor.dtype)
    for place, item in enumerate(items):
        memory.copy(part(tensor, int(item), 1), part(chosen, place, 1))
    return chosen


def reduced(memory: Memory, cond: Tensor, uncond: Tensor, row: Tensor, operands: str) -> npt.NDArray[np.float64]:
    """Return what Memory.reduce computes, float64 [3, R]; waits for it."""
    out = memory.empty((3, cond.shape[0]), np.float64)
    memory.reduce(cond, uncond, row, operands, out)
    return memory.download(out)


class _Interface:
    """What NumPy needs to see a tensor's bytes, and to keep them alive, without copying."""

    def __init__(self, tensor: Tensor, dtype: np.dtype[Any], shape: tuple[int, ...]):
        self._owner = tensor.owner
        read_only = isinstance(tensor.owner, np.ndarray) and not tensor.owner.flags.writeable
        self.__array_interface__ = {
            "data": (tensor.pointer, read_only),
            "shape": shape,
            "typestr": dtype.str,
            "version": 3,
        }


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    return Tensor(array.__array_interface__["data"][0], array.shape, array.dtype, array)


def _view(tensor: Tensor, dtype: np.dtype[Any] | None = None, shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
    """The tensor's own memory as an array, of another dtype and shape if they are given."""
    return np.asarray(
        _Interface(tensor, tensor.dtype if dtype is None else dtype, tensor.shape if shape is None else shape)
    )


def check_sizes(nbytes: int, target: Tensor) -> None:
    """Raise ValueError unless the target has as many bytes: a copy would run past one of both."""
    if nbytes != target.nbytes:
        raise ValueError(f"{nbytes} bytes don't fit a {target.dtype} tensor of shape {target.shape}.")


def check_reduction(cond: Tensor, uncond: Tensor, row: Tensor, operands: str, out: Tensor) -> None:
    """Raise ValueError unless the tensors are what Memory.reduce says: kernels read as much as the shapes promise.

    The values of `row` cannot be seen here: on a GPU they may not be there yet.
    """
    if operands not in reduction.OPERANDS:
        raise ValueError(f"There are no operands {operands!r}: use one of {', '.join(reduction.OPERANDS)}.")
    if cond.dtype not in _PREDICTIONS or uncond.dtype != cond.dtype:
        raise ValueError(f"cond is {cond.dtype} and uncond {uncond.dtype}: both must be float32 or both float16.")
    if (
        len(cond.shape) != 4
        or len(uncond.shape) != 4
        or cond.shape[1:] != uncond.shape[1:]
        or 0 in cond.shape + uncond.shape
    ):
        raise ValueError(
            f"cond has shape {cond.shape} and uncond {uncond.shape}: they need [R, C, H, W], [K, C, H, W]."
        )
    rows = cond.shape[0]
    if row.dtype != np.int64 or row.shape != (rows,):
        raise ValueError(f"row is {row.dtype} of shape {row.shape}: it must be int64 of shape ({rows},).")
    if out.dtype != np.float64 or out.shape != (3, rows):
        raise ValueError(f"out is {out.dtype} of shape {out.shape}: it must be float64 of shape (3, {rows}).")
