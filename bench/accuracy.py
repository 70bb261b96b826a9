"""Accuracy of the embedded engine on its held-out captions: AUC and TPR@1%FPR with bootstrap intervals, by group.

    python bench/accuracy.py [--json FILE]

Positives are captions whose generations replicate a training picture (labels of bench/tiny/label.py). Negatives are all
others, those included that were meant to be memorized but replicate in fewer than 5 of 8 generations. TPR@1%FPR is the
strict convention: the highest TPR at an FPR of at most 1 %. Intervals are the 2.5 and 97.5 percentiles of 2000
resamples, positives and negatives resampled separately.
"""

import argparse
import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from memedge import Detector
from memedge.demo import CAPTIONS
from memedge.metrics import auc, interval, tpr

TPR_AT_1_PERCENT = partial(tpr, percent=1)
SEEN = ("memorized", "partly", "template", "frequent", "rare")
POSITIVES = {"memorized": ("memorized",), "partly, template": ("partly", "template")}
NEGATIVES = {
    "all seen": SEEN,
    "frequent": ("frequent",),
    "rare": ("rare",),
    "partly, template": ("partly", "template"),
    "memorized by design only": ("memorized",),
    "unseen": ("unseen",),
}


def columns(detector: Detector, prompts: list[str]) -> dict[str, np.ndarray]:
    """Return the statistics to compare, each oriented so that larger means memorized in the calibrated score."""
    scores, flat = detector.score(prompts), detector.score(prompts, alignment="flat")
    sign = np.sign(detector.info.calibration.gamma_alignment)
    return {
        "norm": scores.norm,
        "alignment, channel": sign * scores.alignment,
        "alignment, flat": sign * flat.alignment,
        "score": scores.score,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="an engine of the embedded model; default: the embedded one")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--precision")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with CAPTIONS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "held-out"]
    detector = Detector.load(arguments.engine, provider=arguments.provider, precision=arguments.precision)
    statistics = columns(detector, [row["caption"] for row in rows])
    group = np.array([row["group"] for row in rows])
    memorized = np.array([row["memorized"] == "true" for row in rows])

    results = []
    for positive_name, positive_groups in POSITIVES.items():
        for negative_name, negative_groups in NEGATIVES.items():
            positive = np.isin(group, positive_groups) & memorized
            negative = np.isin(group, negative_groups) & ~memorized
            if not positive.any() or not negative.any():
                continue
            for name, values in statistics.items():
                pair = values[positive], values[negative]
                results.append(
                    {
                        "positives": f"{positive_name} ({positive.sum()})",
                        "negatives": f"{negative_name} ({negative.sum()})",
                        "statistic": name,
                        "auc": float(auc(*pair)),
                        "auc_interval": [float(end) for end in interval(auc, *pair)],
                        "tpr": float(TPR_AT_1_PERCENT(*pair)),
                        "tpr_interval": [float(end) for end in interval(TPR_AT_1_PERCENT, *pair)],
                    }
                )
    verdict = statistics["score"] >= detector.info.calibration.threshold
    verdicts = {
        name: f"{(verdict & memorized)[group == name].sum()} of {memorized[group == name].sum()} memorized found, "
        f"{(verdict & ~memorized)[group == name].sum()} of {(~memorized)[group == name].sum()} others called memorized"
        for name in dict.fromkeys(group.tolist())
    }

    table = Table("positives", "negatives", "statistic", "AUC [95 %]", "TPR@1%FPR [95 %]", box=None)
    for r in results:
        cells = [f"{r[k]:.3f} [{r[k + '_interval'][0]:.3f}, {r[k + '_interval'][1]:.3f}]" for k in ("auc", "tpr")]
        table.add_row(r["positives"], r["negatives"], r["statistic"], *cells)
    console = Console(width=120)
    console.print(table)
    for name, text in verdicts.items():
        console.print(f"held-out {name}: {text}")
    means = {name: float(statistics["norm"][group == name].mean()) for name in verdicts}
    console.print("mean norm: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    console.print(f"{detector.info.key}, {detector.info.manifest.draws} draw(s), {detector.info.calibration}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"table": results, "verdicts": verdicts, "mean_norm": means}, indent=1))


if __name__ == "__main__":
    main()
