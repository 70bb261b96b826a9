"""bench/scale.py at toy size."""

import pytest


@pytest.mark.parametrize("side", ["no model", "no model, 80 % repeats", "no model, parquet", "4 shards, merged"])
def test_rows_without_a_model(side):
    from scale import measure

    row = measure(side, 50, 1)
    assert (row["side"], row["rows"]) == (side, 50)
    assert row["seconds"] > 0 and row["rows/s"] == pytest.approx(50 / row["seconds"])
    assert row["peak_MB"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("side", ["engine", "2 processes"])
def test_rows_with_the_engine(side):
    from scale import measure

    assert measure(side, 20, 1)["rows"] == 20


def test_cases_are_of_both_sizes():
    from scale import cases

    small, full = cases(False), cases(True)
    assert max(rows for _, rows in small) == 100_000 and max(rows for _, rows in full) == 10_000_000
    assert {side for side, _ in small} == {side for side, _ in full}
