"""Parts of an engine's manifest in words, for the commands that print them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numpy comes with it, which --help does not need
    from memedge.engine.manifest import Calibration, Drift, Estimate, Gain, Manifest, PromptList


def size(manifest: "Manifest") -> str:
    return f"{sum(entry.size for entry in manifest.files.values()) / 1e6:.1f} MB"


def parity(manifest: "Manifest") -> str:
    p = manifest.parity
    return (
        f"ε {p.epsilon_relative:.1e}, norm {p.norm_relative:.1e}, alignment {p.alignment_absolute:.1e} (absolute), "
        f"score with γ = (1, 1) {p.score_absolute:.1e} (absolute)"
    )


def drift(found: "Drift") -> str:
    auc = "unknown without labels" if found.auc_change is None else f"{found.auc_change:+.4f}"
    return (
        f"score with γ = (1, 1) {found.score_absolute:.1e} (absolute, largest), Spearman {found.spearman:.4f}, "
        f"ΔAUC {auc}, over {found.prompts} prompts"
    )


def calibration_facts(calibration: "Calibration") -> list[tuple[str, str]]:
    """Return the rule, what it was fitted to, and how good it is."""
    from memedge.decision.rule import Rule

    c, found = calibration, calibration.cross_validation
    return [
        (
            "calibration",
            f"memorized if {Rule.calibrated(c).formula} ≥ {c.threshold:.4g} ({c.alignment}, {c.operands}), "
            f"for a false-positive rate of {c.target_fpr:g}",
        ),
        *([("alignment", _gain(c.gain))] if c.gain else []),
        (
            "fitted to",
            f"{_prompt_list(c.memorized, 'memorized')} and {_prompt_list(c.clean, 'clean')} by {c.fitted_by}, {c.date}",
        ),
        (
            f"{found.folds}-fold",
            f"AUC {_estimate(found.auc)}, memorized found {_estimate(found.tpr)}, clean called memorized "
            f"{_estimate(found.fpr)}: judged by what was fitted to the other folds, 95 % intervals",
        ),
        *([("screen", _screen(c))] if c.screen or c.no_screen else []),
    ]


def _screen(calibration: "Calibration") -> str:
    """Say what the screen does, or why there is none."""
    screen = calibration.screen
    if screen is None:
        return f"none: {calibration.no_screen}"
    return (
        f"at tap {screen.tap}, passes {_estimate(screen.decided)} of clean prompts (judged by the other folds' fit), "
        f"and at most α = {screen.alpha:.2g} of memorized ones that are found ({screen.memorized} set its cut)"
    )


def _gain(gain: "Gain") -> str:
    """Say why the alignment is in the score, or is not."""
    does = "is in the score" if gain.pays else "is left out, and its passes with it"
    return f"{does}: it adds {gain.value:+.4f} ± {gain.error:.4f} (standard error) to the norm's cross-validated AUC"


def _prompt_list(prompts: "PromptList", kind: str) -> str:
    return f"{prompts.prompts} {kind} prompts ({prompts.name}, sha256 {prompts.sha256[:16]}…)"


def _estimate(estimate: "Estimate") -> str:
    return f"{estimate.value:.3f} [{estimate.lowest:.3f}, {estimate.highest:.3f}]"
