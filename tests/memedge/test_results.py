"""Scores and verdicts as columns, as a pandas table and as HTML, with values missing and prompts that are markup."""

import json
import sys
from dataclasses import asdict
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest

from memedge import MemedgeError, Scores, Verdict, Verdicts
from memedge.tables import LONGEST, ROWS

HOSTILE = ("<script>alert(1)</script>", "a & b", '"><img src=x onerror=alert(1)>', "$x$ \\(y\\)", "ü " * 200, "")
SCORES = Scores(
    norm=np.array([1.5, 0.0]),
    alignment=np.array([-0.25, 0.0]),
    score=np.array([3.0, 0.0]),
    memorized=np.array([True, False]),
    truncated=np.array([False, True]),
    threshold=2.0,
)
UNCALIBRATED = Scores(SCORES.norm, SCORES.alignment, None, None, SCORES.truncated, None)
COLUMNS = {
    "norm": [1.5, 0.0],
    "alignment": [-0.25, 0.0],
    "score": [3.0, 0.0],
    "memorized": [True, False],
    "truncated": [False, True],
    "threshold": [2.0, 2.0],
}
MISSING = {"score": [None, None], "memorized": [None, None], "threshold": [None, None]}


def verdict(prompt: str, score: float | None = 3.0, memorized: bool | None = True) -> Verdict:
    threshold = None if memorized is None else 2.0
    return Verdict(prompt, memorized, score, 1.5, None, threshold, False, 2, "a < b & c")


class Cells(HTMLParser):
    """The tags of a page, and the text of its cells."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, _attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows:
            self.rows[-1][-1] += data


def test_columns_of_scores():
    assert SCORES.to_dict() == COLUMNS
    assert UNCALIBRATED.to_dict() == COLUMNS | MISSING
    assert json.loads(json.dumps(SCORES.to_dict())) == COLUMNS  # plain values


def test_columns_of_verdicts():
    verdicts = Verdicts([verdict("a"), verdict("b", None, None)])
    assert verdicts.to_dict() == {name: [asdict(v)[name] for v in verdicts] for name in asdict(verdicts[0])}
    assert Verdicts().to_dict()["prompt"] == []


def test_verdicts_are_a_list(detector):
    """Also to what encodes them."""
    verdicts = detector.detect(["a star", "a cat"])
    assert isinstance(verdicts, list) and isinstance(verdicts, Verdicts)
    assert msgspec.json.decode(msgspec.json.encode(verdicts)) == [asdict(v) for v in verdicts]


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (SCORES, [True, False]),
        (UNCALIBRATED, [False, False]),
        (Verdicts([verdict("a"), verdict("b", None, False)]), [True, False]),
        (Verdicts([verdict("a", None, None)]), [False]),
        (Verdicts(), []),
    ],
)
def test_pandas(found, kept):
    """A column has one dtype, whatever it lacks, and the memorized rows can be chosen."""
    table = found.to_pandas()
    assert list(table.columns) == list(found.to_dict())
    assert {str(table[name].dtype) for name in ("norm", "alignment", "score", "threshold")} == {"float64"}
    assert str(table.memorized.dtype) == "boolean"
    assert table.index[table.memorized].tolist() == np.flatnonzero(kept).tolist()
    for name, values in found.to_dict().items():
        assert [None if missing else value for value, missing in zip(table[name], table[name].isna(), strict=True)] == (
            values
        )


def test_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for found in (SCORES, Verdicts()):
        with pytest.raises(MemedgeError, match=r"needs pandas, which is not installed: run .*memedge\[eval\].*to_dict"):
            found.to_pandas()


def test_html_of_verdicts():
    """Prompts are text, whatever they are made of; long ones are cut."""
    page = Cells(Verdicts(map(verdict, HOSTILE))._repr_html_())
    assert page.tags == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    heads, *rows = page.rows
    assert heads == list(asdict(verdict("")))
    cut = [prompt if len(prompt) <= LONGEST else f"{prompt[: LONGEST - 1]}…" for prompt in HOSTILE]
    assert [row[0] for row in rows] == cut
    assert rows[0][1:] == ["yes", "3.0000", "1.5000", "—", "2.0000", "no", "2", "a < b & c", ""]


def test_html_of_scores():
    _, *rows = Cells(UNCALIBRATED._repr_html_()).rows
    assert rows == [["1.5000", "-0.2500", "—", "—", "no", "—"], ["0.0000", "0.0000", "—", "—", "yes", "—"]]


def test_html_is_short():
    many = np.zeros(100_000)
    for found in (Scores(many, many, None, None, many > 0, None), Verdicts([verdict("a")] * 100_000)):
        page = found._repr_html_()
        assert page.count("<tr>") == 1 + ROWS
        assert "<caption>prompts: 100000, the first 20 of them</caption>" in page
    assert "<caption>prompts: 2</caption>" in SCORES._repr_html_()
