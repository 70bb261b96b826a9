"""What the detector returns: columns for many prompts, or one verdict per prompt."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Scores:
    """Statistics of B prompts in the order given, one array per column.

    Attributes:
        norm: float64 [B], mean over draws of ‖Δ(t_norm)‖₂ (docs/methods.md §1). 0 for the empty prompt.
        alignment: float64 [B], mean cosine at t_cos, in [-1, 1]. 0 for the empty prompt.
        score: float64 [B], γ_norm · norm + γ_alignment · alignment. If the engine is not calibrated, γ is the published
            one of its model family, which was not fitted here. If none was published, score is None.
        memorized: bool [B], score ≥ threshold; None if the engine is not calibrated.
        truncated: bool [B], whether the prompt was longer than the text encoder reads. False for embeddings.
        threshold: the calibrated threshold, or None.
    """

    norm: npt.NDArray[np.float64]
    alignment: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64] | None
    memorized: npt.NDArray[np.bool_] | None
    truncated: npt.NDArray[np.bool_]
    threshold: float | None

    def __len__(self) -> int:
        return len(self.norm)


@dataclass(frozen=True)
class Verdict:
    """The verdict on one prompt.

    Attributes:
        prompt: the prompt.
        memorized: whether it is memorized; None if the engine is not calibrated.
        score: its score; None if passes were left out. If the engine is not calibrated, it is by the published γ of the
            model family, or None.
        norm: mean over draws of ‖Δ(t_norm)‖₂ (docs/methods.md §1).
        alignment: mean cosine at t_cos; None if passes were left out.
        threshold: the calibrated threshold, or None.
        truncated: whether the prompt is longer than the text encoder reads.
        passes: conditional UNet evaluations; 2 · draws if nothing was left out, and as many again if the score was so
            near the threshold that the prompt was evaluated alone.
        reason: in words, why the verdict is what it is.
    """

    prompt: str
    memorized: bool | None
    score: float | None
    norm: float
    alignment: float | None
    threshold: float | None
    truncated: bool
    passes: int
    reason: str
