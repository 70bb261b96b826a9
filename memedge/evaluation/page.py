"""The report of an evaluation: one HTML page that needs nothing else, and no network."""

import json
import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

import plotly
from plotly.offline import get_plotlyjs

from memedge.decision.reasons import rule_in_words
from memedge.evaluation.charts import BANDS, KINDS, all_figures, bound
from memedge.evaluation.figures import (
    ANISOTROPY,
    DetectorDifference,
    Evaluation,
    Figure,
    ScoredPrompt,
    ScreenFigures,
)
from memedge.metrics import RESAMPLES
from memedge.reports.document import PARTS, Cell, document, provenance, section, source_hash, table
from memedge.wording import counted

SUSPICIOUS, MISTAKES = 20, 10  # prompts listed
COMPARED = 4  # detectors; of more the summary gives no figures
HOVER_WIDTH, HOVER_LINES = 44, 6  # of a prompt beside the pointer


def page(evaluation: Evaluation) -> str:
    """Return report.html. Whatever is not ours in it (prompts, names of files and checkpoints) is escaped.

    Nothing can be loaded and no other script can run: the page's own policy allows these two scripts by their hashes.
    """
    figures = all_figures(evaluation)
    prompts = [hover(one.prompt) for one in evaluation.prompts]
    scripts = [get_plotlyjs(), (PARTS / "script.js").read_text(encoding="utf-8")]
    allowed = " ".join(source_hash(script) for script in scripts)
    data = _inert(json.dumps({"figures": figures, "prompts": prompts}, allow_nan=False))
    first = evaluation.detectors[0].name
    run = evaluation.run
    return document(
        f"Memorization detectors on {escape(run.checkpoint)}",
        f"{evaluation.memorized.evaluated} memorized and {evaluation.clean.evaluated} clean prompts · "
        f"{escape(run.provider)} {escape(run.precision)} · {escape(run.date[:10])}",
        [
            _summary(evaluation),
            _scores(evaluation, figures),
            _roc(evaluation, figures),
            _table_of_figures(evaluation),
            *([_differences(evaluation)] if evaluation.findings.differences else []),
            *([_scatter(evaluation, figures)] if "scatter" in figures else []),
            _suspicious(evaluation, first),
            _mistakes(evaluation, first),
            _stability(evaluation, figures),
            _provenance(evaluation),
        ],
        allowed=f"script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:",
        end=f'<script type="application/json" id="report">{data}</script>\n'
        + "\n".join(f"<script>{script}</script>" for script in scripts),
    )


def hover(prompt: str) -> str:
    """Return a prompt as plotly shows it beside the pointer: broken into lines, cut where it is long, markup inert."""
    lines = textwrap.wrap(prompt, HOVER_WIDTH) or ["(empty)"]
    if len(lines) > HOVER_LINES:
        lines = [*lines[: HOVER_LINES - 1], lines[HOVER_LINES - 1] + " …"]
    return "<br>".join(escape(line) for line in lines)


