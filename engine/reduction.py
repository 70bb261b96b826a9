"""The fused reduction: predictions in, guidance statistics out (docs/methods.md §1).

Computed by the native core (csrc/) where it was built, else in NumPy; `core_status` says which, and why.
"""

import math
import os
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine import device_arrays, dlpack, numpy_reduction
from memedge.engine.errors import InputError, NotFiniteError, shown
from memedge.engine.foreign import ForeignTensor, check_shape, cuda_core, reason

OPERANDS = ("uncond_delta", "cond_uncond", "cond_delta")
ALIGNMENTS = ("channel", "flat")

Tensor = npt.NDArray[Any] | ForeignTensor  # in host memory, or on a GPU

_NATIVE = {np.dtype(name): name for name in ("float32", "float16", "float64")}


def _load_core() -> tuple[ModuleType | None, str]:
    if os.environ.get("MEMEDGE_NO_CORE") == "1":
        return None, "MEMEDGE_NO_CORE=1 is set"
    try:
        core = import_module("memedge._core")
    except ImportError as error:
        return None, f"memedge._core cannot be imported ({error}): reinstall memedge where a C++17 compiler is present"
    return core, "memedge._core is installed"


core, _reason = _load_core()


@dataclass(frozen=True, slots=True)
class RowStatistics:
    """Statistics of each guidance vector Δ = ε_c − ε_0, in the leading shape of ε_c; all finite.

    Attributes:
        norm: float64 [...], ‖Δ‖₂ over C, H, W.
        channel: float64 [...], in [-1, 1]: mean over pixels of the operands' cosine over channels.
        flat: float64 [...], in [-1, 1]: cosine of the operands flattened over C, H, W.
    """

    norm: npt.NDArray[np.float64]
    channel: npt.NDArray[np.float64]
    flat: npt.NDArray[np.float64]

    def cosine(self, alignment: str) -> npt.NDArray[np.float64]:
        """Return `channel` or `flat`; raises InputError for another name."""
        check_options(alignment)
        return self.channel if alignment == "channel" else self.flat


@dataclass(frozen=True)
class CoreStatus:
    """Which path computes the reduction in this process.

    Attributes:
        path: "native" or "numpy".
        reason: why it is that one.
        isa: instruction set in use; None on the NumPy path.
        isas: instruction sets the native core can use here, slowest first.
        compiler: what built the native core; None without it.
        cuda: whether the native core has device code for NVIDIA GPUs.
        cuda_targets: the compute capabilities (75: 7.5) it was compiled for; newer ones compile its PTX. None without.
    """

    path: str
    reason: str
    isa: str | None
    isas: tuple[str, ...]
    compiler: str | None
    cuda: bool
    cuda_targets: tuple[int, ...] | None


def core_status() -> CoreStatus:
    """Say which path computes the reduction, and why; for `memedge doctor`."""
    if core is None:
        return CoreStatus("numpy", _reason, None, (), None, False, None)
    isas, targets = tuple(core.isa_available()), core.CUDA_TARGETS
    return CoreStatus("native", _reason, core.isa_active(), isas, core.COMPILER, targets is not None, targets)


def check_options(alignment: str = ALIGNMENTS[0], operands: str = OPERANDS[0]) -> None:
    """Raise InputError for a name that does not exist; for callers who would rather know before a UNet pass."""
    if not isinstance(alignment, str) or alignment not in ALIGNMENTS:
        raise InputError(f"There is no alignment {alignment!r}: use 'channel' or 'flat'.")
    if not isinstance(operands, str) or operands not in OPERANDS:
        raise InputError(f"There are no operands {operands!r}: use one of {', '.join(OPERANDS)}.")


