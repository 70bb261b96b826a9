"""The fused reduction: predictions in, guidance statistics out (METHODS.md §1).

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

from memedge.engine import dlpack
from memedge.engine.errors import InputError, NotFiniteError

OPERANDS = ("uncond_delta", "cond_uncond", "cond_delta")
ALIGNMENTS = ("channel", "flat")

_NATIVE = {np.dtype(name): name for name in ("float32", "float16", "float64")}
_MIN_SQUARED_NORM = 1e-16  # PyTorch's rule: a norm is clamped from below at 1e-8
_BLOCK = 1 << 16  # values the NumPy path widens at a time: its float64 temporaries stay in the processor's cache


def _load_core() -> tuple[ModuleType | None, str]:
    if os.environ.get("MEMEDGE_NO_CORE") == "1":
        return None, "MEMEDGE_NO_CORE=1 is set"
    try:
        core = import_module("memedge._core")
    except ImportError as error:
        return None, f"memedge._core cannot be imported ({error}): reinstall memedge where a C++17 compiler is present"
    return core, "memedge._core is installed"


_core, _reason = _load_core()


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
        cuda: whether the native core has device code.
    """

    path: str
    reason: str
    isa: str | None
    isas: tuple[str, ...]
    compiler: str | None
    cuda: bool


def core_status() -> CoreStatus:
    """Say which path computes the reduction, and why; for `memedge doctor`."""
    if _core is None:
        return CoreStatus("numpy", _reason, None, (), None, False)
    return CoreStatus(
        "native", _reason, _core.isa_active(), tuple(_core.isa_available()), _core.COMPILER, bool(_core.CUDA)
    )


def check_options(alignment: str = ALIGNMENTS[0], operands: str = OPERANDS[0]) -> None:
    """Raise InputError for a name that does not exist; for callers who would rather know before a UNet pass."""
    if alignment not in ALIGNMENTS:
        raise InputError(f"There is no alignment {alignment!r}: use 'channel' or 'flat'.")
    if operands not in OPERANDS:
        raise InputError(f"There are no operands {operands!r}: use one of {', '.join(OPERANDS)}.")


def reduce_rows(cond: Any, uncond: Any, operands: str = "uncond_delta", threads: int | None = None) -> RowStatistics:
    """Return norm and cosines of each guidance vector Δ = ε_c − ε_0 in one pass (METHODS.md §1).

    Halves are widened to float32; float64 is narrowed to it. A vector's norm is clamped from below at 1e-8 in a cosine
    (PyTorch's rule), so Δ = 0 gives 0. Values beyond about 1e19 overflow float32 when squared and count as not finite.

    Args:
        cond: ε_c [..., C, H, W]: a NumPy array (ml_dtypes' bfloat16 too) or anything with DLPack (torch, JAX) in host
            memory; float32, float16, bfloat16 or float64. What is not contiguous is copied.
        uncond: ε_0, of the same dtype and C, H, W, whose leading shape ends cond's (leading ones are ignored): each is
            used for all of cond's rows that share those trailing indices.
        operands: the cosine's pair: "uncond_delta" (ε_0, Δ), "cond_uncond" (ε_c, ε_0) or "cond_delta" (ε_c, Δ).
        threads: at most this many; None: as many as this process may run on. Results don't depend on it.

    Raises:
        InputError: arrays that cannot be read or do not fit together, or an option that does not exist.
        NotFiniteError: NaN, infinity or overflow in any row: never a score.
    """
    check_options(operands=operands)
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}: give at least 1, or None for all.")
    c, dtype = _host_array(cond, "cond")
    u, uncond_dtype = _host_array(uncond, "uncond")
    if dtype != uncond_dtype:
        raise InputError(f"cond is {dtype} and uncond is {uncond_dtype}: convert one to the other's dtype.")
    leading, rows, uncond_rows = _pair(c.shape, u.shape)
    channels, height, width = c.shape[-3:]
    if dtype == "float64":
        with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaNs are reported below
            c, u, dtype = c.astype(np.float32), u.astype(np.float32), "float32"
    c, u = np.ascontiguousarray(c), np.ascontiguousarray(u)

    out = np.empty((3, rows))
    if _core is not None:
        bad = _core.guidance_stats(
            _core.address(c),
            _core.address(u),
            _core.address(out),
            dtype,
            rows,
            uncond_rows,
            channels,
            height * width,
            operands,
            threads or 0,
        )
    else:
        pixels = (channels, height * width)
        bad = _numpy_statistics(c.reshape(rows, *pixels), u.reshape(uncond_rows, *pixels), dtype, operands, out)
    if bad:
        first = np.flatnonzero(np.isnan(out[0]))[0]
        raise NotFiniteError(
            f"{bad} of {rows} predictions hold NaN, infinity or values too large to square (the first: row {first}): "
            "no score is made from them; run the model in a higher precision."
        )
    return RowStatistics(*out.reshape(3, *leading))


