"""Prompt embeddings from outside, in the form that engines take them, and back."""

import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError, NotFiniteError, shown
from memedge.engine.manifest import Manifest


def pack(manifest: Manifest, states: npt.ArrayLike, pooled: npt.ArrayLike | None) -> npt.NDArray[np.float32]:
    """Return states [B, L, D] and, of models that have them, pooled states [B, P] as one array [B, K, D].

    Raises:
        InputError: no numbers, other shapes than the engine's, no rows, or pooled states missing or not wanted.
        NotFiniteError: they hold NaN or infinity.
    """
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
    """Return states [..., L, D] and pooled states [..., P], or None in models without, of one array [..., K, D]."""
    states = packed[..., : manifest.tokens, :].copy()
    return states, packed[..., -1, : manifest.pooled_width].copy() if manifest.pooled_width else None


def _numbers(values: npt.ArrayLike, shape: tuple[int, ...], name: str) -> npt.NDArray[np.float32]:
    """Return the values as float32 [B, *shape]."""
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
    if array.ndim != 1 + len(shape) or len(array) == 0 or array.shape[1:] != shape:
        wanted, found = ", ".join(map(str, shape)), shown(str(list(array.shape)))
        more = ""
        if array.ndim == 3 and len(array) and array.shape[2:] == shape[1:]:  # of a longer prompt, or a shorter one
            more = f"; give those of {shape[0]} tokens, or guard a pipeline with first_step, which takes any number"
        raise InputError(f"The {name} have shape {found}: this engine takes [B, {wanted}] with B ≥ 1{more}.")
    if not np.isfinite(array).all():
        raise NotFiniteError(f"The {name} hold NaN or infinity, so there is no score to give.")
    return array
