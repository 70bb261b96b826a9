"""From each prompt's scores, draw by draw, to figures with intervals: AUC, TPR, differences, stability, verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from memedge.metrics import Array, allowed, auc, delong, percentiles, resample, roc, tpr

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
POINTS = 60  # of a ROC curve


@dataclass(frozen=True)
class Measured:
    """One detector's scores.

    Attributes:
        name, formula: what it is.
        passes: UNet evaluations per prompt and draw.
        values: float64 [B, n], the score of each prompt on each draw; higher means memorized.
        seconds: per prompt and draw.
    """

    name: str
    formula: str
    passes: float
    values: Floats
    seconds: float

    def score(self, draws: int) -> Floats:
        """Return the score with n draws, float64 [B]: the mean over the first n."""
        mean: Floats = self.values[:, :draws].mean(axis=1)
        return mean


@dataclass(frozen=True)
class Rule:
    """How norm and alignment make a score, and from which score on a prompt is called memorized.

    Attributes:
        gamma_norm, gamma_alignment: the weights.
        source: where they are from: "calibrated", "published" or "not fitted".
        threshold: the calibrated one, or None.
    """

    gamma_norm: float
    gamma_alignment: float
    source: str
    threshold: float | None

    @property
    def formula(self) -> str:
        """The score in words."""
        sign = "−" if self.gamma_alignment < 0 else "+"
        return f"{self.gamma_norm:.4g} · norm {sign} {abs(self.gamma_alignment):.4g} · alignment"


@dataclass(frozen=True)
class Figure:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """What one detector reaches with n draws, and what it costs per prompt."""

    detector: str
    draws: int
    passes: float
    seconds: float
    auc: Figure
    tpr_1: Figure
    tpr_1_nearest: Figure
    tpr_3: Figure
    tpr_3_nearest: Figure


@dataclass(frozen=True)
class Difference:
    """A detector's figures minus those of the first one, of the same prompts; p is DeLong's for the AUC."""

    detector: str
    against: str
    draws: int
    auc: Figure
    p: float | None
    tpr_1: Figure


@dataclass(frozen=True)
class Stability:
    """How much hangs on the draw.

    Attributes:
        spearman: mean rank correlation of the scores of two single draws; None if a draw gives all prompts one score.
        spread: standard deviation over draws, root mean square over prompts, divided by that between prompts' means.
        flips: share of verdicts by one draw that differ from the verdict by all of them; None without a threshold.
    """

    detector: str
    draws: int
    spearman: float | None
    spread: float | None
    flips: float | None


@dataclass(frozen=True)
class Roc:
    """A ROC curve: the highest TPR at an FPR of at most fpr[k], with its 95 % interval."""

    detector: str
    fpr: list[float]
    tpr: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Verdicts:
    """What the calibrated threshold says of the prompts, with n draws."""

    draws: int
    threshold: float
    found: int
    memorized: int
    false_alarms: int
    clean: int


@dataclass(frozen=True)
class Findings:
    """All figures.

    Attributes:
        draws: the number of draws that curves, differences, verdicts and prompts' scores are of.
        verdicts: of the first detector, if it has a calibrated threshold.
    """

    draws: int
    lines: list[Line]
    differences: list[Difference]
    stability: list[Stability]
    rocs: list[Roc]
    verdicts: Verdicts | None


@dataclass(frozen=True)
class Run:
    """What was run, on what, with what. `draws` and `noise_seed` are the engine's own; `seed` is what was asked for."""

    command: str
    date: str
    engine: str
    checkpoint: str
    checkpoint_sha256: str
    engine_fingerprint: str
    provider: str
    precision: str
    threads: int
    timesteps: tuple[int, int]
    draws: int
    noise_seed: int
    seed: int | None
    versions: dict[str, str]


@dataclass(frozen=True)
class PromptFile:
    """A list: its name, the SHA-256 of its bytes, its prompts, and how many of them were evaluated."""

    name: str
    sha256: str
    prompts: int
    evaluated: int


@dataclass(frozen=True)
class Described:
    """A detector: its formula, its UNet evaluations and its seconds per prompt and draw."""

    name: str
    formula: str
    passes: float
    seconds: float


@dataclass(frozen=True)
class Scored:
    """A prompt, its label, and its score by each detector on each draw."""

    prompt: str
    memorized: bool
    truncated: bool
    scores: dict[str, list[float]]

    def score(self, detector: str, draws: int) -> float:
        """Return the score with n draws: the mean over the first n."""
        return float(np.mean(self.scores[detector][:draws]))


@dataclass(frozen=True)
class Evaluation:
    """All that was found, and what it holds for. `cautions` are sentences that a reader has to know."""

    run: Run
    memorized: PromptFile
    clean: PromptFile
    cautions: list[str]
    rule: Rule
    detectors: list[Described]
    findings: Findings
    prompts: list[Scored]

    @property
    def has_terms(self) -> bool:
        """Whether norm and alignment were both measured."""
        return {"norm", "alignment"} <= self.prompts[0].scores.keys()