def _host_array(tensor: Any, name: str) -> tuple[npt.NDArray[Any], str]:
    """The tensor as an array in host memory, bfloat16 as its bits, and its dtype's name."""
    if not isinstance(tensor, np.ndarray):
        if hasattr(tensor, "__dlpack_device__"):
            foreign = dlpack.read(tensor, name)
            return foreign.array(), foreign.dtype
        if hasattr(tensor, "__cuda_array_interface__"):
            raise dlpack.device_error(name, "CUDA")
        raise InputError(f"{name} is a {type(tensor).__name__}: pass a NumPy array or a tensor with DLPack.")
    if (dtype := _NATIVE.get(tensor.dtype)) is not None:
        return tensor, dtype
    dtype = tensor.dtype.name
    if dtype == "bfloat16":
        return tensor.view(np.uint16), dtype
    if dtype not in _NATIVE.values():
        raise InputError(f"{name} is {dtype}: convert it to float32, float16 or bfloat16.")
    return tensor.astype(dtype), dtype  # it was of the other byte order


def _pair(cond: tuple[int, ...], uncond: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """cond's leading shape and both numbers of rows; an InputError where row r has no uncond row r % uncond_rows."""
    for name, shape in (("cond", cond), ("uncond", uncond)):
        if len(shape) < 3:
            raise InputError(f"{name} has shape {shape}: give [..., C, H, W].")
        if 0 in shape:
            raise InputError(f"{name} has shape {shape} and so no values: leave empty batches out.")
    if cond[-3:] != uncond[-3:]:
        raise InputError(f"cond has shape {cond} and uncond {uncond}: the last three, C, H and W, must be the same.")
    leading, shared = cond[:-3], uncond[:-3]
    while shared and shared[0] == 1:
        shared = shared[1:]
    if shared != leading[len(leading) - len(shared) :]:
        raise InputError(f"cond has shape {cond} and uncond {uncond}: uncond's leading shape must end cond's.")
    return leading, math.prod(leading), math.prod(shared)


def _numpy_statistics(
    cond: npt.NDArray[Any], uncond: npt.NDArray[Any], dtype: str, operands: str, out: npt.NDArray[np.float64]
) -> int:
    """What csrc/guidance_stats.h specifies, in NumPy: cond [R, C, P], uncond [R0, C, P] -> out [3, R].

    Works through blocks of rows, and of pixels where a row is larger than a block, so that memory stays bounded.
    Returns the number of rows that are not finite, which are NaN.
    """
    rows, channels, pixels = cond.shape
    rows_at_once = max(1, _BLOCK // (channels * pixels))
    pixels_at_once = max(1, _BLOCK // channels)
    with np.errstate(all="ignore"):  # what is not finite is counted, not warned about
        for start in range(0, rows, rows_at_once):
            row = slice(start, min(start + rows_at_once, rows))
            paired = np.arange(row.start, row.stop) % len(uncond)
            sums = np.zeros((5, row.stop - row.start))
            for first in range(0, pixels, pixels_at_once):
                block = slice(first, first + pixels_at_once)
                c, u = _widen(cond[row, :, block], dtype), _widen(uncond[paired, :, block], dtype)
                sums += _block_sums(c, u, operands)
            out[:, row] = _statistics(sums, pixels)
    return int(np.isnan(out[0]).sum())


def _widen(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def _block_sums(c: npt.NDArray[np.float32], u: npt.NDArray[np.float32], operands: str) -> npt.NDArray[np.float64]:
    """Per row of [r, C, p]: Σa², Σb², Σab, Σδ² and Σ over pixels of the cosine over channels; float64 [5, r]."""
    delta = (c - u).astype(np.float64)
    a = (u if operands == "uncond_delta" else c).astype(np.float64)
    b = u.astype(np.float64) if operands == "cond_uncond" else delta
    aa, bb, ab = (np.einsum("rcp,rcp->rp", x, y) for x, y in ((a, a), (b, b), (a, b)))
    dd = np.einsum("rcp,rcp->r", delta, delta)
    return np.stack([aa.sum(1), bb.sum(1), ab.sum(1), dd, _cosine(aa, bb, ab).sum(1)])


def _statistics(sums: npt.NDArray[np.float64], pixels: int) -> npt.NDArray[np.float64]:
    aa, bb, ab, dd, cosine = sums
    out = np.stack([np.sqrt(dd), np.clip(cosine / pixels, -1, 1), np.clip(_cosine(aa, bb, ab), -1, 1)])
    out[:, ~np.isfinite(aa + bb + dd)] = np.nan
    return out


def _cosine(
    aa: npt.NDArray[np.float64], bb: npt.NDArray[np.float64], ab: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    norm_a = np.sqrt(np.maximum(aa, _MIN_SQUARED_NORM))
    norm_b = np.sqrt(np.maximum(bb, _MIN_SQUARED_NORM))
    cosine: npt.NDArray[np.float64] = ab / (norm_a * norm_b)
    return cosine
