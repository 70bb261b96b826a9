"""The figures of bench/ against their definitions written out."""

import numpy as np
import pytest


@pytest.fixture
def scores():
    generator = np.random.default_rng(5)
    return generator.normal(1.0, 1.0, 40).round(1), generator.normal(0.0, 1.0, 250).round(1)  # rounded: with ties


def test_auc_is_the_chance_that_a_positive_is_higher(scores):
    from memedge.metrics import auc

    positive, negative = scores
    wins = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
    assert auc(positive, negative) == pytest.approx(wins)


def test_tpr_is_strict(scores):
    """The highest TPR over all thresholds whose FPR is at most 1 %: 2 of 250 negatives may pass, 3 may not."""
    from memedge.metrics import tpr

    positive, negative = scores
    thresholds = [t for t in np.r_[positive, negative, np.inf] if (negative >= t).sum() <= 2]
    assert tpr(positive, negative, 1) == pytest.approx(max((positive >= t).mean() for t in thresholds))


def test_interval_covers(scores):
    from memedge.metrics import auc, interval

    low, high = interval(auc, *scores)
    assert low < auc(*scores) < high
    assert 0.02 < high - low < 0.3


def test_figure_is_a_mean_over_seeds():
    from accuracy import figure

    from memedge.metrics import auc

    generator = np.random.default_rng(2)
    positive, negative = generator.normal(1.0, 1.0, (3, 40)), generator.normal(0.0, 1.0, (3, 250))
    found = figure(auc, positive, negative)
    assert found.by_seed == [pytest.approx(auc(p, n)) for p, n in zip(positive, negative, strict=True)]
    assert found.mean == pytest.approx(np.mean(found.by_seed))
    assert found.interval[0] < found.mean < found.interval[1]
    # Captions are resampled, each with its values of all seeds: the same values twice tell no more than once.
    once, twice = (figure(auc, positive[places], negative[places]).interval for places in ([0], [0, 0]))
    assert twice == pytest.approx(once)
