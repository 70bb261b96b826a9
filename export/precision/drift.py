"""How far int8 moves scores, on prompts: measured and told, never promised."""

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from memedge.engine.arrays import Floats
from memedge.engine.backend import Backend
from memedge.engine.manifest import Drift
from memedge.export.parity import Statistics, engine_epsilon
from memedge.metrics import auc


def scores(backend: Backend, ids: npt.NDArray[np.int64], draws: int, norm_factor: float) -> Floats:
    """Return norm + alignment, [B], of ids [1 + B, L] whose first row is the empty prompt's.

    γ is (1, 1), as nothing is calibrated yet. One prompt is held at a time, so that any number takes the memory of one.

    Raises:
        NotFiniteError: a prediction holds NaN or infinity.
    """

    def predict(one: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return engine_epsilon(backend, one[None], draws)

    uncond = predict(ids[0])
    found = (Statistics.of(np.concatenate([uncond, predict(one)]), norm_factor) for one in ids[1:])
    return np.array([float(s.norm[0] + s.alignment[0]) for s in found])


def drift(own: Floats, true: Floats, memorized: npt.NDArray[np.bool_] | None) -> Drift:
    """Return how far scores [B] are from the float32 engine's; the AUC's change if both labels [B] occur."""
    change = None
    if memorized is not None and memorized.any() and not memorized.all():
        own_auc, true_auc = (auc(score[memorized], score[~memorized]) for score in (own, true))
        change = float(own_auc - true_auc)
    return Drift(
        score_absolute=float(np.abs(own - true).max()),
        spearman=float(spearmanr(own, true).statistic),
        auc_change=change,
        prompts=len(own),
    )
