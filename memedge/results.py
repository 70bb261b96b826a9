"""What the detector returns: columns for many prompts, or one verdict per prompt."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memedge import tables

if TYPE_CHECKING:
    from pandas import DataFrame


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
        threshold: the one that the verdicts are by, or None.
    """

    norm: npt.NDArray[np.float64]
    alignment: npt.NDArray[np.float64]
    score: npt.NDArray[np.float64] | None
    memorized: npt.NDArray[np.bool_] | None
    truncated: npt.NDArray[np.bool_]
    threshold: float | None

    def __len__(self) -> int:
        return len(self.norm)

    def __repr__(self) -> str:
        verdicts = "no verdicts"
        if self.memorized is not None:
            verdicts = f"{int(self.memorized.sum())} memorized, threshold {self.threshold:.4g}"
        return f"<Scores of {len(self)} prompts: {verdicts}>"

    def to_dict(self) -> tables.Columns:
        """Return a list of B plain Python values for each attribute.

        A column that is None is B times None, and the threshold stands B times.
        """
        return self._columns(len(self))

    def to_pandas(self) -> "DataFrame":
        """Return a table with a row per prompt and a column per attribute; what is None is NaN or <NA>.

        Raises:
            MemedgeError: pandas is not installed.
        """
        return tables.to_pandas(self.to_dict())

    def _repr_html_(self) -> str:
        return tables.to_html(self._columns(tables.ROWS), len(self))

    def _columns(self, most: int) -> tables.Columns:
        """Return the columns of the first prompts."""
        count = min(most, len(self))
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value[:count].tolist() if isinstance(value, np.ndarray) else [value] * count
            for name, value in values.items()
        }


@dataclass(frozen=True)
class Verdict:
    """The verdict on one prompt.

    Attributes:
        prompt: the prompt.
        memorized: whether it is memorized; None if the engine is not calibrated.
        score: its score; None if passes were left out that it is made of. If the engine is not calibrated, it is by the
            published γ of the model family, or None.
        norm: mean over draws of ‖Δ(t_norm)‖₂ (docs/methods.md §1); None if the screen passed the prompt.
        alignment: mean cosine at t_cos; None if passes were left out.
        threshold: the one that the verdict is by, or None.
        truncated: whether the prompt is longer than the text encoder reads.
        passes: conditional UNet evaluations; 2 · draws if nothing was left out, and as many again if the score was so
            near the threshold that the prompt was evaluated alone. With early="screen" no whole number: the screen's
            share of a pass is in it.
        reason: in words, why the verdict is what it is.
        operating_point: where the threshold comes from: "calibrated", "threshold" (it was given), or "target_fpr=R"
            (for that rate of false positives, by the calibration's clean scores); "" if there is none.
    """

    prompt: str
    memorized: bool | None
    score: float | None
    norm: float | None
    alignment: float | None
    threshold: float | None
    truncated: bool
    passes: float
    reason: str
    operating_point: str = ""


class Verdicts(list[Verdict]):
    """A list of verdicts, in the order of the prompts."""

    def to_dict(self) -> tables.Columns:
        """Return a list of plain Python values, one per verdict, for each attribute of a verdict."""
        return {field.name: [getattr(verdict, field.name) for verdict in self] for field in fields(Verdict)}

    def to_pandas(self) -> "DataFrame":
        """Return a table with a row per verdict and a column per attribute; what is None is NaN or <NA>.

        Raises:
            MemedgeError: pandas is not installed.
        """
        return tables.to_pandas(self.to_dict())

    def _repr_html_(self) -> str:
        return tables.to_html(Verdicts(self[: tables.ROWS]).to_dict(), len(self))
