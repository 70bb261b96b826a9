"""The product's own statistics, draw by draw: norm, alignments, and the score of both (docs/methods.md §1 and §2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Protocol

import numpy as np

from memedge.decision.rule import DEFAULT_ALIGNMENT, DEFAULT_OPERANDS, Rule
from memedge.detectors.draws import Draws, per_block
from memedge.engine.arrays import Floats
from memedge.engine.denoiser import Denoiser, Latents
from memedge.engine.engine import Engine, States
from memedge.engine.manifest import Alignment, Manifest, Operands
from memedge.guidance import guidance_stats


class Source(Protocol):
    """Where statistics come from; float64 [B, n] each, one pass per prompt and draw, 0 for the empty prompt."""

    def norms(self, states: States) -> Floats:
        """Return ‖Δ‖₂ at t_norm, scaled for v-prediction."""

    def alignments(self, states: States, alignment: Alignment, operands: Operands) -> Floats:
        """Return the cosine at t_cos."""


@dataclass(frozen=True)
class OwnDraws:
    """The first n of the engine's own draws: the values that the product computes, from what it caches."""

    engine: Engine
    draws: int

    def norms(self, states: States) -> Floats:
        return self.engine.norms(states, self.draws)

    def alignments(self, states: States, alignment: Alignment, operands: Operands) -> Floats:
        every = [self.engine.alignments(states, states.all, draw, alignment, operands) for draw in range(self.draws)]
        return np.stack(every, axis=1)


class OtherDraws:
    """Any noise [n, C, H, W], by the denoiser."""

    def __init__(self, denoiser: Denoiser, noise: Latents):
        self._manifest = denoiser.manifest
        self._first, self._late = (Draws(denoiser, noise, timestep) for timestep in denoiser.manifest.timesteps)

    def norms(self, states: States) -> Floats:
        return norm_scale(self._manifest) * guidance_stats(self._first.cond(states), self._first.uncond).norm

    def alignments(self, states: States, alignment: Alignment, operands: Operands) -> Floats:
        cond, uncond = self._late.cond(states), self._late.uncond
        if self._manifest.prediction_type == "v_prediction":
            cond, uncond = (
                _velocity(eps, self._late.noise, self._manifest.alphas_cumprod[1]) for eps in (cond, uncond)
            )
        found = guidance_stats(cond, uncond, alignment=alignment, operands=operands).alignment
        return found * ~states.empty[:, None]


def norm_scale(manifest: Manifest) -> float:
    """Return what ‖Δ_ε‖ at the noisiest timestep is multiplied by to be the product's norm (docs/methods.md §1)."""
    return manifest.norm_factor / manifest.epsilon_factor  # Δ_v is Δ_ε / √ᾱ


def open_source(engine: Engine, draws: int, seed: int | None) -> Source:
    """Return the engine's own draws where these are meant and suffice; raises as Denoiser where not."""
    if seed is None and draws <= engine.draws:
        return OwnDraws(engine, draws)
    denoiser = Denoiser(engine)
    return OtherDraws(denoiser, denoiser.noise(draws, seed))


class Norm:
    """‖ε_c − ε_0‖₂ at the noisiest timestep (Wen et al., ICLR 2024), × √ᾱ / (1 − ᾱ) where the model predicts v.

    Cost: 1 pass per prompt and draw.
    """

    name = "norm"
    formula = "‖ε_c − ε_0‖₂ at the first timestep (Wen et al. 2024)"
    passes = 1.0

    def __init__(self, engine: Engine, draws: int, seed: int | None):
        self._engine, self._draws, self._source = engine, draws, open_source(engine, draws, seed)

    def __call__(self, prompts: Sequence[str]) -> Floats:
        return per_block(self._engine, prompts, self._draws, self._source.norms)


