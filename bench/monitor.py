"""What the steps of a generation tell, at no further pass: the embedded model's captions, one image each.

    python bench/monitor.py DATA_DIR [--captions N] [--traces FILE] [--save FILE] [--sheet FILE] [--json FILE]

DATA_DIR is what bench/tiny/prepare.py and train_vae.py write. Captions are those that the model was trained on, of both
splits; each is generated once, from noise of its own (20 DDIM steps, guidance 4), watched by memedge.Monitor. All that
is fitted is fitted to the calibration split, and judged by the held-out one: memorized captions (at least 9 of 16
generations are copies) against clean ones (at most 2). With --traces what was seen is kept in FILE, and read from there
if it exists: generating takes half an hour.

First table: each statistic after some steps, and its running maximum; passes beyond the generation's own; AUC and
TPR@1%FPR with 95 % intervals (2000 resamples). The last rows are of detectors that run before a generation, and of both
together: logistic regression of score and logarithm of the change. Second: what Monitor.calibrate's own fit chooses,
what it finds, and at which step; --save writes it. Third: where the copy is. Of captions with a template in place of a
fixed picture, the drawing is copied and the background is not. A map is cut at the share of its maximum that is best
for the calibration captions; IoU is with the drawing's pixels in the training picture.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mitigation import CHECKPOINT, TINY
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from memedge import Detector, Monitor
from memedge.embedded import Caption, captions
from memedge.metrics import auc, binomial, interval, tpr
from memedge.monitor.calibration import GenerationSettings
from memedge.monitor.fitting import Traces, calibration_of
from memedge.monitor.map import enlarged, smoothed
from memedge.monitor.statistics import STATISTICS, reference, running_maximum, values
from memedge.monitor.verdicts import verdicts

sys.path.insert(0, str(TINY))

from concepts import Data
from generate import CHUNK, GUIDANCE, STEPS, Generator, noise
from model import Model, scheduler
from vae import decode

SEEN = ("memorized", "near", "template", "partly", "frequent", "seen")
AFTER = (1, 2, 3, 4, 6, 10, STEPS)
SHARES = np.geomspace(0.005, 0.9, 30)
MAPPED = (1, 2, 4, 10, 19, STEPS)
SHOWN = 6  # copies on the sheet


@dataclass(frozen=True)
class Seen:
    """What was seen of N generations: traces, latents [N, 4, 16, 16], maps [STEPS, N, 16, 16]."""

    traces: Traces
    latents: np.ndarray
    maps: np.ndarray


def generate(prompts: list[str]) -> Seen:
    """Generate an image of each prompt, the i-th from the noise of seed i."""
    model = Model.load(CHECKPOINT)
    generator = Generator(model, 1)
    parts: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(prompts), CHUNK):
        some = prompts[start : start + CHUNK]
        monitor, maps = Monitor(), []

        def watch(x, cond, uncond, t, monitor=monitor, maps=maps):
            monitor.step(x, cond, uncond, t)
            maps.append(monitor.map(smooth=False))

        with torch.inference_mode():
            states = model.text_encoder(input_ids=model.tokenize(some))[0]
        latents = generator.denoise(states, noise(range(start, start + len(some))), watch=watch)
        parts.append((monitor.norms, monitor.changes, monitor.moves, latents.numpy(), np.array(maps)))
    norms, changes, moves, latents, maps = zip(*parts, strict=True)
    traces = Traces(*(np.concatenate(of, axis=1) for of in (norms, changes, moves)))
    return Seen(traces, np.concatenate(latents), np.concatenate(maps, axis=1))


def kept(path: Path | None, prompts: list[str]) -> Seen:
    """Return what a file holds of these prompts; else generate, and write it."""
    if path is not None and path.exists():
        file = np.load(path)
        if file["prompts"].tolist() != prompts:
            sys.exit(f"{path} is of other captions: give another file.")
        return Seen(Traces(*(file[name] for name in Traces._fields)), file["latents"], file["maps"])
    seen = generate(prompts)
    if path is not None:
        np.savez(path, prompts=prompts, **seen.traces._asdict(), latents=seen.latents, maps=seen.maps)
    return seen


@dataclass(frozen=True)
class Row:
    """A detector's figures with both ends of their 95 % intervals; `step` is the one it is known after, of STEPS."""

    detector: str
    passes: float
    step: int
    auc: tuple[float, float, float]
    tpr: tuple[float, float, float]


