"""How well detectors find the embedded model's memorized captions, and what each costs.

    python bench/accuracy.py [--full] [--by-group] [--captions N] [--json FILE]

AUC and TPR@1%FPR on held-out captions. Positives are those of whose generations at least 9 of 16 are copies of training
pictures (labels of bench/tiny/label.py), and apart from them those of which 3 to 8 are; negatives, of which at most 2
are. All of them are of groups that the model was trained on. --by-group also shows each group of positives against all
negatives, and all positives against each group of negatives. A last table has TPR@0.1%FPR against all captions that the
model was not trained on, those of the calibration split too, on which thresholds and γ have been fitted: a thousandth
of fewer could not be told from nothing.

A seed is one draw of noise for all captions, or as many as "norm x 4" says, the first ones the engine's own, which γ
was fitted on; figures are means over seeds. TPR at an FPR is by the strict convention: the highest at an FPR of at most
that. Intervals are the 2.5 and 97.5 percentiles of 2000 resamples of positives and, separately, negatives, the same for
all seeds and detectors, so that differences are paired. "beyond norm" is a detector's AUC minus that of the norm with
as many draws as cost no more passes; its p is two-sided, of the difference over its bootstrap's standard error, and
corrected for all differences of all tables (Holm, 1979). Passes are UNet evaluations per caption and seed; seconds are
a processor's, with one thread.

Without --full: the engine's own noise, and detectors that take at most 19 passes. With it: 3 seeds of these, and one of
all others (two hours).
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import norm as gaussian

from memedge import Detector
from memedge.decision.reasons import rule_in_words
from memedge.detectors import NAMES, make
from memedge.embedded import EMBEDDED_ENGINE, Caption, captions
from memedge.engine.engine import Engine
from memedge.metrics import auc, percentiles, resample, tpr

ALL = tuple(name for name in NAMES if name != "norm-guidance")  # whose model is told a guidance scale, and this isn't
DEAR = ("norm-50", "p-laplace", "p-laplace-image", "sharpness-exact")
CHEAP = tuple(name for name in ALL if name not in DEAR)
DRAWS = {"norm": (1, 2, 4, 16), "anisotropy": (1, 2, 8)}  # 1 of every other detector
CHECKPOINT = Path(__file__).parent / "tiny" / "emoji"
KINDS = ("memorized", "in part", "clean")
SEEN = ("memorized", "near", "template", "partly", "frequent", "seen")


@dataclass(frozen=True)
class Values:
    """A detector's values of all captions, float64 [seeds, B], and its cost."""

    detector: str
    passes: float
    seconds: float
    by_seed: np.ndarray


@dataclass(frozen=True)
class Figure:
    """A figure's mean over seeds with its interval, each seed's, and the standard error of the mean over captions."""

    mean: float
    interval: tuple[float, float]
    by_seed: list[float]
    error: float


@dataclass(frozen=True)
class Row:
    """What a table shows of one detector; `beyond` is None of the norm itself, and p before it is corrected."""

    positives: str
    negatives: str
    detector: str
    auc: Figure
    tpr: Figure
    beyond: Figure | None
    p: float | None
    passes: float
    seconds: float


def measure(name: str, engine: Engine, captions: list[str], seeds: int, draws: int) -> Values:
    """Return a detector's values on the engine's own draws, and on those of each of the seeds 1, 2, …"""
    columns, seconds = [], 0.0
    for seed in (None, *range(1, seeds)):
        statistic = make(name, engine, draws, seed=seed, checkpoint=str(CHECKPOINT))
        start = time.process_time()
        columns.append(statistic(captions).mean(axis=1))
        seconds += time.process_time() - start
    shown = name if draws == 1 else f"{name} x {draws}"
    return Values(shown, draws * statistic.passes, seconds / (seeds * len(captions)), np.stack(columns))


def kind(caption: Caption) -> str:
    """Return which of KINDS a caption is, by what the model makes of it."""
    return "memorized" if caption.memorized else "clean" if caption.clean else "in part"


def figure(statistic, positive: np.ndarray, negative: np.ndarray) -> Figure:
    """Return a statistic of values [seeds, P] and [seeds, N]."""
    pairs = resample(positive.shape[1], negative.shape[1])
    resamples = np.concatenate([statistic(positive[:, p], negative[:, n]) for p, n in pairs], axis=1).mean(axis=0)
    found = statistic(positive, negative)
    return Figure(float(found.mean()), percentiles(resamples), [float(v) for v in found], float(resamples.std()))