TPRS: tuple[tuple[int, Any], ...] = ((1, "strict"), (1, "nearest"), (3, "strict"), (3, "nearest"))


def find(detectors: Sequence[Measured], memorized: Bools, draws: Sequence[int], main: int, rule: Rule) -> Findings:
    """Compute every figure of every detector.

    Args:
        detectors: with at least max(draws) draws each; the first is what the others are compared with.
        memorized: bool [B], the label of each prompt; at least two of each kind.
        draws: the numbers of draws to give figures for.
        main: that of the curves, differences, verdicts.
        rule: whose threshold holds for the detector "anisotropy", if there is one.
    """
    indices = resample(int(memorized.sum()), int((~memorized).sum()))
    lines, differences, rocs = [], [], []
    base: npt.NDArray[np.float64] | None = None
    for n in draws:
        for place, one in enumerate(detectors):
            pair = _split(one.score(n), memorized)
            resampled = _figures(pair[0][indices[0]], pair[1][indices[1]])
            lines.append(_line(one, n, _figures(*pair), resampled))
            if n != main:
                continue
            rocs.append(_roc(one.name, pair, indices))
            if place == 0:
                first, base = pair, resampled
            elif base is not None:
                differences.append(_difference(one.name, detectors[0].name, n, (first, pair), resampled - base))
    top = detectors[0].score(main)
    verdicts = None
    if rule.threshold is not None and detectors[0].name == "anisotropy":
        verdicts = _verdicts(top, memorized, main, rule.threshold)
    return Findings(
        draws=main,
        lines=lines,
        differences=differences,
        stability=[_stability(one, rule.threshold) for one in detectors if one.values.shape[1] > 1],
        rocs=rocs,
        verdicts=verdicts,
    )


def _split(score: Floats, memorized: Bools) -> tuple[Floats, Floats]:
    return score[memorized], score[~memorized]


def _figures(positive: Array, negative: Array) -> Floats:
    """Return the AUC and TPRS of [..., count], in the first axis."""
    return np.stack([auc(positive, negative), *(tpr(positive, negative, *at) for at in TPRS)])


def _figure(value: float, resampled: Array) -> Figure:
    return Figure(float(value), *percentiles(resampled))


def _line(one: Measured, draws: int, values: Floats, resampled: Floats) -> Line:
    area, *tprs = map(_figure, values, resampled)
    return Line(one.name, draws, one.passes * draws, one.seconds * draws, area, *tprs)


def _difference(
    name: str, against: str, draws: int, pairs: tuple[tuple[Floats, Floats], tuple[Floats, Floats]], resampled: Floats
) -> Difference:
    (first, second), (others, more) = zip(*pairs, strict=True)
    value, _, p = delong((first, second), (others, more))
    rates = [float(tpr(*pair, 1)) for pair in pairs]
    return Difference(name, against, draws, _figure(value, resampled[0]), p, _figure(rates[1] - rates[0], resampled[1]))


def _roc(name: str, pair: tuple[Floats, Floats], indices: tuple[Array, Array]) -> Roc:
    negatives = len(pair[1])
    at = [allowed(percent, negatives) for percent in (1, 3)]
    counts = np.unique([0, *at, *np.geomspace(1, negatives, POINTS).round().astype(int)])
    resampled = roc(pair[0][indices[0]], pair[1][indices[1]], counts)
    low, high = zip(*(percentiles(column) for column in resampled.T), strict=True)
    return Roc(name, (counts / negatives).tolist(), roc(*pair, counts).tolist(), list(low), list(high))


def _stability(one: Measured, threshold: float | None) -> Stability:
    values = one.values
    draws = values.shape[1]
    ranks = rankdata(values, axis=0)
    spearman = None
    if (ranks.std(axis=0) > 0).all():
        spearman = float(np.corrcoef(ranks, rowvar=False)[np.triu_indices(draws, 1)].mean())
    between = values.mean(axis=1).std(ddof=1)
    flips = None
    if threshold is not None and one.name == "anisotropy":
        flips = float(((values >= threshold) != (values.mean(axis=1) >= threshold)[:, None]).mean())
    spread = float(np.sqrt(values.var(axis=1, ddof=1).mean()) / between) if between else None
    return Stability(one.name, draws, spearman, spread, flips)


def _verdicts(score: Floats, memorized: Bools, draws: int, threshold: float) -> Verdicts:
    called = score >= threshold
    return Verdicts(
        draws=draws,
        threshold=threshold,
        found=int((called & memorized).sum()),
        memorized=int(memorized.sum()),
        false_alarms=int((called & ~memorized).sum()),
        clean=int((~memorized).sum()),
    )
