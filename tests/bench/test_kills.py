"""bench/kills.py: whatever ends a run, the rows are all there once it was resumed, each once."""

import pytest


@pytest.mark.slow
def test_nothing_is_lost_or_repeated():
    from kills import POINTS, measure

    results = measure(1, 500)
    assert [result["point"] for result in results] == list(POINTS)
    for result in results:
        assert (result["rows lost"], result["rows repeated"], result["left behind"]) == (0, 0, []), result
        assert 0 <= result["of them kept"] <= result["prompts"] == 400
    # A run that had all its results when it was to be interrupted says nothing of that.
    said = {result["point"]: result["said"] for result in results if result["of them kept"] < result["prompts"]}
    assert "make room" in said["full disk"]
    for point in ("Ctrl-C", "SIGTERM of the command"):
        assert point not in said or "what is scored is kept, go on with --resume" in said[point]


def test_what_is_lost_is_seen():
    """The comparison itself: rows that are missing, twice there, changed, or in another order."""
    from kills import compare

    whole = [{"n": n, "prompt": str(n), "memorized": False, "norm": n / 7} for n in range(9)]
    assert compare(whole, whole) == (0, 0)
    assert compare(whole[1:], whole) == (1, 1)
    assert compare([*whole, whole[3]], whole) == (0, 2)
    assert compare([{**row, "norm": 1.0} for row in whole], whole)[0] == 8
    assert compare(list(reversed(whole)), whole) == (0, 1)
