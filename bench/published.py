"""What the papers report, by family of models, with n noise draws per prompt (docs/methods.md §1)."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """AUC, TPR@1%FPR (by which convention, the papers do not say), and seconds per 10 prompts on the authors' GPU."""

    method: str
    auc: float
    tpr_1: float
    seconds_per_10: float | None = None


@dataclass(frozen=True)
class Family:
    """The model that figures are of; figures by (statistic, n); and those of detectors that are not measured here."""

    model: str
    figures: dict[tuple[str, int], Published] = field(default_factory=dict)
    not_measured: tuple[Published, ...] = ()


FAMILIES = {  # by the name that export/sources/presets.py gives them
    "Stable Diffusion 1.x": Family(
        "Stable Diffusion 1.4",
        {
            ("norm", 1): Published("Wen et al.", 0.976, 0.896, 0.40),
            ("alignment", 1): Published("Asthana & Belagiannis, ablation", 0.923, 0.424),
            ("score", 1): Published("Asthana & Belagiannis", 0.994, 0.935, 1.1),
            ("score", 4): Published("Asthana & Belagiannis", 0.999, 0.984),
        },
        (
            Published("Ren et al. (cross-attention)", 0.846, 0.116, 0.05),
            Published("Jeon et al. (Hessian-vector)", 0.987, 0.908, 5.4),
        ),
    ),
    "Stable Diffusion 2.x": Family(
        "Stable Diffusion 2.0",
        {
            ("norm", 1): Published("Wen et al.", 0.948, 0.739, 0.80),
            ("score", 1): Published("Asthana & Belagiannis", 0.953, 0.791, 2.2),
        },
        (
            Published("Ren et al. (cross-attention)", 0.848, 0.0, 0.07),
            Published("Jeon et al. (Hessian-vector)", 0.959, 0.740, 14.6),
        ),
    ),
    "Realistic Vision": Family("Realistic Vision 5.1"),
}
