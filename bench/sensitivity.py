"""What the embedded engine's accuracy hangs on: draws, late timestep, weights, operands, precision, changed captions.

    python bench/sensitivity.py [--captions N] [--json FILE]

Positives are the held-out captions that replicate in most generations (labels of bench/tiny/label.py), and apart from
them those that do in part; negatives are all clean held-out captions that the model was trained on. In each row γ is
fitted anew on the calibration captions, by the function that `memedge calibrate` calls, so that a row says how good a
setting can be, and not how ill another's γ fits. The alignment is the cosine that the engine is calibrated for, but for
rows that name another.

What the alignment adds is AUC(score) − AUC(norm) with its paired bootstrap interval, and p, two-sided, of the
difference over its standard error, corrected for all rows of the table (Holm, 1979): among so many, one interval of
twenty lies beside 0 by chance.

- draws: n of 16 draws of noise; for n < 16 the mean over disjoint groups of draws, and the range. The score with n
  draws costs as many passes as the norm with 2n.
- t_cos: the timestep of the alignment; the noise stays pure, as in docs/methods.md §1.
- weights: those fitted, and equal after dividing each term by its deviation; ‖Δ‖ / ‖ε_0‖ for the norm; and with the
  published cosine, cos(ε_0, Δ), the published weights.
- operands: of the cosine, and over what it is taken.
- group: the positives of each group alone, by how the model met them, with the fitted weights.
- precision: engines of the same model, each with its own γ and threshold; Spearman's ρ of the score and the verdicts
  that differ, against fp32. fp16 as ONNX Runtime computes it on a CPU, bf16 where this CPU can.
- variants: captions changed a little (bench/tiny/variants.py), with labels of their own; γ and threshold as shipped.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import KINDS, SEEN, chance, holm, kind, spread
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from memedge import Detector
from memedge.calibration.fitting import fit_direction, fit_threshold
from memedge.decision.rule import DEFAULT_ALIGNMENT, DEFAULT_OPERANDS, Rule
from memedge.detectors.anisotropy import rule_of
from memedge.embedded import EMBEDDED_ENGINE
from memedge.embedded import captions as every_caption
from memedge.engine.arrays import Floats
from memedge.engine.denoiser import Denoiser, Latents
from memedge.engine.engine import Engine, States
from memedge.engine.errors import InputError, ProviderError
from memedge.engine.manifest import Alignment, Operands
from memedge.guidance import guidance_stats
from memedge.metrics import auc, interval, percentiles, resample

TINY = Path(__file__).parent / "tiny"
DRAWS = 16
LATE = (1, 41, 101, 201, 401, 601, 801, 981)
TARGET = 0.01


@dataclass(frozen=True)
class Captions:
    """The captions that the model was trained on, with their labels [B]."""

    prompts: list[str]
    kinds: np.ndarray
    groups: np.ndarray
    calibration: np.ndarray

    @staticmethod
    def read(count: int | None) -> "Captions":
        """Return all captions, or so many of each group and split."""
        splits = [
            [row for row in every_caption() if row.group in SEEN and row.split == s]
            for s in ("calibration", "held-out")
        ]
        rows = [row for of_split in splits for row in spread(of_split, count)]
        return Captions(
            [row.prompt for row in rows],
            np.array([kind(row) for row in rows]),
            np.array([row.group for row in rows]),
            np.array([row.split == "calibration" for row in rows]),
        )

    @property
    def fitted_on(self) -> np.ndarray:
        """Which γ is fitted on: what replicates in part is neither memorized nor clean."""
        return self.calibration & (self.kinds != "in part")

    @property
    def memorized(self) -> np.ndarray:
        return self.kinds == "memorized"

    def fit(self, features: np.ndarray) -> np.ndarray:
        """Return (1, γ) fitted to features [B, 2] of the calibration captions."""
        return np.asarray(fit_direction(features[self.fitted_on], self.memorized[self.fitted_on]).gamma)

    def pairs(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield the name of each kind of positives, and which captions are held-out positives and negatives."""
        held_out = ~self.calibration
        for name in KINDS[:2]:
            yield name, held_out & (self.kinds == name), held_out & (self.kinds == "clean")


