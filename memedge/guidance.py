"""The fused reduction on anyone's own predictions: a server's free norm, with no engine at all."""

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError
from memedge.engine.manifest import Alignment, Operands, PredictionType, velocity_norm_factor
from memedge.engine.reduction import check_options, reduce_rows


@dataclass(frozen=True)
class GuidanceStats:
    """Statistics of guidance vectors Δ = ε_c − ε_0, in the leading shape of eps_cond.

    Attributes:
        norm: float64, ‖Δ‖₂ over C, H, W; for v-prediction √ᾱ / (1 − ᾱ) times that.
        alignment: float64, the cosine of the chosen operands, in [-1, 1].
    """

    norm: npt.NDArray[np.float64]
    alignment: npt.NDArray[np.float64]


def guidance_stats(
    eps_cond: Any,
    eps_uncond: Any,
    *,
    alignment: Alignment = "channel",
    operands: Operands = "uncond_delta",
    prediction_type: PredictionType = "epsilon",
    alpha_cumprod: float | None = None,
) -> GuidanceStats:
    """Return the norm and alignment of predictions that are already there (docs/methods.md §5, "free norm").

    A server that does classifier-free guidance has both at its first step. The norm belongs to the first (noisiest)
    timestep and the alignment to a late one. Both are given for the timestep of the predictions that are passed in.

    Predictions on an NVIDIA GPU are reduced there, after the work that their library has enqueued on them. This call
    waits for the results, which come back to the host.

    Args:
        eps_cond: conditional predictions [..., C, H, W]: a NumPy array, anything with DLPack (torch, JAX, CuPy) in host
            memory or on an NVIDIA GPU, or with `__cuda_array_interface__` (Numba); float32, float16, bfloat16 or, in
            host memory, float64. On a GPU it must be contiguous. Masked arrays are refused, and subclasses of NumPy's
            or torch's tensors, which can mean more than their values.
        eps_uncond: unconditional predictions, on the same device, of the same dtype, whose leading shape ends
            eps_cond's.
        alignment: "channel" averages the cosine over the channels of each pixel, "flat" takes it of whole tensors.
        operands: the cosine's pair: "uncond_delta" (ε_0, Δ), "cond_uncond" (ε_c, ε_0) or "cond_delta" (ε_c, Δ).
        prediction_type: what the predictions are; "v_prediction" needs `alpha_cumprod`, ᾱ at their timestep. "flow": v
            of flow matching, in a sampler's first step, σ = 1; the alignment means nothing there (docs/methods.md §9).

    Raises:
        InputError: arrays that do not fit together, or an option that does not exist.
        ProviderError: CUDA fails.
        NotFiniteError: NaN or infinity in the predictions.

    Examples:
        >>> import numpy as np
        >>> from memedge import guidance_stats
        >>> eps_uncond = np.ones((1, 4, 8, 8), dtype=np.float32)
        >>> stats = guidance_stats(1.5 * eps_uncond, eps_uncond)
        >>> stats.norm.round(3), stats.alignment.round(3)
        (array([8.]), array([1.]))
    """
    check_options(alignment, operands)
    if not isinstance(prediction_type, str) or prediction_type not in get_args(PredictionType):
        known = ", ".join(map(repr, get_args(PredictionType)))
        raise InputError(f"There is no prediction type {prediction_type!r}: use one of {known}.")
    factor = 1.0
    if prediction_type == "v_prediction":
        factor = velocity_norm_factor(_alpha(alpha_cumprod))
    rows = reduce_rows(eps_cond, eps_uncond, operands)
    return GuidanceStats(factor * rows.norm, rows.cosine(alignment))


def _alpha(value: Any) -> float:
    try:
        alpha = float(value)
    except (TypeError, ValueError, RuntimeError):  # no number, or several
        alpha = 0.0
    if not 0 < alpha < 1:
        raise InputError("v-prediction needs alpha_cumprod between 0 and 1: give ᾱ at the predictions' timestep.")
    return alpha
