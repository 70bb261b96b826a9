"""The report: what its page holds, that nothing in it runs or loads what is not ours, and how a browser shows it."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import browser
from elements import Elements
from evaluations import HOSTILE, evaluation

from memedge.evaluation import charts
from memedge.evaluation.figures import Measured, find
from memedge.evaluation.page import _suspicious, hover, page


@pytest.fixture(scope="module")
def made():
    return evaluation()


@pytest.fixture(scope="module")
def text(made):
    return page(made)


def test_nothing_is_loaded(text):
    elements = Elements(text)
    for name, attributes in elements.found:
        assert not {"src", "href", "srcset", "data", "action", "background", "poster"} & attributes.keys(), name
        assert not any(name.startswith("on") for name in attributes)
    assert "link" not in {name for name, _ in elements.found}
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_only_our_scripts_may_run(text):
    """The page's policy names the hashes of its two scripts, and lets nothing be fetched."""
    elements = Elements(text)
    policy = next(a["content"] for name, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    data, *scripts = elements.scripts
    assert len(scripts) == 2
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].split() == [f"'sha256-{value}'" for value in hashes]
    assert text.count("plotly.js v") == 1
    assert json.loads(data)["prompts"]
    assert not {"<", ">"} & set(data)


def test_prompts_are_text(made, text):
    elements = Elements(text)
    assert [name for name, _ in elements.found].count("script") == 3
    assert {"img", "a", "b"} & {name for name, _ in elements.found} == set()
    for prompt in HOSTILE:
        assert prompt in elements.text
    shown = json.loads(elements.scripts[0])["prompts"]
    assert len(shown) == len(made.prompts)
    assert not any(re.search("<(?!br>)", prompt) for prompt in shown)
    assert hover(HOSTILE[0]).replace("<br>", " ") == "&lt;script&gt;window.hacked = 1&lt;/script&gt;"
    assert hover("x y " * 500).count("<br>") == 5
    assert hover("") == "(empty)"


def test_what_it_says(made, text):
    """Figures, cautions, provenance, and the command: as in the evaluation."""
    said = " ".join(Elements(text).text.replace("\N{NO-BREAK SPACE}", " ").split())
    line = made.findings.lines[0]
    for figure in (line.auc, line.tpr_1, line.tpr_1_nearest, line.tpr_3, line.tpr_3_nearest):
        assert f"{figure.value:.3f}[{figure.low:.3f}, {figure.high:.3f}]" in said
    verdicts = made.findings.verdicts
    assert (
        f"{verdicts.found} of {verdicts.memorized} memorized prompts are found, and {verdicts.false_alarms} of" in said
    )
    missed = [p.prompt for p in made.prompts if p.memorized and p.score("anisotropy", 1) < verdicts.threshold]
    assert f"Memorized, but missed: {len(missed)}" in said
    for words in (made.run.command, made.run.checkpoint_sha256, made.memorized.sha256, *made.cautions, "seed 42"):
        assert words in said
    titles = re.findall("<h2[^>]*>(.*?)</h2>", text)
    assert titles == [
        "In short",
        "Scores",
        "ROC",
        "Figures",
        "Differences from anisotropy",
        "Norm and alignment",
        "Most suspicious prompts",
        "Worst mistakes",
        "Stability over draws",
        "What was run",
    ]


def test_without_a_threshold_and_with_one_draw():
    made = evaluation(memorized=10, clean=40, draws=1, counts=(1,), threshold=None)
    said = Elements(page(made)).text
    assert "calibrated threshold" not in said
    assert "Clean prompts with the highest scores" in said
    assert "nothing can be said about another" in said


@pytest.mark.parametrize("apart", [0.0, 9.0])
def test_scores_that_do_not_vary(apart):
    """Not between prompts of a kind, not between draws, or not at all: no warning of NumPy's."""
    made = evaluation(clean=20)
    label = np.array([one.memorized for one in made.prompts])
    values = np.repeat(apart * label[:, None], 4, axis=1)
    measured = [Measured(one.name, "", one.passes, values, 0.1) for one in made.detectors]
    flat = replace(
        made,
        findings=find(measured, label, [1, 4], 1, made.rule),
        prompts=[replace(one, scores=dict.fromkeys(one.scores, [apart * one.memorized] * 4)) for one in made.prompts],
    )
    said = Elements(page(flat)).text
    assert ("does not tell memorized prompts from clean ones" in said) == (apart == 0)
    assert flat.findings.differences[0].p is None
    assert flat.findings.stability[0].spearman == (None if apart == 0 else pytest.approx(1))


