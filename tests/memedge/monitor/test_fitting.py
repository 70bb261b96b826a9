"""The fit of a monitor's calibration: its promise over all looks, what it chooses, and what it refuses."""

import numpy as np
import pytest

from memedge import InputError
from memedge.metrics import binomial
from memedge.monitor.fitting import Traces, check_counts, cross_validate, fit
from memedge.monitor.statistics import running_maximum, values

STEPS = 12


def generations(count: int, raised: float, seed: int) -> Traces:
    """Clean-like generations whose first three norms are raised; all else tells nothing."""
    generator = np.random.default_rng(seed)
    norms = np.exp(generator.normal(1.0, 0.3, (STEPS, count)))
    norms[:3] *= np.exp(raised)
    changes, moves = (np.exp(generator.normal(size=(STEPS - 1, count))) for _ in range(2))
    return Traces(norms, changes, moves)


def together(*parts: Traces) -> Traces:
    return Traces(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))


def test_the_share_of_false_alarms_is_that_over_all_looks():
    """And that at a single look's cut would be a multiple of it."""
    target, called, single, total = 0.05, 0, 0, 0
    for seed in range(40):
        clean, memorized = generations(199, 0.0, 3 * seed), generations(50, 0.35, 3 * seed + 1)
        found = fit(together(memorized, clean), np.arange(249) < 50, target)
        new = generations(500, 0.0, 3 * seed + 2)
        called += int(found.memorized(new).sum())
        looks = len(found.mean)
        last = running_maximum(found.statistic, values(found.statistic, *clean)[:looks], found.mean, found.deviation)
        own = values(found.statistic, *clean)[0]
        cut = np.quantile((own - found.mean[0]) / found.deviation[0], 1 - target)
        single += int((last[-1] >= cut).sum()) if looks > 1 else 0
        total += 500
    low, high = binomial(called, total)[1:]
    assert low <= target
    assert high >= 0.6 * target  # the promise is kept, and not by calling nothing
    assert single > 1.3 * target * 40 * 199


def test_what_tells_most_is_chosen_and_the_earliest_of_equals():
    memorized, clean = generations(100, 3.0, 0), generations(400, 0.0, 1)
    found = fit(together(memorized, clean), np.arange(500) < 100, 0.01)
    assert (found.statistic, len(found.mean)) in {("norm", 1), ("mean norm", 1)}
    assert found.memorized(generations(100, 3.0, 2)).mean() > 0.99
    true, false = cross_validate(together(memorized, clean), np.arange(500) < 100, 0.01)
    assert true.value > 0.99
    assert false.value < 0.03


@pytest.mark.parametrize(
    ("memorized", "clean", "target_fpr", "message"),
    [
        (20, 50, 0.01, "50 clean prompts cannot bound false alarms at 0.01: give at least 99"),
        (4, 200, 0.01, "give at least 5"),
        (9, 9, 2, "rate between 0 and 1"),
    ],
)
def test_too_few_prompts_are_refused(memorized, clean, target_fpr, message):
    with pytest.raises(InputError, match=message):
        check_counts(memorized, clean, target_fpr)


def test_generations_without_guidance_are_refused():
    traces = together(generations(20, 1.0, 0), generations(200, 0.0, 1))
    traces.norms[:, 30] = 0
    with pytest.raises(InputError, match="no guidance"):
        fit(traces, np.arange(220) < 20, 0.01)