def reduce_rows(cond: Any, uncond: Any, operands: str = "uncond_delta", threads: int | None = None) -> RowStatistics:
    """Return norm and cosines of each guidance vector Δ = ε_c − ε_0 in one pass (docs/methods.md §1).

    Halves are widened to float32. A vector's norm is clamped from below at 1e-8 in a cosine (PyTorch's rule), so Δ = 0
    gives 0. Values beyond about 1e19 overflow float32 when squared and count as not finite; on a GPU, which sums a
    whole row's squares in float32, those beyond about 1e19 / √(C·H·W). Values below about 1e-19 lose digits when
    squared. float64 stays float64, with its own bounds, in NumPy.

    Tensors on an NVIDIA GPU are reduced there, after the work that their library has enqueued on them. The results come
    back to the host, so this call waits for them.

    Args:
        cond: ε_c [..., C, H, W]: a NumPy array (ml_dtypes' bfloat16 too), anything with DLPack (torch, JAX, CuPy) in
            host memory or on an NVIDIA GPU, or with `__cuda_array_interface__` (Numba); float32, float16, bfloat16 or,
            in host memory, float64. What is not contiguous is copied; on a GPU it is refused. So are masks, and
            subclasses of NumPy's or torch's tensors, which can mean more than their values.
        uncond: ε_0, on the same device, of the same dtype and C, H, W, whose leading shape ends cond's (leading ones
            are ignored): each is used for all of cond's rows that share those trailing indices.
        operands: the cosine's pair: "uncond_delta" (ε_0, Δ), "cond_uncond" (ε_c, ε_0) or "cond_delta" (ε_c, Δ).
        threads: at most this many; None: as many as this process may run on. Results don't depend on it. Neither for
            GPUs nor for float64.

    Raises:
        InputError: arrays that cannot be read or do not fit together, or an option that does not exist.
        ProviderError: CUDA fails.
        NotFiniteError: NaN, infinity or overflow in any row: never a score.
    """
    _check_call(operands, threads)
    c, u, dtype = _read_both(cond, uncond)
    leading, rows, uncond_rows = _pair(c.shape, u.shape)
    if isinstance(c, ForeignTensor) and isinstance(u, ForeignTensor):
        out, bad = device_arrays.reduce(cuda_core(core, "cond"), c, u, rows, uncond_rows, operands)
    else:
        try:
            c, u = _on_host(c, u)
            out, bad = _reduce(c, u, rows, uncond_rows, None, dtype, operands, threads)
        except MemoryError:
            raise InputError(
                f"cond has shape {shown(str(c.shape))}, and memory does not hold a copy of it: pass fewer predictions "
                "at once."
            ) from None
    if bad:
        first = np.flatnonzero(np.isnan(out[0]))[0]
        raise NotFiniteError(
            f"{bad} of {rows} predictions hold NaN, infinity or values too large to square (the first: row {first}): "
            "no score is made from them; run the model in a higher precision."
        )
    return RowStatistics(*out.reshape(3, *leading))


def reduce_indexed(
    cond: npt.NDArray[Any], uncond: npt.NDArray[Any], row: npt.NDArray[np.int64], operands: str, threads: int | None
) -> npt.NDArray[np.float64]:
    """Return what reduce_rows does, where each row names its ε_0; rows that are not finite are NaN, not an error.

    Args:
        cond: ε_c [R, C, H, W] in host memory, of a dtype that reduce_rows takes.
        uncond: ε_0 [K, C, H, W], of the same dtype.
        row: int64 [R], each in [0, K): which ε_0 belongs to each ε_c.
        operands: the cosine's pair, as in reduce_rows.
        threads: as in reduce_rows.

    Returns:
        float64 [3, R]: norm, channel and flat, all NaN in a row that is not finite.

    Raises:
        InputError: arrays that do not fit together, or an option that does not exist.
    """
    _check_call(operands, threads)
    c, u, dtype = _read_both(cond, uncond)
    c, u = _on_host(c, u)
    _check_shapes(c.shape, u.shape)
    if c.ndim != 4 or u.ndim != 4 or row.shape != c.shape[:1] or row.dtype != np.int64:
        raise InputError(
            f"cond has shape {c.shape}, uncond {u.shape} and row {row.shape} {row.dtype}: give [R, C, H, W], "
            "[K, C, H, W] and int64 [R]."
        )
    if row.min() < 0 or row.max() >= len(u):
        raise InputError(f"row reaches from {row.min()} to {row.max()}: uncond has rows 0 to {len(u) - 1}.")
    return _reduce(c, u, len(c), len(u), np.ascontiguousarray(row), dtype, operands, threads)[0]


def _check_call(operands: str, threads: int | None) -> None:
    check_options(operands=operands)
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}: give at least 1, or None for all.")