@dataclass(frozen=True)
class Row:
    """One setting: AUCs of the norm, the alignment and the score, and what the alignment adds, [least, greatest]."""

    part: str
    setting: str
    positives: str
    gamma: str
    norm: float
    alignment: float
    score: float
    gain: float
    gain_interval: tuple[float, float]
    p: float | None = None
    note: str = ""


def gain(positive: np.ndarray, negative: np.ndarray) -> tuple[tuple[float, float], float]:
    """Return the interval of AUC(score) − AUC(norm), and its p, given norm and score of both kinds [2, count]."""
    aucs = [auc(positive[:, p], negative[:, n]) for p, n in resample(positive.shape[1], negative.shape[1])]
    first, second = np.concatenate(aucs, axis=1)
    return percentiles(second - first), chance(
        float(np.subtract(*auc(positive, negative))), float((second - first).std())
    )


def rows(
    captions: Captions, part: str, setting: str, norm: Floats, alignment: Floats, gamma: Floats | None = None, note=""
) -> list[Row]:
    """Return a row for each kind of positives, of both terms [B]; γ is fitted where it is not given.

    There is none where it cannot be: among few captions a larger norm may speak for clean beside some cosine.
    """
    given = "" if gamma is None else " given"
    features = np.stack([norm, alignment], axis=1)
    if gamma is None:
        try:
            gamma = captions.fit(features)
        except InputError as error:
            print(f"left out: {part} {setting}: {error}", file=sys.stderr)
            return []
    statistics = np.stack([norm, np.copysign(1, gamma[1]) * alignment, features @ gamma])
    return [
        replace(
            row, part=part, setting=setting, positives=name, gamma=f"1, {gamma[1] / gamma[0]:.3g}{given}", note=note
        )
        for name, positive, negative in captions.pairs()
        for row in [compared(statistics[:, positive], statistics[:, negative])]
    ]


def compared(positive: np.ndarray, negative: np.ndarray) -> Row:
    """Return the row of positives and negatives [3, count]: norm, alignment and score of each; names come later."""
    of_norm, of_alignment, of_score = (float(value) for value in auc(positive, negative))
    return Row("", "", "", "", of_norm, of_alignment, of_score, of_score - of_norm, *gain(positive[::2], negative[::2]))


class Predictions:
    """Statistics of all captions on any draw at any timestep; each UNet evaluation is made once."""

    def __init__(self, denoiser: Denoiser, prompts: list[str]):
        self._denoiser, self._rule = denoiser, rule_of(denoiser.engine)
        self._states: States = denoiser.engine.encode(denoiser.engine.tokenize(prompts)[0])
        self._noise = denoiser.noise(DRAWS)
        self._cond: dict[tuple[int, int], tuple[Latents, Latents]] = {}

    def both(self, draw: int, timestep: int) -> tuple[Latents, Latents]:
        """Return ε_c [B, C, H, W] and ε_0 [C, H, W]."""
        if (draw, timestep) not in self._cond:
            x = self._noise[draw : draw + 1]
            all_ = self._states.all
            cond = self._denoiser.predict(self._states, all_, np.repeat(x, len(all_), axis=0), timestep)
            self._cond[draw, timestep] = cond, self._denoiser.uncond(x, timestep)[0]
        return self._cond[draw, timestep]

    def norm(self, draw: int, timestep: int) -> Floats:
        return guidance_stats(*self.both(draw, timestep)).norm

    def alignment(
        self, draw: int, timestep: int, kind: Alignment | None = None, operands: Operands | None = None
    ) -> Floats:
        kind, operands = kind or self._rule.alignment, operands or self._rule.operands
        return guidance_stats(*self.both(draw, timestep), alignment=kind, operands=operands).alignment


