"""The report of a scoring run: what it says, that nothing in it runs or loads, and how a browser shows it."""

import base64
import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from browser import browser
from elements import Elements
from evaluations import HOSTILE

import memedge
from memedge.engine.errors import InputError
from memedge.plain import plain
from memedge.scoring.bars import bars
from memedge.scoring.distribution import Distribution
from memedge.scoring.report import LONGEST, About, check_report, report, write_report
from memedge.scoring.score_files import ScoreRow
from memedge.scoring.tally import LISTED, Tally

ABOUT = About(
    engine="<engine>",
    checkpoint="<b>checkpoint</b>",
    fingerprint="f" * 64,
    key="cpu-fp32",
    rule="2 · norm − 6.1 · alignment, γ calibrated; memorized from 2 on",
    inputs=["a & b <i>.csv", "c.parquet"],
    output="scores.csv",
    command="memedge score 'a & b <i>.csv' c.parquet -o scores.csv",
    date="2026-11-22T12:00:00+00:00",
)
HIDDEN = "left\u202eright\x1b[31m\nnext"


def tally(threshold: float | None = 2.0, kind="score", count: int = 3000) -> Tally:
    """Return a tally of hostile prompts with high scores, and of others."""
    scores = np.random.default_rng(5).normal(1, 0.4, count).tolist()
    texts = [*HOSTILE, HIDDEN, "", *(f"prompt {i}" for i in range(count))][:count]
    scores[: len(HOSTILE) + 1] = [4.0 + i for i in range(len(HOSTILE) + 1)][:count]
    made = Tally(threshold, kind)
    for number, (text, score) in enumerate(zip(texts, scores, strict=True), start=1):
        verdict = None if threshold is None else score >= threshold
        made.add(ScoreRow(text, score / 2, -0.1, None if kind == "norm" else score, verdict, len(text) > 300), number)
    return made


@pytest.fixture(scope="module")
def text():
    return report(tally(), ABOUT)


