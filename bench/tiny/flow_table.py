"""Do norm and alignment work on a flow-matching model? Its table, and the embedded UNet's on the same concepts.

    python bench/tiny/flow_table.py ENGINE LABELS.csv      # the engine, and what label.py --flow wrote

Each model's captions are labelled by what it generates itself. ENGINE is calibrated on the calibration split first, as
`memedge calibrate` does it; all figures are of held-out captions of groups that were trained on, with 95 % intervals
(2000 resamples of captions). Then: how alike Δv is on different draws of noise, at σ = 1 and below.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from label import kind

from memedge.calibration.calibrate import calibrate
from memedge.commands.calibrate import print_calibrated
from memedge.detectors import make
from memedge.embedded import EMBEDDED_ENGINE, captions
from memedge.engine.denoiser import Denoiser
from memedge.engine.engine import Engine
from memedge.metrics import auc, interval, tpr
from memedge.prompts.labelled import Prompts

SHOWN = (
    *(("norm", draws) for draws in (1, 4, 16)),
    *((name, 1) for name in ("alignment", "alignment-cond-uncond", "alignment-cond-delta")),
    *(("anisotropy", draws) for draws in (1, 4)),
)
DRAWS = 8


@dataclass(frozen=True)
class Labelled:
    """A caption, its group, and which kind it is by what a model generates."""

    prompt: str
    group: str
    split: str
    kind: str


def read(path: Path) -> list[Labelled]:
    """Return what label.py wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        Labelled(row["caption"], row["group"], row["split"], kind(int(row["replicas"]), int(row["generations"])))
        for row in rows
    ]


def with_interval(measure: Callable[..., np.ndarray], positive: np.ndarray, negative: np.ndarray) -> str:
    """Return a figure of the scores of captions that are to be found, and of others, with its 95 % interval."""
    low, high = interval(measure, positive, negative)
    return f"{float(measure(positive, negative)):.3f} [{float(low):.3f}, {float(high):.3f}]"


def table(engine: Engine, rows: list[Labelled]) -> None:
    """Print each detector's AUC and TPR on held-out captions."""
    held_out = [row for row in rows if row.split == "held-out" and row.group != "unseen"]
    some = {name: [row.prompt for row in held_out if row.kind == name] for name in ("memorized", "clean")}
    print(f"{len(some['memorized'])} memorized, {len(some['clean'])} clean")
    print("| detector | AUC | TPR@1%FPR | mean, memorized | mean, clean |\n|---|---|---|---|---|")
    for name, draws in SHOWN:
        statistic = make(name, engine, draws)
        positive, negative = (statistic(prompts).mean(axis=1) for prompts in some.values())
        cells = [f"{name} × {draws}"]
        cells += [with_interval(measure, positive, negative) for measure in (auc, partial(tpr, percent=1))]
        cells += [f"{positive.mean():.3f}", f"{negative.mean():.3f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def alike(engine: Engine, prompts: list[str]) -> None:
    """Print the cosine of Δ on pairs of draws, and the deviation of its norm over draws relative to their mean."""
    denoiser, states = Denoiser(engine), engine.encode(engine.tokenize(prompts)[0])
    noise = denoiser.noise(DRAWS)
    for timestep in denoiser.manifest.timesteps:
        place = np.repeat(np.arange(len(prompts)), DRAWS)
        cond = denoiser.predict(states, place, np.tile(noise, (len(prompts), 1, 1, 1)), timestep)
        uncond = denoiser.uncond(noise, timestep)
        delta = (cond.reshape(len(prompts), DRAWS, -1) - uncond.reshape(DRAWS, -1)).astype(np.float64)
        length = np.linalg.norm(delta, axis=2)
        unit = delta / length[..., None]
        cosines = (unit @ unit.transpose(0, 2, 1))[:, *np.triu_indices(DRAWS, 1)].mean(axis=1)
        spread = 100 * np.median(length.std(axis=1) / length.mean(axis=1))
        print(f"t = {timestep}: cosine of two draws' Δ {np.median(cosines):.3f}, norm ± {spread:.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("labels", type=Path)
    arguments = parser.parse_args()
    rows = read(arguments.labels)
    lists = [
        Prompts.given((r.prompt for r in rows if (r.kind, r.split) == (name, "calibration")), f"labels.csv, {name}")
        for name in ("memorized", "clean")
    ]
    print_calibrated([calibrate(arguments.engine, *lists, provider="cpu", precision="fp32")])

    print("Flow matching:")
    flow, embedded = (Engine.open(path, "cpu", None, 1) for path in (arguments.engine, EMBEDDED_ENGINE))
    table(flow, rows)
    print("The embedded UNet, captions of the same concepts:")
    own = {row.prompt for row in rows}
    unet = [
        Labelled(row.prompt, row.group, row.split, kind(row.replicas, row.generations))
        for row in captions()
        if row.prompt in own
    ]
    table(embedded, unet)
    for name, engine, of in (("flow", flow, rows), ("UNet", embedded, unet)):
        for which in ("memorized", "clean"):
            print(f"{name}, {which}:")
            alike(engine, [row.prompt for row in of if (row.kind, row.split) == (which, "held-out")][:24])


if __name__ == "__main__":
    main()
