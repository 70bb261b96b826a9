"""What we read from outside, changed at random: each input is read, or refused in one sentence (support/fuzzing.py)."""

import time
from itertools import count, takewhile

import pytest
from fuzzing import TARGETS, run

SOME = 150  # inputs of each target in the default suite
SECONDS = 12  # of each target in the slow one: about a minute for all


@pytest.mark.parametrize("target", TARGETS)
def test_some(target):
    counts = run(target, iter(range(SOME)))
    assert counts[0] == SOME and counts[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_for_a_while(target):
    """Inputs that no run before had: an error names its seed."""
    end, first = time.monotonic() + SECONDS, time.time_ns()
    assert run(target, takewhile(lambda _: time.monotonic() < end, count(first)))[0] > 0
