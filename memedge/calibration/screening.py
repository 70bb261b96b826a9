"""The screen's tap, read-out and cut (docs/methods.md §5). Needs scikit-learn, of the extra `eval`.

Tap and read-out are fitted to clean prompts alone, so that no memorized prompt that sets the cut was seen before. The
read-out is a ridge regression of the score on the logarithms of the changes of a tap's channels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from memedge.calibration.conformal import rank_of
from memedge.calibration.fitting import FOLDS, SEED, share
from memedge.decision.screen import features
from memedge.engine.arrays import Bools, Floats
from memedge.engine.manifest import Screen
from memedge.metrics import auc

FEWEST_MEMORIZED = 10  # that the full rule finds: with fewer, the promise is worse than 9 %
FEWEST_CLEAN = 50
TOP = 0.1  # the share of clean prompts whose high scores a read-out has to see
LEAST_AUC = 0.9
STRENGTHS = tuple(10.0**power for power in range(-2, 6))  # scikit-learn's alpha: a larger one holds weights back more


@dataclass(frozen=True)
class Readout:
    """A linear function of features, [B, C]."""

    weights: Floats
    intercept: float

    @staticmethod
    def fit(values: Floats, scores: Floats) -> "Readout":
        """Fit it to the scores of prompts, float64 [B]."""
        model: Any = make_pipeline(StandardScaler(), RidgeCV(STRENGTHS)).fit(values, scores)
        scaler, ridge = model[0], model[-1]
        weights = ridge.coef_ / scaler.scale_
        return Readout(weights, float(ridge.intercept_ - scaler.mean_ @ weights))

    def __call__(self, values: Floats) -> Floats:
        return np.asarray(values @ self.weights + self.intercept)


def fit_screen(
    changes: Sequence[Floats], scores: Floats, memorized: Bools, threshold: float, alpha: float | None = None
) -> Screen | str:
    """Return a screen, or why there is none, in a sentence.

    Args:
        changes: of each tap, the cheapest first: float64 [B, C], how far its channels are from the empty prompt's.
        scores: float64 [B].
        memorized: bool [B], which prompts are known to be.
        threshold: of the score.
        alpha: the most of the memorized prompts that the full rule finds which may be passed; default: 1 / (m + 1)
            with m of them here, the least that they can promise.
    """
    found, clean = memorized & (scores >= threshold), ~memorized
    m = int(found.sum())
    if m < FEWEST_MEMORIZED:
        return (
            f"The full rule finds {m} of the memorized prompts, and a screen needs {FEWEST_MEMORIZED} to promise "
            "anything: give more of them."
        )
    if clean.sum() < FEWEST_CLEAN:
        return f"A screen is fitted to at least {FEWEST_CLEAN} clean prompts, and there are {clean.sum()}: give more."
    rank = 1 if alpha is None else rank_of(alpha, m)
    if rank < 1:
        return (
            f"With {m} memorized prompts that the full rule finds no screen can promise to pass less than "
            f"{1 / (m + 1):.2g} of such: allow that much, or give more of them."
        )
    best = 0.0
    for tap, values in enumerate((features(one) for one in changes), start=1):
        if not np.isfinite(values).all():
            continue
        quality = _quality(values[clean], scores[clean])
        best = max(best, quality)
        if quality >= LEAST_AUC:
            return _cut(tap, values, scores, found, clean, rank, quality)
    return (
        f"No tap tells the clean prompts with the highest scores from the others (AUC {best:.2f} at best, and "
        f"{LEAST_AUC:g} is asked for): use early='conformal'."
    )


def _cut(
    tap: int, values: Floats, scores: Floats, found: Bools, clean: Bools, rank: int, quality: float
) -> Screen | str:
    readout = Readout.fit(values[clean], scores[clean])
    cut = float(np.sort(readout(values[found]))[rank - 1])
    # How many clean prompts are below the cut, each by what was fitted to others.
    below = 0
    for train, test in _folds(values[clean]):
        other = Readout.fit(values[clean][train], scores[clean][train])
        below += int((other(values[clean][test]) < np.sort(other(values[found]))[rank - 1]).sum())
    if below == 0:
        return "The screen would decide no clean prompt: some memorized ones look like them at its tap."
    m = int(found.sum())
    return Screen(
        tap=tap,
        weights=tuple(readout.weights.tolist()),
        intercept=readout.intercept,
        cut=cut,
        alpha=rank / (m + 1),
        memorized=m,
        auc=quality,
        decided=share(below, int(clean.sum())),
    )


def _quality(values: Floats, scores: Floats) -> float:
    """Return the AUC at which read-outs, each by the other folds' fit, tell the highest scores from the others."""
    readout = np.empty(len(scores))
    for train, test in _folds(values):
        readout[test] = Readout.fit(values[train], scores[train])(values[test])
    high = scores >= np.quantile(scores, 1 - TOP)
    return float(auc(readout[high], readout[~high]))


def _folds(values: Floats) -> Iterator[tuple[Any, Any]]:
    folds: Iterator[tuple[Any, Any]] = KFold(FOLDS, shuffle=True, random_state=SEED).split(values)
    return folds
