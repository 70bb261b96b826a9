"""From each prompt's scores, draw by draw, to figures with intervals: AUC, TPR, differences, stability, verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from memedge.decision.rule import Rule
from memedge.engine.arrays import Bools, Floats
from memedge.metrics import Array, allowed, auc, delong, percentiles, resample, roc, tpr

Pair = tuple[Floats, Floats]  # scores of memorized and of clean prompts
ANISOTROPY = "anisotropy"  # the detector whose score a rule is
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
class Figure:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DetectorFigures:
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
class DetectorDifference:
    """A detector's figures minus those of the first one, of the same prompts; p is DeLong's for the AUC."""

    detector: str
    against: str
    draws: int
    auc: Figure
    p: float | None
    tpr_1: Figure


@dataclass(frozen=True)
class DetectorStability:
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
class RocCurve:
    """A ROC curve: the highest TPR at an FPR of at most fpr[k], with its 95 % interval."""

    detector: str
    fpr: list[float]
    tpr: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Confusion:
    """What the calibrated threshold says of the prompts, with n draws."""

    draws: int
    threshold: float
    found: int
    memorized: int
    false_alarms: int
    clean: int


@dataclass(frozen=True)
class ScreenFigures:
    """What the calibrated screen does with the prompts. Intervals are exact binomial ones (Clopper and Pearson).

    Attributes:
        decided_prompts, clean, decided: how many of the clean prompts it passes, and their share.
        missed_prompts, found, missed: how many of the memorized prompts that the full rule finds it passes, and their
            share; None if the rule finds none.
        alpha: the share that the calibration promises at most.
        passes: what it takes per prompt, in UNet evaluations.
    """

    decided_prompts: int
    clean: int
    decided: Figure
    missed_prompts: int
    found: int
    missed: Figure | None
    alpha: float
    passes: float


@dataclass(frozen=True)
class Findings:
    """All figures.

    Attributes:
        draws: the number of draws that curves, verdicts and prompts' scores are of.
        verdicts: of the anisotropy, if it was evaluated and has a calibrated threshold.
    """

    draws: int
    lines: list[DetectorFigures]
    differences: list[DetectorDifference]
    stability: list[DetectorStability]
    rocs: list[RocCurve]
    verdicts: Confusion | None


@dataclass(frozen=True)
class EvaluationRun:
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
class EvaluatedDetector:
    """A detector: its formula, its UNet evaluations and its seconds per prompt and draw."""

    name: str
    formula: str
    passes: float
    seconds: float


@dataclass(frozen=True)
class ScoredPrompt:
    """A prompt, its label, and its score by each detector on each draw.

    Alignments are cosines as measured, as `Detector.detect` gives them, whether a high or a low one means memorized.
    """

    prompt: str
    memorized: bool
    truncated: bool
    scores: dict[str, list[float]]

    def score(self, detector: str, draws: int) -> float:
        """Return the score with n draws: the mean over the first n."""
        return float(np.mean(self.scores[detector][:draws]))


@dataclass(frozen=True)
class Evaluation:
    """All that was found, and what it holds for.

    Attributes:
        cautions: sentences that a reader has to know.
        rule: the engine's.
        terms: the detectors that the rule's two weights belong to.
        lower: the alignments of which a low value means memorized; of all other detectors a high one does.
        screen: what the engine's screen does, if there are verdicts on the engine's own noise, and it has one.
    """

    run: EvaluationRun
    memorized: PromptFile
    clean: PromptFile
    cautions: list[str]
    rule: Rule
    terms: tuple[str, str]
    detectors: list[EvaluatedDetector]
    findings: Findings
    prompts: list[ScoredPrompt]
    lower: tuple[str, ...] = ()
    screen: ScreenFigures | None = None

    def sign(self, detector: str) -> float:
        """Return 1 if a high value of a detector means memorized, and −1 if a low one does."""
        return -1.0 if detector in self.lower else 1.0

    @property
    def has_terms(self) -> bool:
        """Whether both terms were measured."""
        return set(self.terms) <= self.prompts[0].scores.keys()


TPRS: tuple[tuple[int, Any], ...] = ((1, "strict"), (1, "nearest"), (3, "strict"), (3, "nearest"))


def find(detectors: Sequence[Measured], memorized: Bools, draws: Sequence[int], main: int, rule: Rule) -> Findings:
    """Compute every figure of every detector.

    Args:
        detectors: with at least max(draws) draws each; the first is what the others are compared with.
        memorized: bool [B], the label of each prompt; at least two of each kind.
        draws: the numbers of draws to give figures for.
        main: that of the curves and verdicts.
        rule: whose threshold holds for the anisotropy, if there is one.
    """
    pairs = {(n, one.name): _split(one.score(n), memorized) for n in draws for one in detectors}
    counts = _counts(int((~memorized).sum()))
    figures: dict[tuple[int, str], list[Floats]] = {key: [] for key in pairs}
    curves: dict[str, list[Floats]] = {one.name: [] for one in detectors}
    for some, others in resample(int(memorized.sum()), int((~memorized).sum())):
        for (n, name), (positive, negative) in pairs.items():
            resampled = positive[some], negative[others]
            figures[n, name].append(auc_and_tprs(*resampled))
            if n == main:
                curves[name].append(roc(*resampled, counts))
    spreads = {key: np.concatenate(parts, axis=1) for key, parts in figures.items()}
    first = detectors[0].name
    verdicts = None
    for one in detectors:
        if rule.threshold is not None and one.name == ANISOTROPY:
            verdicts = _verdicts(one.score(main), memorized, main, rule.threshold)
    return Findings(
        draws=main,
        lines=[_line(one, n, pairs[n, one.name], spreads[n, one.name]) for n in draws for one in detectors],
        differences=[
            _difference(
                (one.name, first), n, (pairs[n, one.name], pairs[n, first]), spreads[n, one.name] - spreads[n, first]
            )
            for n in draws
            for one in detectors[1:]
        ],
        stability=[_stability(one, rule.threshold) for one in detectors if one.values.shape[1] > 1],
        rocs=[_roc(one.name, pairs[main, one.name], counts, np.concatenate(curves[one.name])) for one in detectors],
        verdicts=verdicts,
    )


def _split(score: Floats, memorized: Bools) -> Pair:
    return score[memorized], score[~memorized]


def auc_and_tprs(positive: Array, negative: Array, axis: int = -1) -> Floats:
    """Return the AUC and the TPRS of [..., count], in the first axis; `axis` is the last."""
    return np.stack([auc(positive, negative, axis), *(tpr(positive, negative, *at, axis) for at in TPRS)])


def _figure(value: float, resampled: Array) -> Figure:
    return Figure(float(value), *percentiles(resampled))


def _line(one: Measured, draws: int, pair: Pair, resampled: Floats) -> DetectorFigures:
    area, *tprs = map(_figure, auc_and_tprs(*pair), resampled)
    return DetectorFigures(one.name, draws, one.passes * draws, one.seconds * draws, area, *tprs)


def _difference(names: tuple[str, str], draws: int, pairs: tuple[Pair, Pair], resampled: Floats) -> DetectorDifference:
    """Return the first minus the second; `resampled` is [1 + len(TPRS), R]."""
    value, _, p = delong(*zip(*reversed(pairs), strict=True))
    rates = [float(tpr(*pair, 1)) for pair in pairs]
    return DetectorDifference(
        *names, draws, _figure(value, resampled[0]), p, _figure(rates[0] - rates[1], resampled[1])
    )


def _counts(negatives: int) -> npt.NDArray[np.int64]:
    """Return at how many false positives a ROC curve is drawn: closely where there are few."""
    at = [allowed(percent, negatives) for percent in (1, 3)]
    return np.unique([0, *at, *np.geomspace(1, negatives, POINTS).round().astype(int)])


def _roc(name: str, pair: Pair, counts: npt.NDArray[np.int64], resampled: Floats) -> RocCurve:
    low, high = zip(*(percentiles(column) for column in resampled.T), strict=True)
    return RocCurve(name, (counts / len(pair[1])).tolist(), roc(*pair, counts).tolist(), list(low), list(high))


def _stability(one: Measured, threshold: float | None) -> DetectorStability:
    values = one.values
    draws = values.shape[1]
    ranks = rankdata(values, axis=0)
    spearman = None
    if (ranks.std(axis=0) > 0).all():
        spearman = float(np.corrcoef(ranks, rowvar=False)[np.triu_indices(draws, 1)].mean())
    between = values.mean(axis=1).std(ddof=1)
    flips = None
    if threshold is not None and one.name == ANISOTROPY:
        flips = float(((values >= threshold) != (values.mean(axis=1) >= threshold)[:, None]).mean())
    spread = float(np.sqrt(values.var(axis=1, ddof=1).mean()) / between) if between else None
    return DetectorStability(one.name, draws, spearman, spread, flips)


def _verdicts(score: Floats, memorized: Bools, draws: int, threshold: float) -> Confusion:
    called = score >= threshold
    return Confusion(
        draws=draws,
        threshold=threshold,
        found=int((called & memorized).sum()),
        memorized=int(memorized.sum()),
        false_alarms=int((called & ~memorized).sum()),
        clean=int((~memorized).sum()),
    )
