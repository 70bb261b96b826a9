"""How far results may be from the truth: every promised tolerance, in one place, read by the tests."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Tolerance:
    """Largest deviation of one score's terms.

    Attributes:
        norm: relative, of ‖Δ‖₂.
        alignment: absolute, of the cosine (it lies in [-1, 1]).
    """

    norm: float
    alignment: float

    def of_norms(self, norms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return how far each of the norms, [B], of ordinary prompts may be off: `norm` of it, or of their median.

        The median is the scale of quiet prompts. Rounding adds an error of one size whatever the prompt, so that of a
        quieter one it is a larger share, and no verdict needs that share: thresholds lie above what ordinary prompts
        reach, and there the same error is within `norm`.
        """
        allowed: npt.NDArray[np.float64] = self.norm * np.maximum(norms, np.median(norms))
        return allowed


# A whole engine against the float32 reference, by precision. What is not here (int8) is reported, never promised.
ENGINE = {
    "fp32": Tolerance(1e-4, 1e-4),
    "fp16": Tolerance(1e-2, 1e-2),
    "bf16": Tolerance(5e-2, 5e-2),
}
# Where the terms themselves may move by percents, the order of the prompts may not: Spearman's ρ of the scores.
ENGINE_MIN_SPEARMAN = {"bf16": 0.999}

# One prompt evaluated twice by one backend, in batches of different shapes: what a verdict's margin allows for. ONNX
# Runtime and OpenVINO gave equal bits on the machine this was written on; others may choose kernels by shape.
BATCH_NOISE = {
    "fp32": Tolerance(1e-5, 1e-5),
    "fp16": Tolerance(1e-3, 1e-3),
    "bf16": Tolerance(5e-3, 5e-3),
    "int8": Tolerance(1e-5, 1e-5),  # every row is run alone, so the shapes do not differ
}

# The reduction against float64 arithmetic on the same values, by op and input dtype. Halves are exact in float32, which
# all of them are reduced in, so they differ from float32 only in the values they can hold.
OPS = {
    ("guidance_stats", "float32"): Tolerance(1e-6, 1e-6),
    ("guidance_stats", "float16"): Tolerance(1e-6, 1e-6),
    ("guidance_stats", "bfloat16"): Tolerance(1e-6, 1e-6),
}
