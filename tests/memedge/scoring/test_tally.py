"""Tallies: counts and lists as a plain look at all rows gives them, whatever order they come in."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge.scoring.score_files import ScoreRow
from memedge.scoring.tally import LISTED, Tally, _Prompts


def made(rows, threshold=2.0, kind="score") -> Tally:
    tally = Tally(threshold, kind)
    for number, row in enumerate(rows, start=1):
        tally.add(row, number)
    return tally


def some(count=5000, prompts=700) -> list[ScoreRow]:
    """Return rows of prompts that come again and again, each with its score; every seventh is truncated."""
    generator = np.random.default_rng(11)
    scores = np.round(generator.normal(1.5, 0.6, prompts), 2)  # many are equal
    chosen = generator.integers(prompts, size=count)
    return [ScoreRow(f"p{i}", 1.0, 0.0, s := float(scores[i]), s >= 2.0, bool(i % 7 == 0)) for i in chosen]


def plain(rows, key) -> list[tuple[str, float, int, int]]:
    """Return the list that is promised: by sorting all rows."""
    first, count = {}, {}
    for number, row in enumerate(rows, start=1):
        first.setdefault(row.prompt, (number, row))
        count[row.prompt] = count.get(row.prompt, 0) + 1
    ordered = sorted(first.values(), key=lambda one: (-key(one[1]), one[0]))
    return [(row.prompt, row.score, number, count[row.prompt]) for number, row in ordered[:LISTED]]


def listed(prompts) -> list[tuple[str, float, int, int]]:
    return [(one.row.prompt, one.row.score, one.number, one.rows) for one in prompts]


@pytest.mark.parametrize("order", ["as they come", "rising", "falling"])
def test_lists_and_counts_are_exact(order):
    rows = some()
    if order != "as they come":
        rows.sort(key=lambda row: row.score, reverse=order == "falling")
    tally = made(rows)
    assert tally.rows == len(rows)
    assert tally.memorized == sum(row.memorized for row in rows)
    assert tally.truncated == sum(row.truncated for row in rows)
    assert listed(tally.suspicious) == plain(rows, lambda row: row.score)
    over, under = [row.score >= 2.0 for row in rows], [row.score < 2.0 for row in rows]
    for shown, side in ((tally.above, over), (tally.below, under)):
        expected = plain(
            [row if chosen else row._replace(prompt="", score=-1e9) for row, chosen in zip(rows, side, strict=True)],
            lambda row: -abs(row.score - 2.0),
        )
        assert listed(shown) == [one for one in expected if one[0]]
    cut = [row if row.truncated else row._replace(prompt="", score=-1e9) for row in rows]
    assert listed(tally.truncated_highest) == [one for one in plain(cut, lambda row: row.score) if one[0]]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 4))))
def test_prompts_with_several_scores(pairs):
    """Each is listed with its highest, and the rows of that one are counted: all of them."""
    short = _Prompts(3)
    for number, (prompt, key) in enumerate(pairs, start=1):
        if key >= short.floor:
            short.offer(key, ScoreRow(prompt, float(key), 0.0, None, None, False), number)
    best = {prompt: max(key for other, key in pairs if other == prompt) for prompt, _ in pairs}
    ordered = sorted(best.items(), key=lambda one: (-one[1], pairs.index(one)))[:3]
    expected = [(prompt, key, pairs.index((prompt, key)) + 1, pairs.count((prompt, key))) for prompt, key in ordered]
    assert [(one.row.prompt, one.row.norm, one.number, one.rows) for one in short.listed()] == expected


def test_one_prompt_a_million_times_is_listed_once():
    row = ScoreRow("the same", 3.0, 0.0, 3.0, True, True)
    tally = made([row] * 1000)
    for shown in (tally.suspicious, tally.above, tally.truncated_highest):
        assert listed(shown) == [("the same", 3.0, 1, 1000)]
    assert tally.below == []
    assert tally.distribution.bins(14).rows == [1000]


def test_without_scores_the_norm_is_tallied():
    rows = [ScoreRow(f"p{i}", float(i), 0.1, None, None, False) for i in range(90)]
    tally = made(rows, None, "norm")
    assert tally.memorized is None
    assert [one.row.norm for one in tally.suspicious] == list(range(89, 89 - LISTED, -1))
    assert (tally.above, tally.below) == ([], [])
    assert (tally.distribution.lowest, tally.distribution.highest) == (0, 89)


def test_published_weights_give_scores_and_no_verdicts():
    tally = made([ScoreRow("a", 9.0, 0.1, 1.0, None, False), ScoreRow("b", 1.0, 0.1, 2.0, None, False)], None)
    assert tally.memorized is None
    assert [one.row.prompt for one in tally.suspicious] == ["b", "a"]


def test_the_empty_prompt_is_not_memorized():
    """Whatever the threshold: it stands where its score is, with its verdict."""
    tally = made([ScoreRow("", 0.0, 0.0, 0.0, False, False)], threshold=-1.0)
    assert tally.memorized == 0
    assert [one.row.memorized for one in tally.above] == [False]


def test_rows_without_a_score_are_counted_alone():
    """In no distribution and in no list: nothing says where they would stand."""
    early = [
        ScoreRow("a", None, None, None, False, True, 0.0068, "screened"),
        ScoreRow("b", 9.0, None, None, True, False),
    ]
    rows = [early[0], ScoreRow("c", 1.0, 0.0, 3.0, True, False), *early, ScoreRow("d", 1.0, 0.0, 1.0, False, False)]
    tally = made(rows)
    assert (tally.rows, tally.valued, tally.early, tally.early_memorized) == (5, 2, 3, 1)
    assert (tally.memorized, tally.truncated) == (2, 2)
    assert [one.row.prompt for one in tally.suspicious] == ["c", "d"]
    assert ([one.row.prompt for one in tally.above], tally.truncated_highest) == (["c"], [])
    assert (tally.distribution.lowest, tally.distribution.highest) == (1.0, 3.0)


def test_nothing():
    tally = made([])
    assert (tally.rows, tally.memorized, tally.truncated, tally.suspicious) == (0, None, 0, [])


def test_memory_does_not_grow():
    """Also where every row is a candidate: what is put out is forgotten."""
    tally = Tally(1e6, "score")

    def add(rows: range) -> int:
        tracemalloc.start()
        for i in rows:
            tally.add(ScoreRow(f"{i}" + 1000 * "x", 1.0, 0.0, float(i), False, True), i)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    add(range(1000))
    assert add(range(1000, 31000)) < 2e6
