"""What the screen decides and misses on the embedded model, and whether its promise holds there.

    python bench/screen.py [--splits N] [--halves N] [--seeds 1,2] [--work DIR] [--json FILE]

- held-out: the shipped calibration, on captions of concepts that it has not seen
- taps: each tap fitted to the calibration captions, on the held-out ones
- variants: changed captions (bench/tiny/variants.csv) that replicate, among those that the full rule finds
- random halves: the whole procedure (γ, threshold, tap, read-out, cut) fitted to half of all captions, the other half
  judged: there prompts are exchangeable, so that misses may not exceed α, but for Monte Carlo error
- halves of the concepts: likewise, with all captions of a concept on one side: what a new concept meets
- seeds: engines with other noise, exported and calibrated here, some minutes each
"Missed" are memorized captions that the full rule finds and the screen passes. One thread; statistics are kept in
--work, so that a second run takes a minute.
"""

import argparse
import csv
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from memedge.calibration.calibrate import calibrate
from memedge.calibration.fitting import fit_best
from memedge.calibration.screening import fit_screen
from memedge.calibration.statistics import CHOICES
from memedge.decision.rule import DEFAULT_ALIGNMENT
from memedge.decision.screen import features
from memedge.detector import Detector
from memedge.embedded import EMBEDDED_ENGINE, captions
from memedge.engine.engine import Engine
from memedge.engine.manifest import Screen
from memedge.export.export import export
from memedge.metrics import binomial
from memedge.prompts.labelled import Prompts

TINY = Path(__file__).parent / "tiny"
sys.path.insert(0, str(TINY))
TARGET_FPR = 0.01
ROWS = captions()
MEMORIZED, CLEAN = (np.array([getattr(row, name) for row in ROWS]) for name in ("memorized", "clean"))
HELD_OUT = np.array([row.split == "held-out" for row in ROWS])


@dataclass
class Line:
    """What a screen did: clean captions decided, of how many; found memorized ones missed, of how many; α."""

    name: str
    decided: int
    clean: int
    missed: int
    found: int
    alpha: float


def concepts() -> np.ndarray:
    """Return the concept of each caption, without the template that it stands in."""
    from dataset import ON_BACKGROUND, TEMPLATES

    patterns = [
        re.compile("^" + re.escape(one).replace(r"\{\}", "(.+?)") + "$")
        for one in sorted((*TEMPLATES, ON_BACKGROUND), key=len, reverse=True)
    ]
    return np.array([next(m[1] for one in patterns if (m := one.match(row.prompt))) for row in ROWS])


