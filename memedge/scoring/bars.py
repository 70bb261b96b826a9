"""Bins as bars: an SVG that needs no script, in the colours of the page it stands in. Hovering names a bar's values."""

import math
from collections.abc import Callable
from html import escape

from memedge.scoring.distribution import Bins

WIDTH, HEIGHT = 440, 250  # of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 46, 430, 24, 208  # of the bars' box
LEAST = 0.5  # rows at the foot of a logarithmic axis, so that one row is seen
NARROW = 0.6  # of a bin's width, for the only bar there is


def bars(bins: Bins, kind: str, threshold: float | None, logarithmic: bool) -> str:
    """Return a chart of the rows in each bin, with a line at the threshold where it is among them.

    Args:
        bins: what is drawn.
        kind: what was counted: the horizontal axis's name.
        threshold: values from it on have another colour.
        logarithmic: whether the height is by the logarithm of the rows.
    """
    low, high = bins.edges[0], bins.edges[-1]
    if low == high:
        low, high = low - NARROW, high + NARROW
    most = max(bins.rows)

    def across(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value - low) / (high - low)

    def height(rows: float) -> float:
        share = math.log(rows / LEAST) / math.log(most / LEAST) if logarithmic else rows / most
        return (BOTTOM - TOP) * share

    drawn = []
    for rows in _powers(most) if logarithmic else _ticks(0, most, 4, least=1):
        y = BOTTOM - height(rows)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y:.1f}" dy="4" text-anchor="end">{_short(rows)}</text>')
    for value in _ticks(low, high, 6):
        drawn.append(f'<text x="{across(value):.1f}" y="{BOTTOM + 17}" text-anchor="middle">{number(value)}</text>')
    drawn += [_bar(bins, place, across, height(rows), kind) for place, rows in enumerate(bins.rows) if rows]
    drawn.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    if threshold is not None and low < threshold < high:
        x = across(threshold)
        anchor, aside = ("start", 5) if x < (LEFT + RIGHT) / 2 else ("end", -5)
        drawn.append(f'<line class="threshold" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 18}" y2="{BOTTOM}"/>')
        words = f"threshold {number(threshold)}"
        drawn.append(f'<text x="{x + aside:.1f}" y="{TOP - 9}" text-anchor="{anchor}" class="name">{words}</text>')
    middle = (LEFT + RIGHT) / 2
    drawn.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle" class="name">{escape(kind)}</text>')
    scale = "logarithmic" if logarithmic else "linear"
    label = f"Rows by {kind}, on a {scale} scale; the figures are in the table below."
    inside = "\n".join(drawn)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">\n{inside}\n</svg>'


def number(value: float) -> str:
    """Return a score or a norm with four digits."""
    return f"{value:.4g}".replace("-", "−")


def _bar(bins: Bins, place: int, across: Callable[[float], float], height: float, kind: str) -> str:
    """Return a bar in a group that is as high as the chart, so that a low one can be pointed at too."""
    low, high = bins.edges[place], bins.edges[place + 1]
    if low == high:
        low, high = low - NARROW / 2, high + NARROW / 2
    x, width = across(low), across(high) - across(low)
    side = "low" if bins.split is None or place < bins.split else "high"
    words = f"{kind} {bins.words(place)}: {bins.rows[place]:,}"
    return (
        f'<g class="{side}"><title>{escape(words)}</title>'
        f'<rect class="reach" x="{x:.2f}" y="{TOP}" width="{width:.2f}" height="{BOTTOM - TOP}"/>'
        f'<rect x="{x + 0.5:.2f}" y="{BOTTOM - height:.2f}" width="{width - 1:.2f}" height="{height:.2f}"/></g>'
    )


def _ticks(low: float, high: float, most: int, least: float = 0) -> list[float]:
    """Return at most about `most` round numbers from `low` to `high`, at least `least` apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = max(least, next(one * power for one in (1, 2, 5, 10) if one * power >= (high - low) / most))
    return [step * place for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _powers(most: int) -> list[float]:
    """Return powers of ten up to `most`, at most six; of fewer than a hundred rows also 2, 5, 20 and 50."""
    if most < 100:
        return [one for one in (1, 2, 5, 10, 20, 50) if one <= most]
    powers = math.floor(math.log10(most))
    return [10.0**power for power in range(0, powers + 1, 1 + powers // 6)]


def _short(rows: float) -> str:
    """Return a count with few characters, such as 20k for 20 000."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if rows >= size:
            return f"{rows / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{rows:,.0f}"
