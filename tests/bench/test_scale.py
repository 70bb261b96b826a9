"""bench/scale.py at toy size."""

import pytest


@pytest.mark.parametrize("side", [pytest.param("engine", marks=pytest.mark.slow), "files only"])
def test_measure(side):
    from scale import measure

    row = measure(side, 5, 2, 1)
    assert (row["side"], row["prompts"], row["batch"]) == (side, 5, 2)
    assert row["ms_per_prompt"] == pytest.approx(1e3 * row["seconds"] / 5)
    assert row["peak_MB"] > 10


def test_full_scores_100_000_with_the_engine_too():
    from scale import cases

    assert set(cases(full=True)) - set(cases(full=False)) == {("engine", 100_000, 32)}
    assert max(prompts for side, prompts, _ in cases(full=False) if side == "files only") == 100_000