def row(name: str, passes: float, step: int, positive: np.ndarray, negative: np.ndarray) -> Row:
    """Return the figures of values of memorized and of clean captions, [P] and [N]."""
    found = []
    for statistic in (auc, partial(tpr, percent=1)):
        ends = interval(statistic, positive, negative)
        found.append((float(statistic(positive, negative)), *map(float, ends)))
    return Row(name, passes, step, *found)


class Table1:
    """The rows of the first table, given what was seen and which captions are which."""

    def __init__(self, seen: Seen, of: list[Caption]):
        self.traces, self.prompts = seen.traces, [one.prompt for one in of]
        self.memorized = np.array([one.memorized for one in of])
        self.held_out = np.array([one.split == "held-out" for one in of])
        self.clean = np.array([one.clean for one in of])

    def split(self, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return values [N] of held-out memorized and clean captions."""
        return of[self.held_out & self.memorized], of[self.held_out & self.clean]

    def rows(self) -> Iterator[Row]:
        calibration = ~self.held_out & self.clean
        for statistic in STATISTICS:
            of = values(statistic, *self.traces)
            known, highest = ~np.isnan(of[:, 0]), running_maximum(statistic, of, *reference(of, calibration))
            for step in AFTER:
                if known[step - 1]:
                    yield row(statistic, 0, step, *self.split(of[step - 1]))
                    yield row(f"{statistic}, highest so far", 0, step, *self.split(highest[step - 1]))
        scores = Detector.load(provider="cpu", threads=1).score(self.prompts)
        yield row("norm, before", 1, 0, *self.split(scores.norm))
        yield row("score, before", 2, 0, *self.split(scores.score))
        for step in (1, 4):
            last = self.traces.norms[0] if step == 1 else self.traces.changes[step - 2]
            features = np.stack([scores.score, np.log(last)], axis=1)
            fitted = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
            train = ~self.held_out & (self.memorized | self.clean)
            fitted.fit(features[train], self.memorized[train])
            name = "norm" if step == 1 else "change"
            yield row(f"score before, and {name}", 2, step, *self.split(fitted.decision_function(features)))


def overlaps(maps: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Return the IoU of maps [N, H, W] cut at each of SHARES of their maximum with bool [N, H, W]; [N, len(SHARES)]."""
    cut = maps[:, None] >= SHARES[:, None, None] * maps.max((1, 2))[:, None, None, None]
    both, either = (cut & cover[:, None]).sum((2, 3)), (cut | cover[:, None]).sum((2, 3))
    return np.asarray(both / either)


@dataclass(frozen=True)
class Copies:
    """Images of templates that are copies: their places, the images, the training pictures, the drawings' pixels."""

    places: list[int]
    pictures: np.ndarray
    training: np.ndarray
    cover: np.ndarray
    held_out: np.ndarray


def copies_of(seen: Seen, of: list[Caption], data: Data, model: Model) -> Copies:
    places = np.array([place for place, one in enumerate(of) if one.group == "template" and one.memorized])
    pictures = decode(model.vae, torch.from_numpy(seen.latents[places]))
    copies, nearest = data.replicated(pictures)
    places, nearest = places[copies], nearest[copies]
    held_out = np.array([of[place].split == "held-out" for place in places])
    return Copies(list(places), pictures[copies], data.pictures[nearest], data.cover[nearest] >= 128, held_out)


def where(seen: Seen, copies: Copies) -> dict[str, dict[str, float]]:
    """Return the IoU of maps by step, plain and smoothed, over held-out copies of templates, and how many they are."""
    places, cover, held_out = copies.places, copies.cover, copies.held_out
    found = {}
    for step in MAPPED:
        for name, smooth in (("plain", lambda maps: maps), ("smoothed", smoothed)):
            maps = enlarged(smooth(seen.maps[step - 1][places]), cover.shape[1:])
            by_share = overlaps(maps, cover)
            best = int(by_share[~held_out].mean(axis=0).argmax())
            own = by_share[held_out, best]
            found[f"step {step}, {name}"] = {
                "share": float(SHARES[best]),
                "iou": float(own.mean()),
                "error": float(own.std(ddof=1) / np.sqrt(len(own))),
                "whole image": float(cover[held_out].mean()),
                "images": len(own),
            }
    return found


def sheet(seen: Seen, copies: Copies) -> Image.Image:
    """Return some held-out copies: the training picture, the image, and its maps, brighter where Δ is larger."""
    side, left, head = 2 * copies.pictures.shape[1], 8, 28
    rows = np.flatnonzero(copies.held_out)[:SHOWN]
    columns = ("training picture", "image", *(f"map, step {step}" for step in MAPPED))
    image = Image.new("RGB", (left + len(columns) * (side + left), head + len(rows) * (side + left)), "white")
    draw, text = ImageDraw.Draw(image), ImageFont.load_default(13)
    for column, name in enumerate(columns):
        x = left + column * (side + left)
        draw.text((x, 6), name, "black", text)
        for place, row in enumerate(rows):
            if column < 2:
                shown = Image.fromarray((copies.training, copies.pictures)[column][row])
            else:
                values = np.sqrt(seen.maps[MAPPED[column - 2] - 1][copies.places[row]])
                shown = Image.fromarray((255 * values / values.max()).astype(np.uint8))
            image.paste(shown.resize((side, side), Image.Resampling.NEAREST), (x, head + place * (side + left)))
    return image.quantize(256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--captions", type=int, help="so many, spread over the file; default: all")
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--sheet", type=Path, help="write a picture of the maps here")
    parser.add_argument("--save", type=Path, help="write the calibration for target_fpr = .01 here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    of = [one for one in captions() if one.group in SEEN]
    if arguments.captions:
        of = [of[place] for place in np.linspace(0, len(of) - 1, arguments.captions).astype(int)]
    seen = kept(arguments.traces, [one.prompt for one in of])
    model = Model.load(CHECKPOINT)
    console = Console(width=150)

    first = Table1(seen, of)
    rows = list(first.rows())
    table = Table("detector", "passes", "known after", "AUC [95 %]", "TPR@1%FPR [95 %]", box=None)
    for one in rows:
        cells = (f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in (one.auc, one.tpr))
        table.add_row(one.detector, f"{one.passes:g}", f"{one.step} of {STEPS}", *cells)
    counts = [len(part) for part in first.split(np.arange(len(of)))]
    console.print(table, f"{counts[0]} memorized, {counts[1]} clean, held out")

    chosen = {}
    train = ~first.held_out & (first.memorized | first.clean)
    ddim = scheduler()
    ddim.set_timesteps(STEPS)
    for rate in (0.01, 0.05):
        settings = GenerationSettings("StableDiffusionPipeline", type(ddim).__name__, STEPS, GUIDANCE)
        timesteps = ddim.timesteps.tolist()
        chosen[rate] = calibration_of(first.traces.of(train), first.memorized[train], rate, settings, timesteps)
        called = np.array([verdict.memorized for verdict in verdicts(chosen[rate], *first.traces)])
        steps = np.array([verdict.step for verdict in verdicts(chosen[rate], *first.traces)])
        (true, false), (at, _) = first.split(called), first.split(steps)
        when = {step: int((at[true] == step).sum()) for step in np.unique(at[true]).tolist()}
        console.print(
            f"target_fpr={rate:g}: {chosen[rate].statistic} over {chosen[rate].looks} steps, found "
            f"{binomial(int(true.sum()), len(true))}, false alarms {binomial(int(false.sum()), len(false))}, "
            f"known after steps {when}"
        )
    if arguments.save:
        chosen[0.01].save(arguments.save)

    copies = copies_of(seen, of, Data(arguments.data, model.vae), model)
    if arguments.sheet:
        sheet(seen, copies).save(arguments.sheet, optimize=True)
    maps = where(seen, copies)
    for name, one in maps.items():
        console.print(f"map, {name}: {one}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"table": [asdict(one) for one in rows], "map": maps}, indent=1))


if __name__ == "__main__":
    main()
