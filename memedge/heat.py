"""The picture of `memedge explain`, and the colours of words: red carries the score, blue lowers it."""

import math
import warnings
from io import BytesIO
from pathlib import Path

from memedge.engine import atomic
from memedge.explain import Explanation

Colour = tuple[int, int, int]
LABELS = {
    "mask": "how much the score falls when the word is masked",
    "gradient": "how steeply the norm changes with the word's embeddings",
}
WHITE, RED, BLUE = (255, 255, 255), (214, 64, 48), (56, 120, 200)


def scale(explanation: Explanation) -> float:
    """Return the significance of the deepest colour: of maskings none is deep in a prompt far below the threshold."""
    found = [abs(word.significance) for word in explanation.words if word.significance is not None]
    if explanation.method == "mask":  # a gradient is no share of the score
        found += [abs(explanation.score), abs(explanation.threshold or 0)]
    return max(found, default=0) or 1e-12


def colour(significance: float, deepest: float) -> Colour:
    """Return red, blue or what lies between it and white; black can be read on all of them."""
    share, full = abs(significance) / deepest, RED if significance > 0 else BLUE
    red, green, blue = (round(w + share * (f - w)) for w, f in zip(WHITE, full, strict=True))
    return red, green, blue


def draw(explanation: Explanation, path: Path) -> bool:
    """Draw a bar per word that is read, in the prompt's order; write it to `path`, a .png or .svg.

    Returns whether the font has all characters of these words; those it lacks are boxes.
    """
    from matplotlib.figure import Figure

    deepest = scale(explanation)
    read = [(word.text, word.significance) for word in explanation.words if word.significance is not None]
    rows, values = range(len(read)), [value for _, value in read]
    figure = Figure(figsize=(7, 1.6 + 0.28 * max(1, len(read))), layout="constrained")
    axes = figure.subplots()
    colours = [tuple(part / 255 for part in colour(value, deepest)) for value in values]
    axes.barh(rows, values, color=colours, edgecolor="#333333", linewidth=0.6)
    decimals = max(0, 2 - math.floor(math.log10(max(map(abs, values), default=0) or 1)))  # three digits of the largest
    for row, value in zip(rows, values, strict=True):
        place = (max(value, 0), row)
        axes.annotate(
            f"{value:+.{decimals}f}".replace("-", "−"),
            place,
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    # A prompt is not ours: a $ in it begins no formula.
    axes.set_yticks(rows, [_shown(text) for text, _ in read], parse_math=False)
    axes.set_ylim(max(1, len(read)) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.set_xlabel(LABELS[explanation.method])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    unread = len(explanation.words) - len(read)
    heading = title(explanation) + (f"; {unread} more words are not read" if unread else "")
    prompt = _shown(explanation.prompt, 80)
    axes.set_title(f"“{prompt}”\n{heading}", fontsize=10, loc="left", parse_math=False)
    content = BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(content, format=path.suffix[1:].lower(), dpi=120)
    missing = [w for w in caught if "missing from font" in str(w.message)]
    for other in (w for w in caught if w not in missing):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    atomic.write(path, content.getvalue())
    return not missing


def title(explanation: Explanation) -> str:
    """Return what the score is, in words."""
    name = {"calibrated": "score", "published": "score by published γ", "norm": "norm"}[explanation.kind]
    threshold = "" if explanation.threshold is None else f", threshold {explanation.threshold:.4g}"
    return f"{name} {explanation.score:.4g}{threshold}"


def _shown(text: str, most: int = 40) -> str:
    """Return text short enough for a label, without what would break its line."""
    line = "".join(c if c.isprintable() else "·" for c in text)
    return line if len(line) <= most else f"{line[: most - 1]}…"