def _reduce(
    cond: npt.NDArray[Any],
    uncond: npt.NDArray[Any],
    rows: int,
    uncond_rows: int,
    row: npt.NDArray[np.int64] | None,
    dtype: str,
    operands: str,
    threads: int | None,
) -> tuple[npt.NDArray[np.float64], int]:
    """R rows [..., C, H, W] and K of uncond -> [3, R] and how many are not finite; row is [R], or r % K if None."""
    channels, height, width = cond.shape[-3:]
    pixels = height * width
    cond, uncond = row_by_row(cond), row_by_row(uncond)
    out = np.empty((3, rows))
    if core is None or dtype == "float64":  # narrowed to the core's float32, a small Δ would be all rounding
        flat = cond.reshape(rows, channels, pixels), uncond.reshape(uncond_rows, channels, pixels)
        return out, numpy_reduction.guidance_stats(*flat, row, dtype, operands, out)
    bad = core.guidance_stats(
        core.address(cond),
        core.address(uncond),
        core.address(out),
        dtype,
        rows,
        uncond_rows,
        channels,
        pixels,
        operands,
        threads or 0,
        "",  # the best instruction set; by position, for keywords take a tenth of a small call's time
        0 if row is None else core.address(row),
    )
    return out, bad


def _read_both(cond: Any, uncond: Any) -> tuple[Tensor, Tensor, str]:
    c, dtype = read(cond, "cond")
    u, uncond_dtype = read(uncond, "uncond")
    if dtype != uncond_dtype:
        raise InputError(f"cond is {dtype} and uncond is {uncond_dtype}: convert one to the other's dtype.")
    return c, u, dtype


def _on_host(cond: Tensor, uncond: Tensor) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    if isinstance(cond, ForeignTensor) or isinstance(uncond, ForeignTensor):
        raise InputError("Of cond and uncond, one is on a GPU and one in host memory: move one to the other's device.")
    return cond, uncond


def read(tensor: Any, name: str) -> tuple[Tensor, str]:
    """Return the tensor, bfloat16 in host memory as its bits, and its dtype's name."""
    if isinstance(tensor, np.ndarray):
        return _read_array(tensor, name)
    if _has(tensor, "__dlpack_device__", name):
        foreign = dlpack.read(tensor, name, core)
        return (foreign.array() if foreign.device is None else foreign), foreign.dtype
    if _has(tensor, "__cuda_array_interface__", name):
        foreign = device_arrays.read(tensor, name, cuda_core(core, name))
        return foreign, foreign.dtype
    raise InputError(f"{name} is a {type(tensor).__name__}: pass a NumPy array or a tensor with DLPack.")


def _has(tensor: Any, attribute: str, name: str) -> bool:
    try:
        return hasattr(tensor, attribute)
    except Exception as error:  # whatever another library raises
        raise InputError(f"{name} cannot be asked for its values ({reason(error)}): pass a NumPy array.") from error


def _read_array(array: npt.NDArray[Any], name: str) -> tuple[npt.NDArray[Any], str]:
    if isinstance(array, np.ma.MaskedArray):
        raise InputError(f"{name} has a mask, which the reduction does not follow: pass an array without one.")
    if type(array) not in (np.ndarray, np.memmap):
        raise InputError(
            f"{name} is a {type(array).__name__}, which can mean more than its values: pass a plain NumPy array."
        )
    if (dtype := _NATIVE.get(array.dtype)) is not None:
        return array, dtype
    dtype = array.dtype.name
    if dtype == "bfloat16":
        return array.view(np.uint16), dtype
    if dtype not in _NATIVE.values():
        raise InputError(f"{name} is {dtype}: convert it to float32, float16 or bfloat16.")
    return array.astype(dtype), dtype  # it was of the other byte order


def row_by_row(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array, contiguous and at an address of whole elements; a copy where it is not."""
    array = np.ascontiguousarray(array)
    return array if array.flags.aligned else array.copy()


def _check_shapes(cond: tuple[int, ...], uncond: tuple[int, ...]) -> None:
    check_shape(cond, "cond")
    check_shape(uncond, "uncond")
    if cond[-3:] != uncond[-3:]:
        raise InputError(f"cond has shape {cond} and uncond {uncond}: the last three, C, H and W, must be the same.")


def _pair(cond: tuple[int, ...], uncond: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """cond's leading shape and both numbers of rows; an InputError where row r has no uncond row r % uncond_rows."""
    _check_shapes(cond, uncond)
    leading, shared = cond[:-3], uncond[:-3]
    while shared and shared[0] == 1:
        shared = shared[1:]
    if shared != leading[len(leading) - len(shared) :]:
        raise InputError(f"cond has shape {cond} and uncond {uncond}: uncond's leading shape must end cond's.")
    return leading, math.prod(leading), math.prod(shared)
