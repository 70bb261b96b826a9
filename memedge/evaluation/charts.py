"""The report's figures: plotly's, as plain data that the page draws in its own colours (memedge/data/report)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from memedge.engine.arrays import Bools, Floats
from memedge.evaluation.figures import ANISOTROPY, DetectorFigures, Evaluation, RocCurve
from memedge.metrics import threshold
from memedge.pictures import COLOURS
from memedge.wording import counted

MEMORIZED, CLEAN = "#d55e00", "#0072b2"  # of COLOURS; the markers differ too
MARKERS = {
    True: {"color": MEMORIZED, "symbol": "x", "size": 8},
    False: {"color": CLEAN, "symbol": "circle-open", "size": 7},
}
KINDS = {True: "memorized", False: "clean"}
DASHES = ("solid", "dash", "dot")
BINS = 40
MOST_DOTS = 2000  # of one kind in a figure: more are slow to draw
BANDS = 3  # more than these would hide each other

Data = dict[str, Any]
Indices = npt.NDArray[np.intp]


def all_figures(evaluation: Evaluation) -> dict[str, Data]:
    """Return each figure by name: plotly's data and layout, and a label in words.

    "scores-K" is of the K-th detector; "scatter" is there if norm and alignment were measured, "stability" with several
    numbers of draws.
    """
    found = {f"scores-{place}": scores(evaluation, one.name) for place, one in enumerate(evaluation.detectors)}
    found["roc"] = rocs(evaluation)
    if evaluation.has_terms:
        found["scatter"] = scatter(evaluation)
    if len({line.draws for line in evaluation.findings.lines}) > 1:
        found["stability"] = stability(evaluation.findings.lines)
    return found


def bound(evaluation: Evaluation, detector: str) -> tuple[float, str]:
    """Return a detector's calibrated threshold, or else where at most 1 % of clean prompts are beyond; its name."""
    calibrated = evaluation.rule.threshold if detector == ANISOTROPY else None
    sign = evaluation.sign(detector)
    at, name = _bound(calibrated, sign * _scores(evaluation, detector), _labels(evaluation))
    return sign * at, name if sign > 0 else name.replace("above", "below")


def _bound(calibrated: float | None, score: Floats, memorized: Bools) -> tuple[float, str]:
    if calibrated is not None:
        return calibrated, "threshold"
    return threshold(score[~memorized], 1), "1 % of clean above"


