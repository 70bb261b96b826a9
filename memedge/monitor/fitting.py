"""Which statistic to look at, for how many steps, and from where on an image counts as memorized (docs/methods.md §7).

Needs scikit-learn and SciPy, of the extra `eval`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedKFold

from memedge.calibration.conformal import rank_of
from memedge.decision.operating_point import middle_of_gap
from memedge.engine.arrays import Bools, Floats
from memedge.engine.errors import InputError
from memedge.engine.manifest import Estimate
from memedge.metrics import auc, binomial, delong
from memedge.monitor.calibration import GenerationSettings, MonitorCalibration
from memedge.monitor.statistics import STATISTICS, Statistic, reference, running_maximum, values

FEWEST_MEMORIZED = 5
FOLDS = 5


class Traces(NamedTuple):
    """What was seen of N generations: norms [K, N], changes and moves [K − 1, N], float64."""

    norms: Floats
    changes: Floats
    moves: Floats

    def of(self, which: Bools) -> "Traces":
        """Return those of some generations."""
        return Traces(*(array[:, which] for array in self))


class MonitorFit(NamedTuple):
    """A statistic, its mean and deviation over clean images at each look, and the cut."""

    statistic: Statistic
    mean: Floats
    deviation: Floats
    cut: float

    def memorized(self, traces: Traces) -> Bools:
        """Return which of the generations reach the cut at any look, bool [N]."""
        looks = len(self.mean)
        of = values(self.statistic, *traces)[:looks]
        found: Bools = running_maximum(self.statistic, of, self.mean, self.deviation)[-1] >= self.cut
        return found


def check_counts(memorized: int, clean: int, target_fpr: float) -> None:
    """Raise InputError for a rate that is none, or too few prompts of either kind."""
    if not 0 < target_fpr < 1:
        raise InputError(f"target_fpr is {target_fpr!r}: give a rate between 0 and 1.")
    if rank_of(target_fpr, clean) < 1:
        raise InputError(
            f"{clean} clean prompts cannot bound false alarms at {target_fpr:g}: give at least "
            f"{math.ceil(1 / target_fpr) - 1}, or a larger target_fpr."
        )
    if memorized < FEWEST_MEMORIZED:
        raise InputError(
            f"There are {memorized} memorized prompts, which is too few to choose by: give at least {FEWEST_MEMORIZED}."
        )


def fit(traces: Traces, memorized: Bools, target_fpr: float) -> MonitorFit:
    """Choose and fit; the cut is one on the maximum over all looks, which the share of false alarms is of.

    The statistic and the number of looks are those whose maximum tells memorized from clean best (AUC), or the earliest
    that is no worse by more than the standard error of the difference (DeLong's). The cut is a conformal one: with m
    clean images, the k-th highest maximum is below it and the (k − 1)-th above, k = ⌊target_fpr (m + 1)⌋.

    Args:
        traces: of N generations.
        memorized: which are of memorized prompts, bool [N].
        target_fpr: the share of clean images that may be called memorized.

    Raises:
        InputError: images without guidance, or whose steps are all alike.
    """
    tried = list(_tried(traces, memorized))
    pairs = [(maxima[memorized], maxima[~memorized]) for _, maxima in tried]
    areas = [float(auc(*pair)) for pair in pairs]
    best = int(np.argmax(areas))
    order = sorted(range(len(tried)), key=lambda place: (len(tried[place][0].mean), -areas[place]))
    chosen = next(place for place in order if place == best or _as_good(pairs[place], pairs[best]))
    found, maxima = tried[chosen]
    highest = np.sort(maxima[~memorized])[::-1]
    rank = max(rank_of(target_fpr, len(highest)), 1)  # the folds of a cross-validation have fewer
    return found._replace(cut=middle_of_gap(float(highest[rank - 1]), maxima))


def cross_validate(traces: Traces, memorized: Bools, target_fpr: float) -> tuple[Estimate, Estimate]:
    """Return the shares of memorized and of clean images that are called memorized, by fits to the other folds.

    With exact binomial 95 % intervals (Clopper and Pearson). All is chosen and fitted anew for every fold.
    """
    called = np.empty(len(memorized), dtype=np.bool_)
    folds = StratifiedKFold(min(FOLDS, int(memorized.sum())), shuffle=True, random_state=0)
    for train, test in folds.split(memorized, memorized):
        some, others = (np.isin(np.arange(len(memorized)), which) for which in (train, test))
        called[others] = fit(traces.of(some), memorized[some], target_fpr).memorized(traces.of(others))
    shares = [binomial(int(called[of].sum()), int(of.sum())) for of in (memorized, ~memorized)]
    return Estimate(*shares[0]), Estimate(*shares[1])


def calibration_of(
    traces: Traces,
    memorized: Bools,
    target_fpr: float,
    settings: GenerationSettings,
    timesteps: Sequence[float],
) -> MonitorCalibration:
    """Return the calibration, fitted and cross-validated, for generations like these; it names the arguments."""
    found = fit(traces, memorized, target_fpr)
    true, false = cross_validate(traces, memorized, target_fpr)
    return MonitorCalibration(
        settings=settings,
        timesteps=tuple(map(float, timesteps)),
        statistic=found.statistic,
        looks=len(found.mean),
        mean=tuple(map(float, found.mean)),
        deviation=tuple(map(float, found.deviation)),
        cut=found.cut,
        target_fpr=target_fpr,
        clean=int((~memorized).sum()),
        memorized=int(memorized.sum()),
        found=true,
        false_alarms=false,
    )


def _tried(traces: Traces, memorized: Bools) -> Iterator[tuple[MonitorFit, Floats]]:
    """Yield each statistic with each number of looks, without a cut, and its running maxima [N]."""
    for statistic in STATISTICS:
        of = values(statistic, *traces)
        known = ~np.isnan(of[:, 0])
        clean = of[known][:, ~memorized]
        if not np.isfinite(of[known]).all() or (clean.min(axis=1) == clean.max(axis=1)).any():
            raise InputError(
                "Some images have no guidance, or all the same one: leave the empty prompt out, and see whether the "
                "pipeline guides."
            )
        mean, deviation = reference(of, ~memorized)
        highest = running_maximum(statistic, of, mean, deviation)
        for looks in range(1 if known[0] else 2, len(of) + 1):
            yield MonitorFit(statistic, mean[:looks], deviation[:looks], math.inf), highest[looks - 1]


def _as_good(pair: tuple[Floats, Floats], best: tuple[Floats, Floats]) -> bool:
    """Return whether an AUC is no lower than the best by more than the difference's standard error."""
    lower, error, _ = delong((pair[0], best[0]), (pair[1], best[1]))
    return lower <= error
