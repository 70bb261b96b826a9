"""The reduction where there is no native core, and of float64: what csrc/guidance_stats.h specifies, in NumPy."""

from typing import Any

import numpy as np
import numpy.typing as npt

_MIN_SQUARED_NORM = 1e-16  # PyTorch's rule: a norm is clamped from below at 1e-8
_BLOCK = 1 << 16  # values widened at a time: the float64 temporaries stay in the processor's cache


def guidance_stats(
    cond: npt.NDArray[Any],
    uncond: npt.NDArray[Any],
    row: npt.NDArray[np.int64] | None,
    dtype: str,
    operands: str,
    out: npt.NDArray[np.float64],
) -> int:
    """Fill out [3, R] from cond [R, C, P] and uncond [K, C, P]; row r's uncond row is row[r], without it r % K.

    Works through blocks of rows, and of pixels where a row is larger than a block, so that memory stays bounded.
    Returns the number of rows that are not finite, which are NaN.
    """
    rows, channels, pixels = cond.shape
    rows_at_once = max(1, _BLOCK // (channels * pixels))
    pixels_at_once = max(1, _BLOCK // channels)
    with np.errstate(all="ignore"):  # what is not finite is counted, not warned about
        for start in range(0, rows, rows_at_once):
            some = slice(start, min(start + rows_at_once, rows))
            paired = np.arange(some.start, some.stop) % len(uncond) if row is None else row[some]
            sums = np.zeros((5, some.stop - some.start))
            for first in range(0, pixels, pixels_at_once):
                block = slice(first, first + pixels_at_once)
                c, u = _widen(cond[some, :, block], dtype), _widen(uncond[paired, :, block], dtype)
                sums += _block_sums(c, u, operands)
            out[:, some] = _statistics(sums, pixels)
    return int(np.isnan(out[0]).sum())


def guidance_step(
    x: npt.NDArray[Any],
    cond: npt.NDArray[Any],
    uncond: npt.NDArray[Any],
    last: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None,
    dtype: str,
    to_eps: tuple[float, float],
    out: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Fill out [3, B] as csrc/guidance_step.h says, from [B, C, H, W]; return x, ε_c, and the map [B, H, W].

    Args:
        last: x and ε_c as the step before returned them; None at the first.
        to_eps: scale and shift in ε = scale · prediction + shift · x.
    """
    scale, shift = to_eps
    with np.errstate(all="ignore"):
        x, cond, uncond = (_widen(values, dtype) for values in (x, cond, uncond))
        eps = scale * cond + shift * x
        squares = (scale * (cond - uncond)).astype(np.float64) ** 2
        out[:] = 0
        out[0] = np.sqrt(squares.sum((1, 2, 3)))
        if last is not None:
            out[1], out[2] = (
                np.sqrt(((now - before).astype(np.float64) ** 2).sum((1, 2, 3)))
                for now, before in ((eps, last[1]), (x, last[0]))
            )
        out[:, ~np.isfinite(out.sum(0))] = np.nan
        return np.array(x), eps, squares.sum(1).astype(np.float32)


def _widen(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """The values in float32, or float64 as it is."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values if dtype == "float64" else values.astype(np.float32, copy=False)


def _block_sums(c: npt.NDArray[Any], u: npt.NDArray[Any], operands: str) -> npt.NDArray[np.float64]:
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
