"""What the papers report, by family of models: weights and figures, with n noise draws per prompt (METHODS.md §1)."""

import re
from dataclasses import dataclass, field

from memedge.engine.manifest import Manifest


@dataclass(frozen=True)
class Published:
    """AUC, TPR@1%FPR (by which convention, the papers do not say), and seconds per 10 prompts on the authors' GPU."""

    method: str
    auc: float
    tpr_1: float
    seconds_per_10: float | None = None


@dataclass(frozen=True)
class Family:
    """The model that figures are of; the released (γ_norm, γ_alignment); figures by (statistic, n), and of others."""

    model: str
    gamma: tuple[float, float]
    figures: dict[tuple[str, int], Published] = field(default_factory=dict)
    not_measured: tuple[Published, ...] = ()


FAMILIES = {
    "Stable Diffusion 1.x": Family(
        "Stable Diffusion 1.4",
        (1, 2),
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
        (1, 0.1),
        {
            ("norm", 1): Published("Wen et al.", 0.948, 0.739, 0.80),
            ("score", 1): Published("Asthana & Belagiannis", 0.953, 0.791, 2.2),
        },
        (
            Published("Ren et al. (cross-attention)", 0.848, 0.0, 0.07),
            Published("Jeon et al. (Hessian-vector)", 0.959, 0.740, 14.6),
        ),
    ),
    "Realistic Vision": Family("Realistic Vision 5.1", (2, 1)),
}


def family_of(manifest: Manifest) -> str | None:
    """Return the family of an engine's model, guessed from its name and sizes, or None."""
    if (manifest.latent_shape[0], manifest.tokens) != (4, 77):
        return None
    if "realisticvision" in re.sub("[^a-z]", "", manifest.source.id.lower()):
        return "Realistic Vision"
    return {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}.get(manifest.state_width)