def scores(evaluation: Evaluation, detector: str) -> Data:
    """Return how the scores of memorized and of clean prompts are distributed: bars, and a dot per prompt."""
    score, memorized = _scores(evaluation, detector), _labels(evaluation)
    low, high = float(score.min()), float(score.max())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.68, 0.32], vertical_spacing=0.04)
    for kind in (False, True):
        some = score[memorized == kind]
        share = 100 * np.histogram(some, edges)[0] / len(some)
        figure.add_bar(
            x=_round((edges[1:] + edges[:-1]) / 2),
            y=_round(share),
            width=float(edges[1] - edges[0]),
            name=f"{KINDS[kind]} ({len(some)})",
            legendgroup=KINDS[kind],
            marker={
                "color": MARKERS[kind]["color"],
                "opacity": 0.65,
                "pattern": {"shape": "/" if kind else "", "size": 5, "solidity": 0.35},
            },
            hovertemplate=f"%{{y:.1f}} % of {KINDS[kind]} prompts near %{{x:.3g}}<extra></extra>",
            row=1,
            col=1,
        )
    for kind in (False, True):
        chosen = _dots(score, memorized == kind)
        # Spread over the height, evenly and always in the same way.
        height = kind + 0.7 * (np.arange(len(chosen)) * 0.618034 % 1 - 0.5)
        figure.add_scatter(
            x=_round(score[chosen]),
            y=_round(height),
            mode="markers",
            marker=MARKERS[kind] | {"size": 6},
            legendgroup=KINDS[kind],
            showlegend=False,
            meta="prompts",
            customdata=chosen.tolist(),
            hovertemplate=f"%{{text}}<br>{KINDS[kind]}, %{{x:.4g}}<extra></extra>",
            row=2,
            col=1,
        )
    at, name = bound(evaluation, detector)
    figure.add_shape(type="line", x0=at, x1=at, y0=0, y1=1, yref="paper", line={"width": 1.5, "dash": "dash"})
    right = at < (low + high) / 2
    figure.add_annotation(
        x=at,
        y=1,
        yref="paper",
        text=name,
        showarrow=False,
        xanchor="left" if right else "right",
        yanchor="top",
        xshift=4 if right else -4,
    )
    figure.update_layout(barmode="overlay", bargap=0)
    figure.update_yaxes(title="% of the kind", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(tickvals=[0, 1], ticktext=["clean", "mem."], range=[-0.5, 1.5], row=2, col=1, showgrid=False)
    figure.update_xaxes(title=f"{detector}, mean over {counted(evaluation.findings.draws, 'draw')}", row=2, col=1)
    return _finish(
        figure, f"Distribution of {detector} over memorized and clean prompts, with a line at {at:.4g}: {name}."
    )


def rocs(evaluation: Evaluation) -> Data:
    """Return the ROC curves over a logarithmic FPR, with bands."""
    found = evaluation.findings.rocs
    smallest = 1 / evaluation.clean.evaluated
    left = smallest / 2  # where an FPR of 0 is drawn
    figure = go.Figure()
    bands = found if len(found) <= BANDS else found[:1]
    for place, one in enumerate(found):
        colour, dash = COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]
        x = _round(np.maximum(one.fpr, left))
        group = {"legendgroup": one.detector, "x": x, "mode": "lines"}
        if one in bands:
            edge = {"line": {"width": 0, "shape": "hv"}, "showlegend": False, "hoverinfo": "skip"}
            figure.add_scatter(y=_round(one.low), **group, **edge)
            figure.add_scatter(y=_round(one.high), **group, **edge, fill="tonexty", fillcolor=_clear(colour))
        figure.add_scatter(
            y=_round(one.tpr),
            name=_roc_name(one, evaluation.findings.lines, evaluation.findings.draws),
            line={"color": colour, "width": 2.2, "shape": "hv", "dash": dash},
            customdata=[list(row) for row in zip(_percents(one.fpr), _round(one.low), _round(one.high), strict=True)],
            hovertemplate="TPR %{y:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}] at FPR ≤ %{customdata[0]:.2g} %",
            **group,
        )
    ticks = [(value, f"{100 * value:g} %") for value in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1) if value > 1.3 * left]
    values, words = zip((left, "0"), *ticks, strict=True)
    for value in (0.01, 0.03):
        if value > left:
            figure.add_shape(type="line", x0=value, x1=value, y0=0, y1=1, line={"width": 1, "dash": "dot"})
    figure.update_xaxes(
        title="false-positive rate, at most",
        type="log",
        range=[float(np.log10(left)), 0.02],
        tickvals=values,
        ticktext=words,
    )
    figure.update_yaxes(title="true-positive rate", range=[-0.02, 1.03])
    figure.update_layout(hovermode="closest")
    return _finish(
        figure,
        "ROC curves over a logarithmic false-positive rate: "
        + "; ".join(_roc_name(one, evaluation.findings.lines, evaluation.findings.draws) for one in found)
        + ".",
    )


def scatter(evaluation: Evaluation) -> Data:
    """Return norm and alignment of each prompt, and the line on which the score is the threshold."""
    rule, memorized = evaluation.rule, _labels(evaluation)
    norm, alignment = (_scores(evaluation, name) for name in evaluation.terms)
    score = rule.score(norm, alignment)
    figure = go.Figure()
    for kind in (False, True):
        chosen = _dots(score, memorized == kind)
        figure.add_scatter(
            x=_round(norm[chosen]),
            y=_round(alignment[chosen]),
            mode="markers",
            marker=MARKERS[kind],
            name=f"{KINDS[kind]} ({(memorized == kind).sum()})",
            meta="prompts",
            customdata=chosen.tolist(),
            hovertemplate=f"%{{text}}<br>{KINDS[kind]}: norm %{{x:.4g}}, alignment %{{y:.4g}}<extra></extra>",
        )
    at, name = _bound(rule.threshold, score, memorized)
    (left, right), (low, high) = _range(norm), _range(alignment)
    ends = _line((rule.gamma_norm, rule.gamma_alignment, at), (left, right), (low, high))
    if len(ends) == 2:
        (x0, y0), (x1, y1) = ends
        figure.add_scatter(
            x=[x0, x1],
            y=[y0, y1],
            mode="lines",
            name=f"{name}: {rule.formula} = {at:.4g}",
            line={"color": "#8c8c8c", "width": 2, "dash": "dash"},
            hoverinfo="skip",
        )
    n = counted(evaluation.findings.draws, "draw")
    figure.update_xaxes(title=f"norm, mean over {n}", range=[left, right])
    figure.update_yaxes(title="alignment", range=[low, high])
    return _finish(figure, f"Norm and alignment of each prompt; dashed: {name}, where {rule.formula} = {at:.4g}.")