def test_the_line_is_where_the_score_is_the_threshold(made):
    rule = made.rule
    line = charts.scatter(made)["data"][-1]
    assert len(line["x"]) == 2
    for x, y in zip(line["x"], line["y"], strict=True):
        assert rule.gamma_norm * x + rule.gamma_alignment * y == pytest.approx(rule.threshold, rel=1e-6)


def test_alignments_are_shown_as_measured(made):
    """Where a low cosine means memorized, the table begins with the lowest, and the line is below the clean ones."""
    at, name = charts.bound(made, "alignment")
    clean = np.array([one.score("alignment", made.findings.draws) for one in made.prompts if not one.memorized])
    assert name == "1 % of clean below"
    assert (clean < at).mean() <= 0.01
    low = min(made.prompts, key=lambda one: one.score("alignment", made.findings.draws))
    table = _suspicious(made, "alignment")
    assert f"−{-low.score('alignment', made.findings.draws):#.4g}" in table.split("<tr>")[2]


def test_figures_hold_every_prompt_once(made):
    for figure in (charts.scores(made, "norm"), charts.scatter(made)):
        dots = [n for trace in figure["data"] if trace.get("meta") == "prompts" for n in trace["customdata"]]
        assert sorted(dots) == list(range(len(made.prompts)))
    bars = [trace for trace in charts.scores(made, "norm")["data"] if trace["type"] == "bar"]
    assert [sum(trace["y"]) for trace in bars] == pytest.approx([100, 100], rel=1e-3)


def test_long_lists_are_thinned_evenly(made, monkeypatch):
    monkeypatch.setattr(charts, "MOST_DOTS", 30)
    trace = next(t for t in charts.scores(made, "norm")["data"] if t.get("meta") == "prompts")
    clean = np.array([p.score("norm", 1) for p in made.prompts if not p.memorized])
    assert len(trace["x"]) == 30
    assert (trace["x"][0], trace["x"][-1]) == pytest.approx((clean.min(), clean.max()), rel=1e-4)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def file(text, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_in_a_browser(chromium, file, tmp_path, width, dark):
    """No complaint, no request, every figure drawn, nothing wider than the window, no prompt that runs."""
    chromium.complaints.clear()
    chromium.requests.clear()
    chromium.open(file, width, dark=dark)
    drawn = chromium.run("[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.trace').length)")
    assert len(drawn) == 4
    assert min(drawn) >= 2
    assert chromium.run("document.documentElement.scrollWidth") == width
    boxes = chromium.run("[...document.querySelectorAll('.plot, .scroll')].map(b => b.getBoundingClientRect().right)")
    assert max(boxes) <= width
    assert chromium.run("window.hacked") is None
    ink = chromium.run("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    assert ink == ("rgb(230, 233, 236)" if dark else "rgb(27, 31, 36)")
    chromium.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert chromium.complaints == []
    assert chromium.requests == [file.as_uri()]


def test_hovering_shows_the_prompt(chromium, file):
    chromium.open(file, 1280)
    number = chromium.run(
        """(() => {
            const place = document.getElementById("plot-scatter");
            const curve = place.data.findIndex((trace) => trace.customdata?.includes(0));
            Plotly.Fx.hover(place, [{ curveNumber: curve, pointNumber: place.data[curve].customdata.indexOf(0) }]);
            return curve;
        })()"""
    )
    assert number == 1
    shown = chromium.run("document.querySelector('#plot-scatter .hovertext').textContent")
    assert HOSTILE[0] in shown
    assert chromium.run("window.hacked") is None


def test_another_detector_is_chosen(chromium, file):
    chromium.open(file, 390)
    title = "document.querySelector('#plot-scores .xtitle, #plot-scores .x2title').textContent"
    assert chromium.run(title).startswith("anisotropy")
    chromium.run(
        "const choice = document.querySelector('select'); choice.value = 'scores-1';"
        "choice.dispatchEvent(new Event('change'))"
    )
    assert chromium.run(title).startswith("norm")
    assert "norm" in chromium.run("document.getElementById('plot-scores').getAttribute('aria-label')")
