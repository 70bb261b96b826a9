"""γ, threshold and their figures, on made-up statistics whose best rule is known."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta
from sklearn.metrics import roc_auc_score

from memedge.calibration.fitting import cross_validate, fit, fit_direction, fit_threshold, out_of_fold, share
from memedge.engine.errors import InputError


def made_up(memorized: int, clean: int, seed: int = 0, apart: float = 1.0):
    """Norm and alignment of both kinds, normal with one covariance, and which are memorized."""
    generator = np.random.default_rng(seed)
    covariance = np.array([[0.5, 0.04], [0.04, 0.01]])
    means = [1.0, 0.0] + apart * np.array([1.0, -0.1]), [1.0, 0.0]
    parts = [generator.multivariate_normal(m, covariance, n) for m, n in zip(means, (memorized, clean), strict=True)]
    return np.concatenate(parts), np.arange(memorized + clean) < memorized


def test_the_direction_is_the_best_one():
    """Of two normal distributions with one covariance Σ the best direction is Σ⁻¹ (μ₁ − μ₀), and even odds are midway.

    However many there are of each.
    """
    best = np.linalg.solve([[0.5, 0.04], [0.04, 0.01]], [1.0, -0.1])
    for sizes in ((3000, 3000), (600, 6000)):
        direction = fit_direction(*made_up(*sizes))
        assert direction.gamma[0] == 1
        assert direction.gamma[1] == pytest.approx(best[1] / best[0], rel=0.1)
        assert direction.distance(np.array([[1.5, -0.05]]))[0] == pytest.approx(0, abs=0.1)


def test_the_direction_does_not_depend_on_units():
    features, memorized = made_up(30, 100)
    plain, scaled = fit_direction(features, memorized), fit_direction(features * [50.0, 0.01], memorized)
    np.testing.assert_allclose(scaled.gamma[1], plain.gamma[1] * 50 / 0.01, rtol=1e-6)
    assert scaled.strength == plain.strength
    np.testing.assert_allclose(scaled.distance(features * [50.0, 0.01]), plain.distance(features), atol=1e-6)


@given(
    clean=st.lists(st.integers(-6, 6), min_size=1, max_size=130),
    memorized=st.lists(st.integers(-6, 6), min_size=1, max_size=10),
    target=st.sampled_from([0.01, 0.03, 0.07, 0.29, 0.5, 0.57, 0.99]) | st.floats(1e-6, 1 - 1e-6),
    step=st.sampled_from([1.0, 0.1, 1e-300, 1e300]),
)
def test_the_threshold_is_strict(clean, memorized, target, step):
    """At most the target share of the clean scores reaches it, and no such threshold finds more of the memorized."""
    clean, memorized = np.array(clean) * step, np.array(memorized) * step
    threshold = fit_threshold(np.r_[memorized, clean], np.arange(len(memorized) + len(clean)) < len(memorized), target)
    allowed = max(k for k in range(len(clean)) if k / len(clean) <= target)
    assert Fraction(allowed + 1, len(clean)) > Fraction(target) * (1 - Fraction(1, 10**12))
    assert (clean >= threshold).sum() <= allowed
    candidates = [t for t in (*memorized, *clean, np.inf) if (clean >= t).sum() <= allowed]
    assert (memorized >= threshold).mean() == max((memorized >= t).mean() for t in candidates)


def test_the_threshold_is_in_the_middle_of_the_gap():
    score = np.r_[9.0, 7.0, 4.0, np.arange(-99.0, 1.0)]
    memorized = np.arange(len(score)) < 3
    assert fit_threshold(score, memorized, 0.001) == 2.0  # between 0 and 4: none passes
    assert fit_threshold(score, memorized, 0.01) == -0.5  # one of 100 may
    assert fit_threshold(score - 20, memorized, 0.001) == -18.0
    assert fit_threshold(-score, memorized, 0.001) == np.nextafter(99.0, 100)  # nothing is above


def test_figures_are_those_of_prompts_left_out():
    """Moving one prompt moves the fits of other folds only; AUC, TPR and FPR are of these distances and verdicts."""
    features, memorized = made_up(40, 110)
    distance, verdict = out_of_fold(features, memorized, 0.05)
    moved = features.copy()
    moved[100] += [50.0, -5.0]
    again, found = out_of_fold(moved, memorized, 0.001)
    same = distance == again
    assert not same[100]
    assert same.sum() == 150 / 5 - 1
    assert memorized[same].sum() == 40 / 5
    assert found[100]  # though no clean prompt may reach the threshold: it has no say in its own fold's

    found = cross_validate(features, memorized, 0.05)
    assert found.auc.value == pytest.approx(roc_auc_score(memorized, distance))
    assert found.auc.lowest < found.auc.value < found.auc.highest
    assert found.tpr.value == verdict[memorized].mean()
    assert found.fpr.value == verdict[~memorized].mean()
    assert found.folds == 5


def test_chance_is_called_chance():
    """Where nothing is to be found, what is fitted looks better than chance to itself, and not to the other folds."""
    own, left_out = [], []
    for seed in range(3):
        features, memorized = made_up(20, 40, seed, apart=0.0)
        own.append(roc_auc_score(memorized, fit_direction(features, memorized).distance(features)))
        left_out.append(roc_auc_score(memorized, out_of_fold(features, memorized, 0.05)[0]))
    assert np.mean(own) > 0.55
    assert np.mean(left_out) < 0.5


def test_intervals_are_exact():
    """Clopper and Pearson's, by the quantiles of the beta distribution."""
    assert share(0, 50).lowest == 0
    assert share(0, 50).highest == pytest.approx(1 - 0.025 ** (1 / 50))
    found = share(3, 143)
    assert found.value == 3 / 143
    assert (found.lowest, found.highest) == pytest.approx((beta.ppf(0.025, 3, 141), beta.ppf(0.975, 4, 140)))