def test_nothing_runs_or_loads(text):
    elements = Elements(text)
    assert not elements.named("script", "link", "img", "iframe", "a", "b", "i", "object", "form")
    for name, attributes in elements.found:
        assert not {"src", "href", "srcset", "data", "action", "style", "poster"} & attributes.keys(), name
        assert not any(attribute.startswith("on") for attribute in attributes)
    policy = next(a["content"] for a in elements.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    sheet = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{sheet}'"
    assert "url(" not in style


def test_prompts_are_text(text):
    """All hostile ones are there, as they are; what would be invisible or turn text around is written out."""
    shown = Elements(text).text
    for prompt in HOSTILE:
        assert plain(prompt)[:LONGEST] in shown
    assert r"left\u202eright\x1b[31m\nnext" in shown
    assert not {"\u202e", "\x1b"} & set(text)
    assert "(1,200 characters, truncated)" in shown


def test_what_it_says(text):
    said = " ".join(Elements(text).text.replace("\N{NO-BREAK SPACE}", " ").split())
    made = tally()
    assert f"{made.memorized} of 3,000 rows ({100 * made.memorized / 3000:.3g} %) are memorized." in said
    assert f"the highest is {made.distribution.highest:.4g}." in said
    assert "only its beginning was judged: 1 (0.0333 %)" in said
    assert re.findall("<h2[^>]*>(.*?)</h2>", text) == [
        "In short",
        "How the scores are distributed",
        "Most suspicious prompts",
        "Nearest to the threshold",
        "Truncated prompts",
        "What was run",
    ]
    for words in (*ABOUT.inputs, ABOUT.engine, ABOUT.checkpoint, ABOUT.fingerprint, ABOUT.rule, ABOUT.command):
        assert words in said
    assert f"memedge {memedge.__version__}".replace(" ", "") in said.replace(" ", "")
    assert said.startswith("Scores of a & b <i>.csv and 1 other file")


SCALES = ("linear", "logarithmic")


def test_tables_have_headings(text):
    """Each is named, each column has its heading, and each of the two charts says what it shows."""
    elements = Elements(text)
    assert len(elements.named("table")) == 5
    assert all(region.get("aria-label") for region in elements.named("div") if region.get("role") == "region")
    assert {head.get("scope") for head in elements.named("th")} == {"col", "row"}
    labels = [svg["aria-label"] for svg in elements.named("svg")]
    assert labels == [f"Rows by score, on a {s} scale; the figures are in the table below." for s in SCALES]


def test_the_most_suspicious_come_first(text):
    table = text[text.index('id="suspicious"') : text.index('id="near"')]
    rows = table.split("<tr>")[2:]
    assert len(rows) == LISTED
    scores = [float(re.findall(r'class="number">([\d.]+)<', row)[0]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert "left" in rows[0]


def test_without_verdicts():
    page = report(tally(None, "norm"), ABOUT)
    said = Elements(page).text
    assert "3,000 rows, no verdicts: the engine is not calibrated." in said
    assert "verdict</th>" not in page
    assert ">score</th>" not in page
    assert 'id="near"' not in page
    assert "threshold" not in said


def test_rows_decided_early_are_named_and_in_no_list():
    made = tally()
    for number in range(1000):
        made.add(ScoreRow("screened", None, None, None, False, False, 0.0068, "screened"), number)
    made.add(ScoreRow("of the norm alone", 40.0, None, None, True, False, 1.0, "score at least 3"), 1000)
    page = report(made, ABOUT)
    said = Elements(page).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Rows decided early, without a score: 1,001 (25 %), 1 of them memorized; they are in no list here." in said
    assert f"{made.memorized - 1:,} of 3,000 rows with a score reach the threshold." in said
    assert "screened" not in said and "of the norm alone" not in said


def test_a_score_of_the_norm_alone():
    made = Tally(2.0, "score")
    made.add(ScoreRow("a", 3.0, None, 3.0, True, False, 1.0, "score 3 ≥ threshold 2"), 1)
    assert '<td class="number">—</td>' in report(made, ABOUT)


def test_no_row_has_a_score():
    made = Tally(2.0, "score")
    made.add(ScoreRow("a", None, None, None, False, True, 0.0068, "screened"), 1)
    page = report(made, ABOUT)
    said = Elements(page).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "0 of 1 rows (0 %) are memorized." in said and "without a score: 1 (100 %)" in said
    assert 'id="distribution"' not in page and "Half of" not in said


@pytest.mark.parametrize("count", [0, 1])
def test_few_rows(count):
    said = Elements(report(tally(2.0, count=count), ABOUT)).text
    assert ("There were no rows." in said) == (count == 0)
    assert ("1 of 1 rows (100\u00a0%) is memorized." in said) == (count == 1)


def test_many_inputs():
    said = Elements(report(tally(), About("", "", "", "", "", [f"part-{i}.csv" for i in range(3000)], ""))).text
    assert "part-0.csv and 2999 other files" in said
    assert "part-19.csv, 2,980 more" in said
    assert "part-20.csv" not in said


@pytest.mark.parametrize("logarithmic", [False, True])
def test_bars_are_as_high_as_their_rows(logarithmic):
    made = Distribution(2.5)
    for value, rows in ((0.5, 1000), (1.5, 100), (2.5, 10), (3.5, 1)):
        for _ in range(rows):
            made.add(value)
    drawn = bars(made.bins(4), "score", 2.5, logarithmic)
    heights = [float(one) for one in re.findall(r'height="([\d.]+)"/></g>', drawn)]
    assert len(heights) == 4
    rows = np.array([1000, 100, 10, 1])
    expected = np.log(2 * rows) / np.log(2000) if logarithmic else rows / 1000
    assert np.array(heights) / heights[0] == pytest.approx(expected, abs=1e-3)
    assert re.findall(r'<g class="(\w+)">', drawn) == ["low", "low", "high", "high"]
    assert re.findall(r"<title>.*: (.*)</title>", drawn) == ["1,000", "100", "10", "1"]
    assert "threshold 2.5" in drawn


@pytest.mark.parametrize("values", [[2.0], [-3.0, 5e8], [0.0] * 7, [1e-12, 1.0], np.arange(12.0)])
def test_bars_stay_in_their_box(values):
    made = Distribution(None)
    for value in values:
        made.add(float(value))
    for logarithmic in (False, True):
        drawn = bars(made.bins(40), "score", None, logarithmic)
        found = re.findall(r'<rect x="([-\d.]+)" y="([-\d.]+)" width="([-\d.]+)" height="([-\d.]+)"/>', drawn)
        boxes = np.array(found, dtype=float)
        assert len(boxes)
        assert (boxes[:, 0] >= 0).all()
        assert (boxes[:, 0] + boxes[:, 2] <= 440).all()
        assert (boxes[:, 2:] > 0).all()
        assert boxes[:, 1] + boxes[:, 3] == pytest.approx(208, abs=0.02)


def test_places_are_checked(tmp_path):
    check_report(tmp_path / "Report.HTML")
    (tmp_path / "folder.html").mkdir()
    for path, words in (
        (tmp_path / "report.pdf", "name a file that ends in .html"),
        (tmp_path / "missing" / "report.html", "does not exist: make it, or name another with --report"),
        (tmp_path / "folder.html", "is a directory: name a file for the report"),
        (tmp_path / ("x" * 240 + ".html"), "too long for the file kept beside it"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            check_report(path)


def test_it_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("an older one")
    write_report(path, tally(), ABOUT)
    assert path.read_text() == report(tally(), ABOUT)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match=r"cannot be written .*the scores are whole"):
        write_report(tmp_path / "gone" / "report.html", tally(), ABOUT)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_in_a_browser(chromium, text, tmp_path, width, dark):
    """No complaint, no request, the colours of the sheet, nothing wider than the window, no prompt that runs."""
    path: Path = tmp_path / "report.html"
    path.write_text(text)
    chromium.complaints.clear()
    chromium.requests.clear()
    chromium.open(path, width, dark=dark)
    assert chromium.run("document.documentElement.scrollWidth") == width
    boxes = chromium.run("[...document.querySelectorAll('svg, .scroll')].map(b => b.getBoundingClientRect().right)")
    assert max(boxes) <= width
    assert chromium.run("window.hacked") is None
    ink = chromium.run("getComputedStyle(document.querySelector('svg .high rect:last-child')).fill")
    assert ink == ("rgb(255, 155, 82)" if dark else "rgb(179, 79, 0)")
    assert chromium.complaints == []
    assert chromium.requests == [path.as_uri()]