class Aligned:
    """± the cosine of a pair of (ε_0, ε_c, Δ = ε_c − ε_0) at a late timestep (Asthana & Belagiannis, ICLR 2026).

    "channel": of each pixel's channels, averaged over pixels; "flat": of whole tensors. Whether a high or a low cosine
    means memorized belongs to the model, so the sign is that of γ_alignment in the engine's calibration, if that is for
    this pair. Else, for (ε_0, Δ), it is the preset's, or +; and for the others it is what holds where Δ is orthogonal
    to ε_0: a large Δ then makes cos(ε_c, ε_0) low and cos(ε_c, Δ) high. `sign` is that sign, 1 or −1: divided by it, a
    value is the cosine as measured.

    Cost: 1 pass per prompt and draw.
    """

    passes = 1.0

    def __init__(self, engine: Engine, draws: int, seed: int | None, alignment: Alignment, operands: Operands):
        self.name = alignment_name(alignment, operands)
        self._engine, self._draws, self._source = engine, draws, open_source(engine, draws, seed)
        self._alignment, self._operands = alignment, operands
        self.sign = _sign(rule_of(engine), operands)
        over = "over channels, mean over pixels" if alignment == "channel" else "of whole tensors"
        means = "a low" if self.sign < 0 else "a high"
        self.formula = (
            f"cos({_OPERANDS[operands]}) {over}, at the third last timestep; of this model {means} one means memorized "
            "(Asthana & Belagiannis 2026)"
        )

    def __call__(self, prompts: Sequence[str]) -> Floats:
        return per_block(self._engine, prompts, self._draws, self._score)

    def _score(self, states: States) -> Floats:
        return self.sign * self._source.alignments(states, self._alignment, self._operands)


class Anisotropy:
    """γ_norm · norm + γ_alignment · alignment (Asthana & Belagiannis, ICLR 2026): the product's score.

    γ, the pair and the kind of cosine are those of the engine's calibration for what runs; else those published for its
    family; else γ = (1, 1), which the paper says works, too.

    Cost: 2 passes per prompt and draw.
    """

    name = "anisotropy"
    passes = 2.0

    def __init__(self, engine: Engine, draws: int, seed: int | None):
        self._engine, self._draws, self._source = engine, draws, open_source(engine, draws, seed)
        self._rule = rule = rule_of(engine)
        cosine = f"{rule.alignment}, cos({_OPERANDS[rule.operands]})"
        self.formula = f"{rule.formula}; {cosine} (Asthana & Belagiannis 2026)"

    def __call__(self, prompts: Sequence[str]) -> Floats:
        return per_block(self._engine, prompts, self._draws, self._score)

    def _score(self, states: States) -> Floats:
        rule, source = self._rule, self._source
        return rule.score(source.norms(states), source.alignments(states, rule.alignment, rule.operands))


_OPERANDS: dict[Operands, str] = {"uncond_delta": "ε_0, Δ", "cond_uncond": "ε_c, ε_0", "cond_delta": "ε_c, Δ"}


def alignment_name(alignment: Alignment, operands: Operands) -> str:
    """Return what --detector calls an alignment: "alignment", "alignment-flat", "alignment-cond-uncond", …"""
    words = ["alignment"] + ([] if operands == DEFAULT_OPERANDS else [operands.replace("_", "-")])
    return "-".join(words + ([] if alignment == DEFAULT_ALIGNMENT else [alignment]))


def terms(rule: Rule) -> tuple[str, str]:
    """Return the detectors that a rule's two weights belong to."""
    return "norm", alignment_name(rule.alignment, rule.operands)


def rule_of(engine: Engine) -> Rule:
    """Return the rule for what an engine runs on."""
    return Rule.of(engine.directory.manifest, engine.backend.key)


def _sign(rule: Rule, operands: Operands) -> float:
    """Return whether a high (1) or a low (−1) cosine of a pair means memorized; see Aligned."""
    if rule.operands == operands:
        return -1.0 if rule.gamma_alignment < 0 else 1.0
    return -1.0 if operands == "cond_uncond" else 1.0


def _velocity(eps: Latents, noise: Latents, alpha: float) -> Latents:
    """Return v of ε = √ᾱ v + √(1 − ᾱ) x."""
    return ((eps - np.float32(sqrt(1 - alpha)) * noise) / np.float32(sqrt(alpha))).astype(np.float32)