def test_few_prompts_and_perfect_ones():
    features, memorized = made_up(5, 60, apart=10.0)
    found = fit(features, memorized, 0.01).cross_validation
    assert (found.auc.value, found.auc.lowest, found.tpr.value, found.fpr.value) == (1, 1, 1, 0)


def test_an_alignment_that_says_nothing():
    features, memorized = made_up(30, 100)
    features[:, 1] = 0.2
    assert fit_direction(features, memorized).gamma[1] == pytest.approx(0, abs=1e-9)


def test_the_alignment_has_a_weight_where_it_pays():
    """Against scikit-learn's AUC of the same distances; of noise nothing is left, and the threshold is the norm's."""
    features, memorized = made_up(60, 200, apart=1.5)
    helps, noise = features.copy(), features.copy()
    generator = np.random.default_rng(3)
    helps[:, 1] = generator.normal(0.1 * memorized, 0.05)
    noise[:, 1] = generator.normal(0, 0.05, len(noise))
    for told, pays in ((helps, True), (noise, False)):
        found = fit(told, memorized, 0.05)
        distance = out_of_fold(told, memorized, 0.05)[0]
        added = roc_auc_score(memorized, distance) - roc_auc_score(memorized, told[:, 0])
        assert found.gain.value == pytest.approx(added) and 0 < found.gain.error < 0.1
        assert found.gain.pays == pays == (found.gamma_alignment != 0)
    assert found.threshold == fit_threshold(noise[:, 0], memorized, 0.05)
    assert found.cross_validation.auc.value == pytest.approx(roc_auc_score(memorized, noise[:, 0]), abs=0.02)


def test_what_cannot_be_fitted():
    features, memorized = made_up(30, 100)
    with pytest.raises(InputError, match="All prompts have the same norm and alignment"):
        fit(np.ones_like(features), memorized, 0.01)
    with pytest.raises(
        InputError, match="a larger norm does not speak for memorized: see whether the two lists are sw"
    ):
        fit(features, ~memorized, 0.01)
    features[:, 0] = 0.1
    with pytest.raises(InputError, match="a larger norm does not speak for memorized"):
        fit(features, memorized, 0.01)