def _inert(text: str) -> str:
    """Return JSON in which no HTML tag or comment can begin or end."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _summary(evaluation: Evaluation) -> str:
    found, first = evaluation.findings, evaluation.detectors[0].name
    line = next(one for one in found.lines if (one.detector, one.draws) == (first, found.draws))
    if line.auc.low <= 0.5:
        verdict = f"{first} does not tell memorized prompts from clean ones here."
    elif line.tpr_1.low >= 0.5:
        verdict = f"{first} finds most memorized prompts with hardly any false alarm."
    else:
        verdict = f"{first} ranks memorized prompts higher, but may miss many where false alarms have to be rare."
    text = [
        f"<strong>{escape(verdict[0].upper() + verdict[1:])}</strong>",
        f"With {counted(found.draws, 'draw')} a memorized prompt scores higher than a clean one in "
        f"{100 * line.auc.value:.3g} % of pairs (AUC {line.auc.value:.3f}, 95 % interval {line.auc.low:.3f} to "
        f"{line.auc.high:.3f}). At a false-positive rate of at most 1 % it finds {100 * line.tpr_1.value:.3g} % of the "
        f"memorized prompts ({100 * line.tpr_1.low:.3g} to {100 * line.tpr_1.high:.3g} %).",
    ]
    if found.verdicts:
        v = found.verdicts
        text.append(
            f"By the engine's calibrated threshold for the {ANISOTROPY} {v.found} of {v.memorized} memorized prompts "
            f"are found, and {v.false_alarms} of {v.clean} clean ones are called memorized."
        )
    if evaluation.screen:
        text.append(screen_in_words(evaluation.screen))
    text += _compared([one for one in found.differences if one.draws == found.draws])
    cautions = "".join(f"<li>{escape(one)}</li>" for one in evaluation.cautions)
    box = f'<aside class="cautions" aria-label="What to keep in mind"><ul>{cautions}</ul></aside>' if cautions else ""
    paragraph = " ".join(text).replace(" %", "\u00a0%")  # a number and its unit are not parted
    return section("summary", "In short", f'<p class="summary">{paragraph}</p>{box}')


def screen_in_words(screen: ScreenFigures) -> str:
    """Return what the screen decides and misses, in sentences."""
    decided, missed = screen.decided, screen.missed
    text = (
        f"With early='screen' {screen.decided_prompts} of {screen.clean} clean prompts "
        f"({100 * decided.value:.1f} %, {100 * decided.low:.1f} to {100 * decided.high:.1f} %) take "
        f"{screen.passes:.2g} of a pass"
    )
    if missed is None:
        return f"{text}; the full rule finds no memorized prompt that could be missed."
    return (
        f"{text}, and {screen.missed_prompts} of the {screen.found} memorized ones that the full rule finds are missed "
        f"({100 * missed.value:.1f} %, {100 * missed.low:.1f} to {100 * missed.high:.1f} %; at most "
        f"{100 * screen.alpha:.2g} % is promised)."
    )


def _compared(differences: Sequence[DetectorDifference]) -> list[str]:
    """Return in sentences which detectors are better or worse than the first one."""
    sorted_by: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for one in differences:
        known = one.p is not None and one.p < 0.05
        kind = "open" if not known else "better" if one.auc.value > 0 else "worse"
        equal = "" if one.p is None or one.p < 0.001 else "=\u00a0"
        figures = f" (AUC {_signed(one.auc.value, '+')}, p\u00a0{equal}{_p(one.p)})"
        sorted_by[kind].append(escape(one.detector) + (figures if len(differences) <= COMPARED else ""))
    against = escape(differences[0].against) if differences else ""
    words = {
        "better": f"Better than {against}",
        "worse": f"Worse than {against}",
        "open": f"Not shown to differ from {against}",
    }
    return [f"{words[kind]}: {', '.join(names)}." for kind, names in sorted_by.items() if names]


def _scores(evaluation: Evaluation, figures: dict[str, Any]) -> str:
    options = "".join(
        f'<option value="scores-{place}">{escape(one.name)}</option>' for place, one in enumerate(evaluation.detectors)
    )
    choice = ""
    if len(evaluation.detectors) > 1:
        choice = f'<p><label>Detector <select data-plot="plot-scores" autocomplete="off">{options}</select></label></p>'
    note = "Above: how many percent of either kind score so. Below: each prompt. Dashed: "
    note += "the calibrated threshold, or " if evaluation.findings.verdicts else ""
    note += "where at most 1 % of these clean prompts are beyond."
    return section("scores", "Scores", choice + _plot("scores", "scores-0", figures, note))


def _roc(evaluation: Evaluation, figures: dict[str, Any]) -> str:
    several = len(evaluation.findings.rocs) > BANDS
    note = (
        "The share of memorized prompts found by how many clean ones are called memorized, on a logarithmic axis: what "
        "matters is on the left. Dotted: 1 % and 3 %. "
        f"Bands: 95 % of {RESAMPLES} resamples of prompts{', of the first detector' if several else ''}."
    )
    return section("roc", "ROC", _plot("roc", "roc", figures, note))


def _table_of_figures(evaluation: Evaluation) -> str:
    head = ["detector", "draws", "AUC", "TPR at 1 %", "nearest", "TPR at 3 %", "nearest", "UNet passes", "s / prompt"]
    rows = [
        [
            escape(one.detector),
            str(one.draws),
            *map(_cell, (one.auc, one.tpr_1, one.tpr_1_nearest, one.tpr_3, one.tpr_3_nearest)),
            f"{one.passes:.4g}",
            f"{one.seconds:.3g}",
        ]
        for one in evaluation.findings.lines
    ]
    formulas = "".join(f"<dt>{escape(d.name)}</dt><dd>{escape(d.formula)}</dd>" for d in evaluation.detectors)
    note = (
        f'<p class="note">In brackets: 95 % intervals, percentiles of {RESAMPLES} resamples, memorized and clean '
        "prompts resampled separately and alike for all detectors. TPR at 1 % (3 %) is strict: at a false-positive "
        "rate of at most that; “nearest” is at the rate nearest to it that a threshold can give. Passes and seconds "
        "are per prompt, on this machine.</p>"
    )
    return section("figures", "Figures", table(head, rows, "Figures of each detector") + note + f"<dl>{formulas}</dl>")


def _differences(evaluation: Evaluation) -> str:
    found = evaluation.findings.differences
    head = ["detector", "draws", "AUC", "p (DeLong)", "TPR at 1 %"]
    rows = [
        [escape(one.detector), str(one.draws), _cell(one.auc, "+"), _p(one.p), _cell(one.tpr_1, "+")] for one in found
    ]
    against = escape(found[0].against)
    note = (
        f'<p class="note">Each detector minus {against}, with as many draws. Intervals are paired: every resample '
        "holds the same prompts for both. p is that of DeLong's test for a difference of AUCs, not corrected for the "
        "number of detectors; “—” where both order the prompts equally.</p>"
    )
    title = f"Differences from {against}"
    return section("differences", title, table(head, rows, title) + note)


def _scatter(evaluation: Evaluation, figures: dict[str, Any]) -> str:
    rule = evaluation.rule
    sources = {
        "calibrated": "the engine's calibration",
        "published": "published for this model's family, not fitted here",
        "not fitted": "(1, 1), as nothing is published for this model and it is not calibrated",
    }
    note = f"The score is {rule.formula}; the weights are {sources[rule.source]}. Dashed: "
    note += (
        "the calibrated threshold; " if rule.threshold is not None else "where 1 % of these clean prompts are above; "
    )
    note += (
        "prompts above or to the right of it are called memorized."
        if rule.gamma_alignment > 0
        else ("prompts to the right of it are called memorized.")
    )
    return section("terms", "Norm and alignment", _plot("scatter", "scatter", figures, note))


def _suspicious(evaluation: Evaluation, detector: str) -> str:
    sign = evaluation.sign(detector)
    ranked = sorted(evaluation.prompts, key=lambda one: -sign * _score(evaluation, detector, one))
    prompts = _prompts(evaluation, detector, ranked[:SUSPICIOUS], f"Most suspicious prompts, by {detector}")
    return section("suspicious", "Most suspicious prompts", prompts)


def _mistakes(evaluation: Evaluation, detector: str) -> str:
    """Return the clean prompts above and the memorized ones below the threshold; without one, those nearest to that."""
    at, name = bound(evaluation, detector)
    sign = evaluation.sign(detector)
    by_score = sorted(evaluation.prompts, key=lambda one: -sign * _score(evaluation, detector, one))
    high, low = [one for one in by_score if not one.memorized], [one for one in reversed(by_score) if one.memorized]
    if name == "threshold":
        high = [one for one in high if _score(evaluation, detector, one) >= at]
        low = [one for one in low if _score(evaluation, detector, one) < at]
    words = ("Clean, but called memorized", "Memorized, but missed")
    if name != "threshold":
        ends = ("highest", "lowest") if sign > 0 else ("lowest", "highest")
        words = (f"Clean prompts with the {ends[0]} scores", f"Memorized prompts with the {ends[1]} scores")
    text = ""
    for title, some in zip(words, (high, low), strict=True):
        count = f": {len(some)}" if name == "threshold" else ""
        more = f", the {MISTAKES} worst" if name == "threshold" and len(some) > MISTAKES else ""
        text += f"<h3>{title}{count}{more}</h3>"
        text += _prompts(evaluation, detector, some[:MISTAKES], title) if some else "<p>None.</p>"
    note = '<p class="note">Labels can be wrong, too: see what such a prompt generates before you trust either.</p>'
    return section("mistakes", "Worst mistakes", text + note)


def _prompts(evaluation: Evaluation, detector: str, some: Sequence[ScoredPrompt], caption: str) -> str:
    others = [one.name for one in evaluation.detectors if one.name != detector]
    rows = []
    for one in some:
        label = KINDS[one.memorized]
        values = [f"{_score(evaluation, name, one):#.4g}".replace("-", "−") for name in (detector, *others)]
        text = escape(one.prompt) or "<em>(empty)</em>"
        cut = ' <small class="note">(truncated)</small>' if one.truncated else ""
        rows.append([f'<div class="prompt">{text}{cut}</div>', f'<span class="{label}">{label}</span>', *values])
    return table(["prompt", "label", detector, *others], rows, caption, texts=2)


def _stability(evaluation: Evaluation, figures: dict[str, Any]) -> str:
    found = evaluation.findings.stability
    if not found:
        text = (
            "<p>Every prompt was scored with one draw of noise, so nothing can be said about another: evaluate with "
            "<code>--draws 1,4,16</code>.</p>"
        )
        return section("stability", "Stability over draws", text)
    head = ["detector", "draws", "rank correlation", "spread", "verdicts that flip"]
    rows = [
        [
            escape(one.detector),
            str(one.draws),
            _optional(one.spearman, ".3f"),
            _optional(one.spread, ".3f"),
            "—" if one.flips is None else f"{100 * one.flips:.1f} %",
        ]
        for one in found
    ]
    note = (
        '<p class="note">Rank correlation: Spearman\'s, between the scores of two single draws, on average. Spread: '
        "the standard deviation of a prompt's score over draws, divided by that between prompts. Verdicts that flip: "
        "by one draw, compared with all of them, at the calibrated threshold.</p>"
    )
    plot = ""
    if "stability" in figures:
        plot = _plot("stability", "stability", figures, "AUC by the number of draws, with 95 % intervals.")
    return section("stability", "Stability over draws", plot + table(head, rows, "Stability over draws") + note)


def _provenance(evaluation: Evaluation) -> str:
    run, rule = evaluation.run, evaluation.rule
    noise = f"the engine's own (seed {run.noise_seed})" if run.seed is None else f"seed {run.seed}"
    entries = [
        ("engine", run.engine),
        ("checkpoint", f"{run.checkpoint}, SHA-256 {run.checkpoint_sha256}"),
        ("engine's fingerprint", run.engine_fingerprint),
        ("runs on", f"{run.provider}, {run.precision}, threads: {run.threads}"),
        ("timesteps", f"norm at {run.timesteps[0]}, alignment at {run.timesteps[1]}"),
        (
            "draws",
            f"{', '.join(str(n) for n in sorted({one.draws for one in evaluation.findings.lines}))}; noise: {noise}",
        ),
        ("score", rule_in_words(rule)),
        *(
            (kind, f"{one.name}: {one.evaluated} of {one.prompts} prompts, SHA-256 {one.sha256}")
            for kind, one in (("memorized", evaluation.memorized), ("clean", evaluation.clean))
        ),
        ("versions", ", ".join(f"{name} {number}" for name, number in run.versions.items())),
        ("page", f"plotly.py {plotly.__version__}, © Plotly, Inc., MIT licence"),
        ("date", run.date),
    ]
    return section("provenance", "What was run", provenance(entries, run.command))


def _plot(name: str, figure: str, figures: dict[str, Any], note: str) -> str:
    label = escape(figures[figure]["label"])
    entries = sum("name" in trace for trace in figures[figure]["data"])  # of the legend
    return (
        f'<figure><div class="plot" id="plot-{name}" style="--entries: {entries}" data-figure="{figure}" role="img" '
        f'aria-label="{label}"></div>'
        f"<figcaption>{escape(note)}</figcaption></figure>"
    )


def _score(evaluation: Evaluation, detector: str, one: ScoredPrompt) -> float:
    return one.score(detector, evaluation.findings.draws)


def _cell(figure: Figure, sign: str = "") -> Cell:
    value, low, high = (_signed(number, sign) for number in (figure.value, figure.low, figure.high))
    return f"{value}<small>[{low}, {high}]</small>"


def _signed(number: float, sign: str) -> str:
    return format(number, f"{sign}.3f").replace("-", "−")


def _p(p: float | None) -> str:
    if p is None:
        return "—"
    return "&lt;\u00a00.001" if p < 0.001 else f"{p:.3f}"


def _optional(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)
