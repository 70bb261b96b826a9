"""What an engine's differences from the original are measured by, and what is said of them."""

import numpy as np
import pytest

from memedge.engine.errors import ExportError
from memedge.engine.precision import ENGINE
from memedge.export.parity import Excess, Statistics, check, compare, excess

NORMS = np.array([0.15, 0.4, 0.5, 0.6])


def statistics(norm: np.ndarray, alignment: float = 0.0) -> Statistics:
    return Statistics(np.ones((4, 2, 1, 1, 1, 1), np.float32), norm, np.full(4, alignment))


def found(error: np.ndarray, alignment: float = 0.0) -> tuple[tuple[str, ...], Excess]:
    """What is said of an fp16 engine whose norms are off by as much, and the differences as multiples."""
    own, true = statistics(NORMS + error, alignment), statistics(NORMS)
    excesses = excess(own, true, "fp16")
    return check(compare(own, true), excesses, "fp16", False), excesses


def test_floor_is_the_median():
    """An error of one size for every prompt is judged at the median norm, .45, where the quietest prompt's is less."""
    np.testing.assert_allclose(ENGINE["fp16"].of_norms(NORMS), [0.0045, 0.0045, 0.005, 0.006])
    notes, excesses = found(np.full(4, 0.003))
    assert excesses.norm == pytest.approx(0.003 / 0.0045) and excesses.within
    assert notes == (
        "It differs from the original by 2.0e-02 (norm, relative) and 0.0e+00 (alignment): more than 0.01 of the "
        "quietest norms alone.",
    )
    assert found(np.full(4, 0.001))[0] == ()


@pytest.mark.parametrize(
    ("error", "alignment"),
    [(np.full(4, 0.005), 0.0), (np.array([0, 0, 0, 0.0061]), 0.0), (np.zeros(4), 0.011), (np.zeros(4), np.nan)],
)
def test_beyond(error, alignment):
    with pytest.raises(ExportError, match=r"differs from the original by .*: nothing was written; export in fp32, or "):
        found(error, alignment)


def test_infinite_is_not_accepted():
    silent, loud = statistics(np.zeros(4)), statistics(NORMS)
    for own, true in ((loud, silent), (statistics(NORMS, np.nan), loud)):
        with pytest.raises(ExportError, match=r"nothing was written; report this checkpoint\.$"):
            check(compare(own, true), excess(own, true, "fp32"), "fp32", True)


def test_prompts_that_change_nothing():
    """0 is exactly 0: no quotient of it."""
    silent = statistics(np.zeros(4))
    parity, excesses = compare(silent, silent), excess(silent, silent, "fp32")
    assert parity.norm_relative == 0 and excesses == Excess(0.0, 0.0)
    assert check(parity, excesses, "fp32", False) == ()


def test_int8_is_reported_only():
    own, true = statistics(2 * NORMS, 0.5), statistics(NORMS)
    assert excess(own, true, "int8") == Excess(0.0, 0.0)
    assert check(compare(own, true), Excess(0.0, 0.0), "int8", False) == ()
