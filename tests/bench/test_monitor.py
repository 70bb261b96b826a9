"""bench/monitor.py: its overlaps, its table, and what it keeps."""

import numpy as np
import pytest

from memedge.embedded import captions
from memedge.monitor.fitting import Traces

STEPS = 20


def test_overlaps_are_intersections_over_unions():
    from monitor import SHARES, overlaps

    generator = np.random.default_rng(0)
    maps, cover = generator.random((3, 6, 5)), generator.random((3, 6, 5)) > 0.6
    found = overlaps(maps, cover)
    for place in range(3):
        for column, share in enumerate(SHARES):
            cut = {(y, x) for y, x in np.ndindex(6, 5) if maps[place, y, x] >= share * maps[place].max()}
            drawn = {(y, x) for y, x in np.ndindex(6, 5) if cover[place, y, x]}
            assert found[place, column] == pytest.approx(len(cut & drawn) / len(cut | drawn))


def test_the_table_is_of_what_was_seen():
    """Changes that tell the memorized captions at the fourth step alone: the rows say so."""
    from monitor import AFTER, Seen, Table1

    of = [one for one in captions() if one.group in ("memorized", "frequent", "seen")][::40]
    memorized = np.array([one.memorized for one in of])
    generator = np.random.default_rng(0)
    norms, changes, moves = (np.exp(generator.normal(size=(count, len(of)))) for count in (STEPS, STEPS - 1, STEPS - 1))
    changes[2] *= np.exp(9.0 * memorized)
    table = Table1(Seen(Traces(norms, changes, moves), np.empty(0), np.empty(0)), of)
    rows = {(row.detector, row.step): row for row in table.rows()}
    assert {step for name, step in rows if name == "norm"} == set(AFTER)
    assert rows["change", 4].auc[0] > 0.99
    assert rows["change, highest so far", 6].auc[0] > 0.9
    assert 0.2 < rows["change", 3].auc[0] < 0.8
    assert rows["score before, and change", 4].auc[0] > 0.99
    positive, negative = table.split(np.arange(len(of)))
    held_out = [one.split == "held-out" for one in of]
    assert len(positive) == sum(memorized & held_out)
    assert len(negative) == sum(one.clean and one.split == "held-out" for one in of)


def test_what_was_kept_is_of_the_same_captions(tmp_path):
    from monitor import Seen, kept

    seen = Seen(Traces(*(np.ones((2, 3)) for _ in range(3))), np.ones((3, 1)), np.ones((2, 3)))
    np.savez(
        tmp_path / "seen.npz", prompts=["a", "b", "c"], latents=seen.latents, maps=seen.maps, **seen.traces._asdict()
    )
    assert np.array_equal(kept(tmp_path / "seen.npz", ["a", "b", "c"]).traces, seen.traces)
    with pytest.raises(SystemExit, match="of other captions"):
        kept(tmp_path / "seen.npz", ["a", "b"])
