"""Distributions: bins as NumPy counts all values, no bin on both sides of the threshold, memory that does not grow."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge.scoring.distribution import CHUNK, PRECISION, Distribution

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


def counted(values, threshold=None) -> Distribution:
    made = Distribution(threshold)
    for value in values:
        made.add(float(value))
    return made


def exact(bins, values) -> list[int]:
    """Return what NumPy counts in these bins, the outermost ones open where the bins say so."""
    edges = np.array(bins.edges)
    edges[0], edges[-1] = -np.inf, np.inf  # what is beyond belongs there; else there is nothing beyond
    return np.histogram(values, edges)[0].tolist()


@pytest.mark.parametrize("threshold", [None, 3.0, -1000.0, 1000.0])
def test_bins_of_values_that_are_kept_exactly(threshold):
    """Sixteenths need no rounding: each bin has what NumPy counts in it."""
    values = np.round(16 * np.random.default_rng(1).normal(2, 1.5, 3 * CHUNK + 5)) / 16
    for most in (1, 14, 40):
        bins = counted(values, threshold).bins(most)
        assert bins.rows == exact(bins, values)
        assert len(bins.rows) <= most + 2
        assert bins.beyond == (values.min() < bins.edges[0], values.max() >= bins.edges[-1])


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=60), st.one_of(st.none(), NUMBERS), st.integers(1, 40))
def test_bins_of_any_values(values, threshold, most):
    """Below every edge lies what NumPy counts there, but for values within the promised precision of it.

    Below the threshold exactly that.
    """
    values = np.array(values)
    bins = counted(values, threshold).bins(most)
    assert sum(bins.rows) == len(values)
    assert len(bins.rows) <= most + 2
    totals = np.cumsum(bins.rows)
    for edge, total in zip(bins.edges[1:-1], totals, strict=False):
        near = 1.01 * PRECISION * abs(edge) + 1e-37
        assert np.sum(values < edge - near) <= total <= np.sum(values < edge + near)
    if threshold is None:
        assert bins.split is None
    else:
        assert sum(bins.rows[: bins.split]) == np.sum(values < threshold)
        if 0 < bins.split < len(bins.rows):
            assert bins.edges[bins.split] == threshold


def test_bins_have_one_width():
    bins = counted(np.random.default_rng(2).normal(size=5000), 0.731).bins(14)
    widths = [high - low for low, high in pairwise(bins.edges)]
    assert widths == pytest.approx([widths[0]] * len(widths))
    assert 8 <= len(widths) <= 16


def test_equal_values_have_one_bin():
    for value in (0.0, -2.5, 1e-9, 1234.56789):
        bins = counted([value] * 3).bins(14)
        assert (bins.edges, bins.rows, bins.beyond) == ([value, value], [3], (False, False))
    assert counted([2.0], 2.0).bins(14).split == 0
    assert counted([2.0], 2.1).bins(14).split == 1
    assert counted([2.0]).bins(14).words(0) == "2"


def test_values_far_from_all_others_take_no_room():
    values = [*np.round(16 * np.random.default_rng(3).normal(2, 0.5, 5000)) / 16, 1e9, -1e30]
    bins = counted(values, 4.0).bins(14)
    assert bins.beyond == (True, True)
    assert -10 < bins.edges[0] < bins.edges[-1] < 14
    assert bins.rows == exact(bins, values)
    assert bins.words(0).startswith("below ")
    assert bins.words(len(bins.rows) - 1) == f"from {bins.edges[-2]:.1f} on"


def test_a_single_value_below_the_threshold_is_seen():
    values = [*np.linspace(10, 11, 1000), 1.0]
    bins = counted(values, 5.0).bins(14)
    assert sum(bins.rows[: bins.split]) == 1


def test_words_tell_edges_apart():
    for scale in (1e-6, 1, 1e6):
        bins = counted(scale * np.random.default_rng(4).normal(1, 0.2, 500)).bins(14)
        words = [bins.words(place) for place in range(len(bins.rows))]
        assert len(set(words)) == len(words)
        assert all(len(word) < 40 for word in words)


def test_beyond_single_precision():
    """No warning, and nothing lost."""
    made = counted([1e300, -1e300, 0.0, 1e-300])
    assert sum(made.bins(14).rows) == 4
    assert (made.lowest, made.highest) == (-1e300, 1e300)


@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=60), st.sampled_from([0.005, 0.5, 0.99, 1.0]))
def test_quantiles(values, share):
    expected = np.quantile(values, share, method="inverted_cdf")
    assert counted(values).quantile(share) == pytest.approx(expected, rel=1.01 * PRECISION, abs=1e-37)


def test_memory_does_not_grow():
    """With the rows. What a distribution takes is set when it is made."""
    values = np.random.default_rng(5).lognormal(0, 3, 20 * CHUNK).tolist()
    made = Distribution(1.0)
    tracemalloc.start()
    try:
        for value in values:
            made.add(value)
        made.bins(14)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6e6
