"""How well detectors find the embedded model's memorized captions, and what each costs.

    python bench/accuracy.py [--full] [--json FILE]

AUC and TPR@1%FPR on held-out captions. Positives are those of whose generations at least 9 of 16 are copies of training
pictures (labels of bench/tiny/label.py), and apart from them those of which 3 to 8 are; negatives, of which at most 2
are. All of them are of groups that the model was trained on; --by-group also shows each group of positives and of
negatives alone, and captions that it was not trained on.

A seed is one draw of noise for all captions, the first one the engine's own,
which γ was fitted on; figures are means over seeds. TPR@1%FPR is the strict convention: the highest TPR at an FPR of at
most 1 %. Intervals are the 2.5 and 97.5 percentiles of 2000 resamples of positives and, separately, negatives, the same
for all seeds and detectors. Passes are UNet evaluations per caption and draw; seconds are a processor's, with one
thread.

Without --full: the engine's own noise, and detectors that take at most 19 passes. With it: all, and 3 seeds (an hour).
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from memedge import Detector
from memedge.detectors import NAMES, make
from memedge.embedded import EMBEDDED_ENGINE, Caption, captions
from memedge.engine.engine import Engine
from memedge.metrics import auc, percentiles, resample, tpr

CHEAP = tuple(name for name in NAMES if name not in ("norm-50", "p-laplace", "p-laplace-image", "sharpness-exact"))
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
    """A figure's mean over seeds with its interval, and each seed's."""

    mean: float
    interval: tuple[float, float]
    by_seed: list[float]


@dataclass(frozen=True)
class Row:
    """What the table shows of one detector."""

    positives: str
    negatives: str
    detector: str
    auc: Figure
    tpr: Figure
    passes: float
    seconds: float


def measure(name: str, engine: Engine, captions: list[str], seeds: int) -> Values:
    """Return a detector's values on the engine's own draw, and on one of each of the seeds 1, 2, …"""
    columns, seconds = [], 0.0
    for seed in (None, *range(1, seeds)):
        statistic = make(name, engine, 1, seed=seed, checkpoint=str(CHECKPOINT))
        start = time.process_time()
        columns.append(statistic(captions)[:, 0])
        seconds += time.process_time() - start
    return Values(name, statistic.passes, seconds / (seeds * len(captions)), np.stack(columns))


def kind(caption: Caption) -> str:
    """Return which of KINDS a caption is, by what the model makes of it."""
    return "memorized" if caption.memorized else "clean" if caption.clean else "in part"


def figure(statistic, positive: np.ndarray, negative: np.ndarray) -> Figure:
    """Return a statistic of values [seeds, P] and [seeds, N]."""
    pairs = resample(positive.shape[1], negative.shape[1])
    resamples = np.concatenate([statistic(positive[:, p], negative[:, n]) for p, n in pairs], axis=1)
    found = statistic(positive, negative)
    return Figure(float(found.mean()), percentiles(resamples.mean(axis=0)), [float(value) for value in found])


def _cells(found: Figure) -> tuple[str, str]:
    mean = f"{found.mean:.3f} [{found.interval[0]:.3f}, {found.interval[1]:.3f}]"
    return mean, " ".join(f"{value:.3f}" for value in found.by_seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="an engine of the embedded model; default: the embedded one")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--precision")
    parser.add_argument("--detector", action="append", choices=NAMES, help="may be repeated; default: the cheap ones")
    parser.add_argument("--seeds", type=int, help="default: 1, with --full 3")
    parser.add_argument("--full", action="store_true", help="all detectors, and 3 seeds")
    parser.add_argument("--by-group", action="store_true", help="each group of positives and negatives, too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.detector or (NAMES if arguments.full else CHEAP)
    seeds = arguments.seeds or (3 if arguments.full else 1)
    chosen = [caption for caption in captions() if caption.split == "held-out"]
    if not arguments.by_group:
        chosen = [caption for caption in chosen if caption.group in SEEN]
    prompts = [caption.prompt for caption in chosen]
    group = np.array([caption.group for caption in chosen])
    kinds = np.array([kind(caption) for caption in chosen])
    engine = Engine.open(arguments.engine or EMBEDDED_ENGINE, arguments.provider, arguments.precision, 1)
    detector = Detector(engine)
    console = Console(width=140)
    measured = []
    for name in names:
        measured.append(measure(name, engine, prompts, seeds))
        console.print(f"{name}: {measured[-1].seconds:.3f} s per caption")

    results = []
    seen = np.isin(group, SEEN)
    positives = {name: seen & (kinds == name) for name in KINDS[:2]}
    negatives = {"clean": seen & (kinds == "clean")}
    if arguments.by_group:
        positives |= {f"memorized, {name}": (group == name) & (kinds == "memorized") for name in SEEN}
        negatives |= {f"clean, {name}": (group == name) & (kinds == "clean") for name in (*SEEN, "unseen")}
    for positive_name, positive in positives.items():
        for negative_name, negative in negatives.items():
            if not positive.any() or not negative.any():
                continue
            for values in measured:
                pair = values.by_seed[:, positive], values.by_seed[:, negative]
                results.append(
                    Row(
                        f"{positive_name} ({positive.sum()})",
                        f"{negative_name} ({negative.sum()})",
                        values.detector,
                        figure(auc, *pair),
                        figure(partial(tpr, percent=1), *pair),
                        values.passes,
                        values.seconds,
                    )
                )

    titles = ("detector", "AUC [95 %]", "by seed", "TPR@1%FPR [95 %]", "by seed", "passes", "s")
    for pair in dict.fromkeys((row.positives, row.negatives) for row in results):
        table = Table(*titles, box=None, title=f"{pair[0]} against {pair[1]}", title_justify="left")
        for row in results:
            if (row.positives, row.negatives) == pair:
                cells = [cell for found in (row.auc, row.tpr) for cell in _cells(found)]
                table.add_row(row.detector, *cells, f"{row.passes:g}", f"{row.seconds:.3f}")
        console.print(table)

    scores = detector.score(prompts)

    def called(name: str, of: str) -> str:
        some = (group == name) & (kinds == of)
        return f"{(scores.memorized & some).sum()} of {some.sum()} {of}"

    verdicts = {name: ", ".join(called(name, of) for of in KINDS) for name in dict.fromkeys(group.tolist())}
    for name, text in verdicts.items():
        console.print(f"held-out {name}: called memorized {text}")
    means = {name: float(scores.norm[group == name].mean()) for name in verdicts}
    console.print("mean norm: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    console.print(f"{detector.info.key}, {seeds} seed(s), {detector.info.calibration}")
    if arguments.json:
        table_rows = [asdict(row) for row in results]
        arguments.json.write_text(json.dumps({"table": table_rows, "verdicts": verdicts, "mean_norm": means}, indent=1))


if __name__ == "__main__":
    main()