def stability(lines: Sequence[DetectorFigures]) -> Data:
    """Return the AUC by the number of draws."""
    figure = go.Figure()
    names = list(dict.fromkeys(line.detector for line in lines))
    draws = sorted({line.draws for line in lines})
    for place, name in enumerate(names):
        some = [line for line in lines if line.detector == name]
        aside = 1 + 0.03 * (place - (len(names) - 1) / 2)  # so that intervals do not hide each other
        figure.add_scatter(
            x=[aside * line.draws for line in some],
            y=_round([line.auc.value for line in some]),
            error_y={
                "type": "data",
                "symmetric": False,
                "thickness": 1.5,
                "width": 3,
                "array": _round([line.auc.high - line.auc.value for line in some]),
                "arrayminus": _round([line.auc.value - line.auc.low for line in some]),
            },
            mode="lines+markers",
            name=name,
            line={"color": COLOURS[place % len(COLOURS)], "dash": DASHES[place // len(COLOURS) % len(DASHES)]},
            hovertemplate=f"{name}: AUC %{{y:.3f}}<extra></extra>",
        )
    figure.update_xaxes(title="draws per prompt, n", type="log", tickvals=draws, ticktext=[str(n) for n in draws])
    figure.update_yaxes(title="AUC")
    return _finish(figure, "AUC of each detector by the number of draws, with 95 % intervals.")


def _finish(figure: go.Figure, label: str) -> Data:
    figure.update_layout(
        template={},
        margin={"l": 58, "r": 20, "t": 34, "b": 50},
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom", "maxheight": 2000},
        font={"size": 13},
    )
    figure.update_xaxes(ticklabeloverflow="allow", showline=True, ticks="outside", title_standoff=8, zeroline=False)
    figure.update_yaxes(automargin=True, title_standoff=6, zeroline=False)
    plain = figure.to_plotly_json()
    return {"data": plain["data"], "layout": plain["layout"], "label": label}


def _scores(evaluation: Evaluation, detector: str) -> Floats:
    return np.array([one.score(detector, evaluation.findings.draws) for one in evaluation.prompts])


def _labels(evaluation: Evaluation) -> Bools:
    return np.array([one.memorized for one in evaluation.prompts])


def _dots(score: Floats, chosen: Bools) -> Indices:
    """Return the prompts to draw, in the order of their scores: all, or some evenly from the lowest to the highest."""
    ordered = np.flatnonzero(chosen)[np.argsort(score[chosen], kind="stable")]
    if len(ordered) <= MOST_DOTS:
        return ordered
    some: Indices = ordered[np.linspace(0, len(ordered) - 1, MOST_DOTS).round().astype(int)]
    return some


def _line(
    equation: tuple[float, float, float], x: tuple[float, float], y: tuple[float, float]
) -> list[tuple[float, float]]:
    """Return where a · x + b · y = c crosses the edges of a rectangle: two points, or none if it passes it by."""
    a, b, c = equation
    points = [(at, (c - a * at) / b) for at in x if b] + [((c - b * at) / a, at) for at in y if a]
    inside = {(px, py) for px, py in points if x[0] <= px <= x[1] and y[0] <= py <= y[1]}
    return sorted(inside)[:: max(1, len(inside) - 1)] if len(inside) > 1 else []


def _range(values: Floats) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _roc_name(one: RocCurve, lines: Sequence[DetectorFigures], draws: int) -> str:
    area = next(line.auc for line in lines if (line.detector, line.draws) == (one.detector, draws))
    return f"{one.detector}, AUC {area.value:.3f}"


def _clear(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"


def _percents(shares: Sequence[float]) -> list[float]:
    return _round([100 * share for share in shares])


def _round(values: Any) -> list[float]:
    """Return plain numbers with as many digits as can be seen: the page stays small."""
    return [float(f"{value:.5g}") for value in values]