def measured(engine: Engine, prompts: list[str], place: Path) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return norm and alignments, [B, 1 + len(CHOICES)], and changes by tap; from the file `place` if it is there."""
    taps = range(1, 1 + len(engine.directory.manifest.taps))
    if not place.exists():
        parts = []
        for start in track(range(0, len(prompts), 16), place.stem):
            states = engine.encode(engine.tokenize(prompts[start : start + 16])[0])
            own = [engine.norm(states)]
            for pair in CHOICES:
                draws = [
                    engine.alignments(states, states.all, draw, DEFAULT_ALIGNMENT, pair) for draw in range(engine.draws)
                ]
                own.append(np.mean(draws, axis=0))
            parts.append(np.concatenate([np.stack(own, 1), *(engine.changes(states, tap) for tap in taps)], axis=1))
        np.save(place, np.concatenate(parts))
    found = np.load(place)
    widths = [1 + len(CHOICES), *(tap.channels for tap in engine.directory.manifest.taps)]
    statistics, *changes = np.split(found, np.cumsum(widths)[:-1], axis=1)
    return statistics, changes


def count(name: str, screen: Screen, changes: list[np.ndarray], scores: np.ndarray, threshold: float, some) -> Line:
    """Return what a screen does with the captions `some`, bool [B]."""
    readout = features(changes[screen.tap - 1]) @ np.array(screen.weights) + screen.intercept
    passed, found = readout < screen.cut, MEMORIZED & (scores >= threshold) & some
    clean = CLEAN & some
    return Line(
        name, int((passed & clean).sum()), int(clean.sum()), int((passed & found).sum()), int(found.sum()), screen.alpha
    )


def whole_procedure(name: str, statistics, changes, fit, judge) -> Line | None:
    """Fit all to the captions `fit`; return what the screen does with the captions `judge`, or None without one."""
    fit = fit & (MEMORIZED | CLEAN)
    chosen, fitted = fit_best(statistics[fit], MEMORIZED[fit], TARGET_FPR)
    scores = statistics[:, 0] + fitted.gamma_alignment * statistics[:, 1 + chosen]
    screen = fit_screen([one[fit] for one in changes], scores[fit], MEMORIZED[fit], fitted.threshold)
    return None if isinstance(screen, str) else count(name, screen, changes, scores, fitted.threshold, judge)


def halves(name: str, statistics, changes, of: np.ndarray, times: int) -> list[Line]:
    """Fit to half of the groups that `of` names, and judge the others."""
    generator, names, lines = np.random.default_rng(0), np.unique(of), []
    for _ in track(range(times), name):
        fit = np.isin(of, generator.permutation(names)[: len(names) // 2])
        lines.append(whole_procedure(name, statistics, changes, fit, ~fit))
    return [line for line in lines if line]


def together(name: str, lines: list[Line]) -> Line:
    """Return the sums, and the mean α."""
    sums = [sum(getattr(line, part) for line in lines) for part in ("decided", "clean", "missed", "found")]
    return Line(f"{name} ({len(lines)})", *sums, float(np.mean([line.alpha for line in lines])))


def of_seed(seed: int, work: Path) -> Line:
    """Return what the screen of an engine with other noise does with the held-out captions."""
    folder = work / f"seed-{seed}"
    if not folder.exists():
        export(TINY / "emoji", folder, seed=seed)
    detector = Detector.load(folder, "cpu", threads=1)
    statistics, changes = measured(detector.engine, [row.prompt for row in ROWS], work / f"seed-{seed}.npy")
    if detector.info.calibration is None:
        lists = [
            Prompts.given(row.prompt for row, one in zip(ROWS, kind & ~HELD_OUT, strict=True) if one)
            for kind in (MEMORIZED, CLEAN)
        ]
        calibrate(folder, *lists, TARGET_FPR, provider="cpu", threads=1)
        detector = Detector.load(folder, "cpu", threads=1)
    return of_calibration(f"noise seed {seed}", detector, statistics, changes)


def of_calibration(name: str, detector: Detector, statistics, changes) -> Line:
    found = detector.info.calibration
    scores = statistics[:, 0] + found.gamma_alignment * statistics[:, 1 + CHOICES.index(found.operands)]
    return count(name, found.screen, changes, scores, found.threshold, HELD_OUT)


def of_variants(detector: Detector) -> Line:
    """Return what the screen does with changed captions that replicate."""
    with (TINY / "variants.csv").open(newline="", encoding="utf-8") as file:
        prompts = [row["prompt"] for row in csv.DictReader(file) if row["memorized"] == "true"]
    scores, verdicts = detector.score(prompts), detector.detect(prompts, "screen")
    found = [verdict for verdict, one in zip(verdicts, scores.memorized, strict=True) if one]
    missed = sum(verdict.norm is None for verdict in found)
    return Line("changed captions", 0, 0, missed, len(found), detector.info.calibration.screen.alpha)


def show(lines: list[Line]) -> None:
    table = Table("captions", box=None)
    for column in ("clean decided", "found memorized missed", "95 % interval", "α"):
        table.add_column(column, justify="right")
    for one in lines:
        decided = f"{one.decided / one.clean:.1%} of {one.clean}" if one.clean else "—"
        _, low, high = binomial(one.missed, one.found)
        interval = f"{low:.2%} to {high:.2%}"
        table.add_row(one.name, decided, f"{one.missed} of {one.found}", interval, f"{one.alpha:.2%}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=20, help="random halves")
    parser.add_argument("--halves", type=int, default=20, help="halves of the concepts")
    parser.add_argument("--seeds", default="", help="noise seeds, with commas")
    parser.add_argument("--work", type=Path, default=Path("screen-work"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    detector = Detector.load(EMBEDDED_ENGINE, "cpu", threads=1)
    manifest = detector.info.manifest
    statistics, changes = measured(detector.engine, [row.prompt for row in ROWS], arguments.work / "embedded.npy")
    lines = [of_calibration("held out", detector, statistics, changes)]
    for tap in range(1, len(manifest.taps) + 1):
        name = f"tap {tap}, {manifest.tap_share(tap):.2%} of a row"
        alone = [one if place == tap else np.full_like(one, np.nan) for place, one in enumerate(changes, start=1)]
        lines += filter(None, [whole_procedure(name, statistics, alone, ~HELD_OUT, HELD_OUT)])
    lines.append(of_variants(detector))
    lines += [of_seed(int(seed), arguments.work) for seed in arguments.seeds.split(",") if seed]
    of = {"random halves": (np.arange(len(ROWS)), arguments.splits)}
    of["halves of the concepts"] = (concepts(), arguments.halves)
    for name, (groups, times) in of.items():
        if times:
            lines.append(together(name, halves(name, statistics, changes, groups, times)))
    show(lines)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")


if __name__ == "__main__":
    main()