def difference(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Return how much higher the AUC of a detector is than that of another, [seeds] of [2 · seeds, …]: itself first."""
    own, other = np.split(auc(positive, negative), 2)
    return np.asarray(own - other)


def equally_dear(of: Values, measured: list[Values]) -> Values | None:
    """Return the norm with as many draws as cost no more passes than a detector, or None for the norm itself."""
    norms = [one for one in measured if one.detector.split(" x ")[0] == "norm"]
    if of in norms:
        return None
    return max((one for one in norms if one.passes <= of.passes), key=lambda one: one.passes, default=None)


def chance(difference: float, error: float) -> float:
    """Return the two-sided p-value of a difference with a standard error."""
    return float(2 * gaussian.sf(abs(difference) / error)) if error else 1.0


def holm(p: list[float]) -> list[float]:
    """Return p-values corrected for their number (Holm, Scandinavian Journal of Statistics 1979)."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(np.array(p)[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(steps, 1)
    return [float(value) for value in corrected]


def compare(values: Values, measured: list[Values], positive: np.ndarray, negative: np.ndarray) -> Row:
    """Return the row of a detector, given which captions are positives and negatives; names are filled in later."""
    pair = values.by_seed[:, positive], values.by_seed[:, negative]
    beyond = p = None
    if (other := equally_dear(values, measured)) is not None:
        seeds = min(len(values.by_seed), len(other.by_seed))
        both = np.concatenate([values.by_seed[:seeds], other.by_seed[:seeds]])
        beyond = figure(difference, both[:, positive], both[:, negative])
        p = chance(beyond.mean, beyond.error)
    of_auc, of_tpr = figure(auc, *pair), figure(partial(tpr, percent=1), *pair)
    return Row("", "", values.detector, of_auc, of_tpr, beyond, p, values.passes, values.seconds)


def spread(rows: list[Caption], count: int | None) -> list[Caption]:
    """Return all captions, or so many of each group, evenly over the file."""
    if count is None:
        return rows
    of_group = [[row for row in rows if row.group == name] for name in dict.fromkeys(row.group for row in rows)]
    return [some[i] for some in of_group for i in np.linspace(0, len(some) - 1, min(count, len(some))).astype(int)]


def _cells(found: Figure) -> tuple[str, str]:
    return _cell(found), " ".join(f"{value:.3f}" for value in found.by_seed)


def _cell(found: Figure, sign: str = "") -> str:
    return f"{found.mean:{sign}.3f} [{found.interval[0]:{sign}.3f}, {found.interval[1]:{sign}.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="an engine of the embedded model; default: the embedded one")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--precision")
    parser.add_argument("--detector", action="append", choices=ALL, help="may be repeated; default: the cheap ones")
    parser.add_argument("--captions", type=int, help="of each group; default: all")
    parser.add_argument("--full", action="store_true", help="all detectors, and 3 seeds of the cheap ones")
    parser.add_argument("--by-group", action="store_true", help="each group of positives and negatives, too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.detector or (ALL if arguments.full else CHEAP)
    engine = Engine.open(arguments.engine or EMBEDDED_ENGINE, arguments.provider, arguments.precision, 1)
    console = Console(width=170)

    chosen = spread([row for row in captions() if row.split == "held-out" and row.group in SEEN], arguments.captions)
    prompts = [row.prompt for row in chosen]
    group, kinds = np.array([row.group for row in chosen]), np.array([kind(row) for row in chosen])
    measured = []
    for name in names:
        for draws in DRAWS.get(name, (1,)):
            measured.append(measure(name, engine, prompts, 3 if arguments.full and name in CHEAP else 1, draws))
            console.print(f"{measured[-1].detector}: {measured[-1].seconds:.3f} s per caption")

    some = {name: kinds == name for name in KINDS}
    pairs = [("memorized", "clean"), ("in part", "clean")]
    if arguments.by_group:
        some |= {f"{of}, {name}": some[of] & (group == name) for of in ("memorized", "clean") for name in SEEN}
        pairs += [(f"memorized, {name}", "clean") for name in SEEN]
        pairs += [("memorized", f"clean, {name}") for name in SEEN]
    titled = {name: f"{name} ({rows.sum()})" for name, rows in some.items()}
    results = [
        replace(compare(values, measured, some[of], some[to]), positives=titled[of], negatives=titled[to])
        for of, to in pairs
        if some[of].any() and some[to].any()
        for values in measured
    ]
    corrected = iter(holm([row.p for row in results if row.p is not None]))
    results = [row if row.p is None else replace(row, p=next(corrected)) for row in results]

    titles = (
        "detector",
        "passes",
        "AUC [95 %]",
        "by seed",
        "beyond norm [95 %]",
        "p",
        "TPR@1%FPR [95 %]",
        "by seed",
        "s",
    )
    for pair in dict.fromkeys((row.positives, row.negatives) for row in results):
        table = Table(*titles, box=None, title=f"{pair[0]} against {pair[1]}", title_justify="left")
        for row in results:
            if (row.positives, row.negatives) == pair:
                beyond = ("", "") if row.beyond is None else (_cell(row.beyond, "+"), f"{row.p:.2g}")
                cells = (*_cells(row.auc), *beyond, *_cells(row.tpr), f"{row.seconds:.3f}")
                table.add_row(row.detector, f"{row.passes:g}", *cells)
        console.print(table)

    scores = Detector(engine).score(prompts)
    verdicts = {}
    for name in dict.fromkeys(group.tolist()):
        some = {of: (group == name) & (kinds == of) for of in KINDS}
        verdicts[name] = ", ".join(
            f"{(scores.memorized & rows).sum()} of {rows.sum()} {of}" for of, rows in some.items()
        )
        console.print(f"held-out {name}: called memorized {verdicts[name]}")
    means = {name: float(scores.norm[group == name].mean()) for name in verdicts}
    console.print("mean norm: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    untrained = spread([row for row in captions() if row.group == "unseen" and row.clean], arguments.captions)
    others = [row.prompt for row in untrained]
    called = int(Detector(engine).score(others).memorized.sum())
    console.print(f"clean captions never trained on: called memorized {called} of {len(others)}")
    rare = {}
    for name in ("norm", "anisotropy"):
        statistic = make(name, engine, 1)
        pair = statistic([p for p, of in zip(prompts, kinds, strict=True) if of == "memorized"]).T, statistic(others).T
        rare[name] = figure(partial(tpr, percent=0.1), *pair)
        console.print(f"TPR@0.1%FPR of {name} against these: {_cell(rare[name])}")
    console.print(f"{engine.backend.key}: {rule_in_words(Detector(engine).info.rule)}")
    if arguments.json:
        table_rows = [asdict(row) for row in results]
        never = {name: asdict(found) for name, found in rare.items()}
        found = {"table": table_rows, "verdicts": verdicts, "mean_norm": means, "never_trained": never}
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