def draws(captions: Captions, predictions: Predictions, timesteps: tuple[int, int]) -> list[Row]:
    norm = np.stack([predictions.norm(draw, timesteps[0]) for draw in range(DRAWS)])
    alignment = np.stack([predictions.alignment(draw, timesteps[1]) for draw in range(DRAWS)])
    found = []
    for n in (1, 2, 4, DRAWS):
        groups = [slice(start, start + n) for start in range(0, DRAWS, n)]
        each = [rows(captions, "draws", f"n = {n}", norm[g].mean(0), alignment[g].mean(0)) for g in groups]
        each = [fitted for fitted in each if fitted]
        if n == DRAWS:
            found += each[0] if each else []
            continue
        for same in zip(*each, strict=True):
            means = {name: float(np.mean([getattr(r, name) for r in same])) for name in ("norm", "alignment", "score")}
            gains = [r.gain for r in same]
            gammas = [float(r.gamma.split(", ")[1]) for r in same]
            found.append(
                Row(
                    "draws",
                    f"n = {n}",
                    same[0].positives,
                    f"1, {min(gammas):.3g} … {max(gammas):.3g}",
                    *means.values(),
                    float(np.mean(gains)),
                    (min(gains), max(gains)),
                    None,
                    f"mean over {len(each)} groups; the gain's range, not its interval; "
                    f"norm {min(r.norm for r in same):.3f} … {max(r.norm for r in same):.3f}, "
                    f"score {min(r.score for r in same):.3f} … {max(r.score for r in same):.3f}",
                )
            )
    return found


def choices(captions: Captions, predictions: Predictions, timesteps: tuple[int, int]) -> list[Row]:
    """Return the rows of t_cos, weights and operands, on the engine's first draw."""
    first, late = timesteps
    norm, alignment = predictions.norm(0, first), predictions.alignment(0, late)
    found = []
    for timestep in LATE:
        found += rows(captions, "t_cos", str(timestep), norm, predictions.alignment(0, timestep))
    found += rows(captions, "weights", "fitted", norm, alignment)
    published = predictions.alignment(0, late, DEFAULT_ALIGNMENT, DEFAULT_OPERANDS)
    for name, gamma in (("equal", (1, 1)), ("published, SD 1.x", (1, 2)), ("published, SD 2.x", (1, 0.1))):
        found += rows(captions, "weights", name, norm, published, np.array(gamma, dtype=float))
    spread = [term[captions.fitted_on].std() for term in (norm, alignment)]
    sign = np.sign(captions.fit(np.stack([norm, alignment], axis=1))[1])
    scaled = np.array([1 / spread[0], sign / spread[1]])
    found += rows(captions, "weights", "equal in deviations", norm, alignment, scaled)
    relative = norm / np.linalg.norm(predictions.both(0, first)[1])
    found += rows(captions, "weights", "‖Δ‖ / ‖ε_0‖, fitted", relative, alignment)
    for operands in ("uncond_delta", "cond_uncond", "cond_delta"):
        for over in ("channel", "flat"):
            values = predictions.alignment(0, late, over, operands)
            found += rows(captions, "operands", f"{operands}, {over}", norm, values)
    return found


def groups(captions: Captions, predictions: Predictions, timesteps: tuple[int, int]) -> list[Row]:
    """Return a row for each group's memorized captions, on the engine's first draw."""
    features = np.stack([predictions.norm(0, timesteps[0]), predictions.alignment(0, timesteps[1])], axis=1)
    gamma = captions.fit(features)
    statistics = np.stack([features[:, 0], np.copysign(1, gamma[1]) * features[:, 1], features @ gamma])
    positives = {name: ~captions.calibration & captions.memorized & (captions.groups == name) for name in SEEN}
    negative = ~captions.calibration & (captions.kinds == "clean")
    return [
        replace(
            compared(statistics[:, some], statistics[:, negative]),
            part="group",
            setting=f"{name} ({some.sum()})",
            positives="memorized",
            gamma=f"1, {gamma[1]:.3g}",
        )
        for name, some in positives.items()
        if some.sum() > 1
    ]


