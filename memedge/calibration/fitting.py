"""γ and a threshold from the statistics of prompts whose answer is known, and how good they are on other prompts.

The alignment has a weight only where it pays for its passes: where it adds more to the cross-validated AUC than the
standard error of what it adds. Else the norm alone is the score, and half of the passes are spared.
Logistic regression as in docs/methods.md §1, judged as in §6. Needs scikit-learn, of the extra `eval`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from memedge.decision.operating_point import allowed, middle_of_gap
from memedge.engine.arrays import Bools, Floats
from memedge.engine.errors import InputError
from memedge.engine.manifest import CrossValidation, Estimate, Gain
from memedge.metrics import auc, binomial, delong, interval

FOLDS = 5
SEED = 0
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # scikit-learn's C: a smaller one holds γ back more


@dataclass(frozen=True)
class Direction:
    """A fitted direction in the plane of norm and alignment.

    Attributes:
        weights: float64 [2], of norm and alignment, in log-odds.
        deviation: float64 [2], of both over the prompts; weights · deviation compares the two terms.
        intercept: in log-odds.
        strength: the C that was chosen.
    """

    weights: Floats
    deviation: Floats
    intercept: float
    strength: float

    @property
    def speaks(self) -> bool:
        """Whether a larger norm speaks for memorized, and not a thousand times less than the alignment."""
        effect = self.weights * self.deviation
        return bool(effect[0] > 1e-3 * np.abs(effect).max())

    @property
    def gamma(self) -> Floats:
        """(γ_norm, γ_alignment) with γ_norm = 1.

        Raises:
            InputError: a larger norm does not speak for memorized, or less than a thousandth as much as the alignment.
        """
        if not self.speaks:
            raise InputError(
                "Among these prompts a larger norm does not speak for memorized: see whether the two lists are "
                "swapped or wrong, then run again with --resume, which scores no prompt twice."
            )
        return np.asarray(self.weights / self.weights[0])

    def distance(self, features: Floats) -> Floats:
        """Return how far features [B, 2] lie on the memorized side of even odds, in deviations; float64 [B].

        Unlike log-odds it does not grow with C. So prompts that different folds judged can be compared.
        """
        length = np.linalg.norm(self.weights * self.deviation)
        return np.asarray((features @ self.weights + self.intercept) / length)


@dataclass(frozen=True)
class Fit:
    """score = norm + gamma_alignment · alignment, memorized if ≥ threshold; the C that was chosen; how good it is.

    `scale` is what a score has to rise by for the odds of "memorized" to grow e-fold.
    """

    gamma_alignment: float
    threshold: float
    strength: float
    scale: float
    cross_validation: CrossValidation
    gain: Gain


def fit_best(statistics: Floats, memorized: Bools, target_fpr: float) -> tuple[int, Fit]:
    """Fit the norm with each alignment; return which of them adds most to the norm's AUC, and its fit.

    A pair beside which a larger norm would speak for clean is none to choose. If none pays, the fit is that of the norm
    alone, and which one is returned means nothing: it is the first.

    Args:
        statistics: norm and k alignments of each prompt, float64 [B, 1 + k].
        memorized: which prompts are memorized, bool [B].
        target_fpr: as in `fit`.

    Raises:
        InputError: as `fit`.
    """
    pairs = [statistics[:, [0, place]] for place in range(1, statistics.shape[1])]
    gains = [alignment_gain(pair, memorized, target_fpr) for pair in pairs]
    best = max(range(len(gains)), key=lambda place: (fit_direction(pairs[place], memorized).speaks, gains[place].value))
    chosen = best if gains[best].pays else 0
    return chosen, fit(pairs[chosen], memorized, target_fpr, gains[best])


def fit(features: Floats, memorized: Bools, target_fpr: float, gain: Gain | None = None) -> Fit:
    """Fit γ and the threshold to norm and alignment, float64 [B, 2], of prompts known to be memorized or not, bool [B].

    At least five are memorized, and at least five are not. `gain` is what the alignment adds, if it is known already.

    Raises:
        InputError: all features are the same, or a larger norm does not speak for memorized.
    """
    gain = gain or alignment_gain(features, memorized, target_fpr)
    if not gain.pays:
        features = features * (1.0, 0.0)
    direction = fit_direction(features, memorized)
    gamma = direction.gamma
    threshold = fit_threshold(features @ gamma, memorized, target_fpr)
    validated = cross_validate(features, memorized, target_fpr)
    return Fit(float(gamma[1]), threshold, direction.strength, float(1 / direction.weights[0]), validated, gain)


def alignment_gain(features: Floats, memorized: Bools, target_fpr: float) -> Gain:
    """Return what the alignment adds to the AUC of the norm alone, each prompt judged by the other folds' fit.

    The standard error is DeLong's, of the same prompts' norms and distances (memedge/metrics.py).
    """
    pair = features[:, 0], out_of_fold(features, memorized, target_fpr)[0]
    value, error, _ = delong(tuple(one[memorized] for one in pair), tuple(one[~memorized] for one in pair))  # type: ignore[arg-type]
    return Gain(value, error)


def fit_direction(features: Floats, memorized: Bools) -> Direction:
    """Fit logistic regression to features [B, 2] (norm, alignment), both classes weighing the same.

    C is the one with the least held-out log loss in stratified cross-validation.

    Raises:
        InputError: all features are the same.
    """
    if (features == features[0]).all():
        raise InputError(
            "All prompts have the same norm and alignment, so nothing tells memorized from clean: see whether the "
            "engine was exported from a trained model."
        )
    model = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", solver="newton-cholesky", max_iter=1000)
    )
    search = GridSearchCV(
        model, {"logisticregression__C": STRENGTHS}, scoring=_balanced_likelihood, cv=_folds(memorized)
    )
    best: Any = search.fit(features, memorized).best_estimator_
    scaler, regression = best[0], best[-1]
    weights = regression.coef_[0] / scaler.scale_
    return Direction(
        weights,
        scaler.scale_,
        float(regression.intercept_[0] - scaler.mean_ @ weights),
        float(search.best_params_["logisticregression__C"]),
    )


def fit_threshold(score: Floats, memorized: Bools, target_fpr: float) -> float:
    """Return a threshold that at most a share `target_fpr` of the clean scores reach: the strict convention.

    It is the middle of the gap above the highest clean score that must stay below it.
    """
    clean = np.sort(score[~memorized])[::-1]
    return middle_of_gap(clean[allowed(len(clean), target_fpr)], score)


def out_of_fold(features: Floats, memorized: Bools, target_fpr: float) -> tuple[Floats, Bools]:
    """Return distance and verdict of each prompt, float64 and bool [B], by what was fitted to the other folds.

    C, direction and threshold are fitted anew for every fold.
    """
    distance, verdict = np.empty(len(features)), np.empty(len(features), dtype=bool)
    for train, test in _folds(memorized).split(features, memorized):
        direction = fit_direction(features[train], memorized[train])
        score = features @ direction.weights
        distance[test] = direction.distance(features[test])
        verdict[test] = score[test] >= fit_threshold(score[train], memorized[train], target_fpr)
    return distance, verdict


def cross_validate(features: Floats, memorized: Bools, target_fpr: float) -> CrossValidation:
    """Return AUC, TPR and FPR with 95 % intervals, each prompt judged by what was fitted to the other folds.

    The AUC has a bootstrap interval over the prompts (memedge/metrics.py). TPR and FPR, at thresholds fitted to the
    other folds, have exact binomial intervals (Clopper and Pearson). No interval counts that the fits themselves would
    differ with other prompts.
    """
    distance, verdict = out_of_fold(features, memorized, target_fpr)
    pair = distance[memorized], distance[~memorized]
    low, high = interval(auc, *pair)
    return CrossValidation(
        folds=_folds(memorized).n_splits,
        seed=SEED,
        auc=Estimate(float(auc(*pair)), float(low), float(high)),
        tpr=share(int(verdict[memorized].sum()), int(memorized.sum())),
        fpr=share(int(verdict[~memorized].sum()), int((~memorized).sum())),
    )


def share(count: int, total: int) -> Estimate:
    """Return count / total with its exact binomial 95 % interval (Clopper and Pearson)."""
    return Estimate(*binomial(count, total))


def _folds(memorized: Bools) -> Any:
    """Return the folds: FOLDS, or as many as the smaller class has prompts if these are fewer."""
    return StratifiedKFold(min(FOLDS, int(np.bincount(memorized).min())), shuffle=True, random_state=SEED)


def _balanced_likelihood(model: Any, features: Floats, memorized: Bools) -> float:
    """Return minus the log loss, both classes weighing the same, as they do in the fit."""
    odds = model.decision_function(features)
    loss = np.logaddexp(0, np.where(memorized, -odds, odds))
    return -float(loss[memorized].mean() + loss[~memorized].mean()) / 2
