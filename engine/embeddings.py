"""Prompt embeddings from outside, in the form that engines take them, and back."""

import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError, NotFiniteError, shown
from memedge.engine.manifest import Manifest


def pack(
    manifest: Manifest,
    states: npt.ArrayLike,
    pooled: npt.ArrayLike | None,
    mask: npt.ArrayLike | None = None,
) -> npt.NDArray[np.float32]:
    """Return states [B, L, D] and, of models that have them, pooled states [B, P] as one array [B, K, D].

    Of models whose prompts have as many tokens as they have, states may be shorter than L, with a mask [B, L'] of what
    is there, or a list of [n, D]; what is there is then in the last column of the result.

    Raises:
        InputError: no numbers, other shapes than the engine's, no rows, a mask with gaps, or pooled states or a mask
            missing or not wanted.
        NotFiniteError: they hold NaN or infinity.
    """
    if manifest.masked:
        if pooled is not None:
            raise InputError("This engine's model has no pooled prompt embeddings: leave them out.")
        return _padded(manifest, states, mask)
    if mask is not None:
        raise InputError("This engine's model reads all tokens of its prompts: leave the mask out.")
    array = _numbers(states, (manifest.tokens, manifest.state_width), "prompt embeddings")
    if not manifest.pooled_width:
        if pooled is not None:
            raise InputError("This engine's model has no pooled prompt embeddings: leave them out.")
        return array
    if pooled is None:
        raise InputError(
            f"This engine's model needs pooled prompt embeddings too: give pooled, [B, {manifest.pooled_width}]."
        )
    row = _numbers(pooled, (manifest.pooled_width,), "pooled prompt embeddings")
    if len(row) != len(array):
        raise InputError(f"There are {len(array)} prompt embeddings and {len(row)} pooled ones: give as many of both.")
    packed = np.zeros((len(array), *manifest.states_shape), dtype=np.float32)
    packed[:, :-1], packed[:, -1, : manifest.pooled_width] = array, row
    return packed


def unpack(
    manifest: Manifest, packed: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Return states [..., L, D] and pooled states [..., P], or None in models without, of one array [..., K, D].

    Of models with a mask, states come without it, and those of one prompt [K, D] have its own length.
    """
    if manifest.masked:
        own = int(packed[:, -1].sum()) if packed.ndim == 2 else manifest.tokens
        return packed[..., :own, :-1].copy(), None
    states = packed[..., : manifest.tokens, :].copy()
    return states, packed[..., -1, : manifest.pooled_width].copy() if manifest.pooled_width else None


def _padded(manifest: Manifest, states: npt.ArrayLike, mask: npt.ArrayLike | None) -> npt.NDArray[np.float32]:
    """Return states of several lengths as one array, zeros behind them, with the mask in its last column."""
    width = manifest.state_width - 1
    if isinstance(states, list | tuple) and mask is None:
        rows = [_numbers(one, (width,), "prompt embeddings in the list") for one in states]
        if not rows:
            raise InputError("There are no prompt embeddings: give at least one.")
    else:
        array = _numbers(states, (None, width), "prompt embeddings")
        rows = [one[:length] for one, length in zip(array, _lengths(mask, array), strict=True)]
    longest = max(map(len, rows))
    if longest > manifest.tokens:
        raise InputError(
            f"The prompt embeddings have {longest} tokens: this engine takes at most {manifest.tokens}, so export one "
            "with a larger --max-sequence-length."
        )
    packed = np.zeros((len(rows), *manifest.states_shape), dtype=np.float32)
    for place, row in zip(packed, rows, strict=True):
        place[: len(row), :-1], place[: len(row), -1] = row, 1
    return packed


def _lengths(mask: npt.ArrayLike | None, array: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return how many tokens each prompt has, int64 [B]."""
    if mask is None:
        return np.full(len(array), array.shape[1])
    there = np.asarray(mask)
    alike = there.dtype.kind in "biuf" and there.shape == array.shape[:2]
    lengths: npt.NDArray[np.int64] = there.sum(axis=1).astype(np.int64) if alike else np.zeros(1, np.int64)
    if not alike or not np.array_equal(there, np.arange(array.shape[1]) < lengths[:, None]):
        raise InputError(
            f"The mask of the prompt embeddings is not one of {list(array.shape[:2])} with ones and then zeros: give "
            "what encode_prompt returns."
        )
    if lengths.min() < 1:
        raise InputError("The mask of the prompt embeddings leaves a prompt without a token: give at least one.")
    return lengths


def _numbers(values: npt.ArrayLike, shape: tuple[int | None, ...], name: str) -> npt.NDArray[np.float32]:
    """Return the values as float32 [B, *shape]; None: of any size but 0."""
    if isinstance(values, np.ma.MaskedArray):
        raise InputError(f"The {name} have a mask, which the model does not follow: give an array without one.")
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
            raise TypeError(f"they are {array.dtype}")
        with np.errstate(over="ignore"):  # what float32 cannot hold is not finite, which is said below
            array = array.astype(np.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a torch tensor that requires gradients
        raise InputError(f"The {name} are no array of numbers ({error}): give a NumPy array.") from None
    sizes = zip(array.shape[1:], shape, strict=False)
    if array.ndim != 1 + len(shape) or array.size == 0 or any(b not in (None, a) for a, b in sizes):
        wanted, found = ", ".join(str(size or "L") for size in shape), shown(str(list(array.shape)))
        more = ""
        if array.ndim == 3 and len(array) and array.shape[2:] == shape[1:]:  # of a longer prompt, or a shorter one
            more = f"; give those of {shape[0]} tokens, or guard a pipeline with first_step, which takes any number"
        raise InputError(f"The {name} have shape {found}: this engine takes [B, {wanted}] with B ≥ 1{more}.")
    if not np.isfinite(array).all():
        raise NotFiniteError(f"The {name} hold NaN or infinity, so there is no score to give.")
    return array