def precisions(captions: Captions, rule: Rule) -> list[Row]:
    """Return the rows of the precisions, each with its own fit; the first is what the others are compared with."""
    found, true = [], None
    with tempfile.TemporaryDirectory() as folder:
        for provider, precision in (
            ("cpu", "fp32"),
            ("openvino", "fp32"),
            ("openvino", "bf16"),
            ("cpu", "fp16"),
            ("cpu", "int8"),
        ):
            path = EMBEDDED_ENGINE
            if precision in ("fp16", "int8"):
                path = Path(folder) / precision
                command = ["export", str(TINY / "emoji"), "-o", str(path), "--precision", precision]
                subprocess.run([sys.executable, "-P", "-m", "memedge", *command], check=True, capture_output=True)
            try:
                detector = Detector.load(path, provider, precision)
            except ProviderError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            scores = detector.score(captions.prompts, alignment=rule.alignment, operands=rule.operands)
            features = np.stack([scores.norm, scores.alignment], axis=1)
            some, labels = features[captions.fitted_on], captions.memorized[captions.fitted_on]
            gamma = fit_direction(some, labels).gamma
            score, threshold = features @ gamma, fit_threshold(some @ gamma, labels, TARGET)
            verdict = score >= threshold
            if true is None:
                true = score, verdict
            rank = spearmanr(score, true[0]).statistic
            note = f"Spearman {rank:.5f}, {(verdict != true[1]).sum()} of {len(verdict)} verdicts differ"
            found += rows(captions, "precision", f"{provider} {precision}", *features.T, note=note)
    return found


def variants() -> list[dict[str, Any]]:
    """Return, per kind of change and whether caption and variant replicate, how many, their scores and verdicts."""
    with (TINY / "variants.csv").open(newline="") as file:
        changed = list(csv.DictReader(file))
    detector = Detector.load(provider="cpu")
    scores = detector.score([row["prompt"] for row in changed])
    replicates = {row.prompt: row.memorized for row in every_caption()}
    before = np.array([replicates[row["caption"]] for row in changed])
    after = np.array([row["memorized"] == "true" for row in changed])
    changes = np.array([row["kind"] for row in changed])
    found = []
    for change in ("all", *dict.fromkeys(changes.tolist())):
        of_kind = np.ones_like(before) if change == "all" else changes == change
        pair = of_kind & after, of_kind & ~after
        low, high = interval(auc, scores.score[pair[0]], scores.score[pair[1]])
        at_norm = float(auc(scores.norm[pair[0]], scores.norm[pair[1]]))
        found.append(
            {
                "kind": change,
                "variants": int(of_kind.sum()),
                "kept": f"{(pair[0] & before).sum()} of {(of_kind & before).sum()}",
                "new": f"{(pair[0] & ~before).sum()} of {(of_kind & ~before).sum()}",
                "auc": float(auc(scores.score[pair[0]], scores.score[pair[1]])),
                "auc_interval": (float(low), float(high)),
                "auc_norm": at_norm,
                "found": f"{scores.memorized[pair[0]].sum()} of {pair[0].sum()}",
                "wrong": f"{scores.memorized[pair[1]].sum()} of {pair[1].sum()}",
                "wrong, of captions that replicate": (
                    f"{scores.memorized[pair[1] & before].sum()} of {(pair[1] & before).sum()}"
                ),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, help="of each group and split; default: all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    captions = Captions.read(arguments.captions)
    engine = Engine.open(EMBEDDED_ENGINE, "cpu", None, None)
    predictions = Predictions(Denoiser(engine), captions.prompts)
    timesteps = engine.directory.manifest.timesteps
    found = [row for part in (draws, choices, groups) for row in part(captions, predictions, timesteps)]
    found += precisions(captions, rule_of(engine))
    corrected = iter(holm([row.p for row in found if row.p is not None]))
    found = [row if row.p is None else replace(row, p=next(corrected)) for row in found]
    table = Table(
        "", "setting", "positives", "γ", "norm", "alignment", "score", "score − norm [95 %]", "p", "", box=None
    )
    for r in found:
        ends = f"{r.gain:+.3f} [{r.gain_interval[0]:+.3f}, {r.gain_interval[1]:+.3f}]"
        aucs = (f"{value:.3f}" for value in (r.norm, r.alignment, r.score))
        table.add_row(r.part, r.setting, r.positives, r.gamma, *aucs, ends, "" if r.p is None else f"{r.p:.2g}", r.note)
    console = Console(width=200)
    console.print("AUC on held-out captions", table)
    changed = variants()
    table = Table("changed captions", box=None)
    for name in list(changed[0])[1:]:
        table.add_column(name)
    for line in changed:
        table.add_row(*(_text(value) for value in line.values()))
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": [asdict(r) for r in found], "variants": changed}, indent=1))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{value[0]:.3f}, {value[1]:.3f}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
