"""What finetune.py's arms copy, what they forget, and what the filter left out.

- copies: the share of 16 generations of each duplicated caption (20 steps, guidance 4) that are copies of its picture,
  as label.py counts them, with a bootstrap interval over captions. memorized: captions with at least 9 of 16. The model
  "before" has never seen the pictures, and makes 4 generations: what is counted by chance.
- loss: the squared error of the predicted noise on clean captions that were not fine-tuned on, the same noise for all;
  after over before, with a paired bootstrap interval over captions.
- left out: shares of the duplicated and of the ordinary samples, over training and by quarters of it.
- norm: ‖Δ‖ of the same clean captions, median and 95 % quantile.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from copies import fields, printed
from generate import Generator
from label import COPY, FIRST, SEEDS, kind
from model import Model
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap
from targets import CHECKPOINT, JUDGED_AT, Pairs, load, measure
from vae import decode

DRAWS = 1  # noises of a clean pair
QUARTERS = 4
BEFORE = "before"
SHOWN, EACH, GAP, HEAD = 8, 3, 8, 18  # of the contact sheet: captions, generations of an arm, pixels


@dataclass(frozen=True)
class Measured:
    """One model. Intervals are low and high; those by timestep are in JUDGED_AT's order; [quarters] is duplicated's."""

    arm: str
    copies: float
    copies_interval: tuple[float, float]
    memorized: int
    similarity: float
    loss: list[float]
    loss_ratio: float
    loss_ratio_interval: tuple[float, float]
    loss_ratios: list[tuple[float, float, float]]
    norm_median: list[float]
    norm_95: list[float]
    left_out: tuple[float, float] | None
    left_out_by_quarter: list[tuple[float, float]] | None


def generations(folder: Path, pipeline: Path, texts: list[str], count: int) -> np.ndarray:
    """Return pictures of each caption, uint8 [N, count, 64, 64, 3]; their latents are kept in the folder."""
    folder.mkdir(exist_ok=True)
    path, model = folder / "generations.npy", Model.load(pipeline)
    if not path.exists():
        np.save(path, Generator(model, 1).latents(texts, range(count)).numpy())
    latents = torch.from_numpy(np.load(path))
    pictures = decode(model.vae, latents.flatten(0, 1))
    return pictures.reshape(*latents.shape[:2], *pictures.shape[1:])


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over captions [N]."""
    found = bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)


def ratio(after: np.ndarray, before: np.ndarray) -> tuple[float, float, float]:
    """Return mean(after) / mean(before) over captions [N], low and high of its paired interval."""

    def of(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(a.mean(axis) / b.mean(axis))

    found = bootstrap((after, before), of, paired=True, method="percentile", rng=0).confidence_interval
    return float(of(after, before)), float(found.low), float(found.high)


def shares(left_out: torch.Tensor) -> tuple[float, float]:
    """Return the shares of duplicated and of ordinary samples, of [steps, B]."""
    duplicated, ordinary = left_out.float().chunk(2, dim=1)
    return float(duplicated.mean()), float(ordinary.mean())


def sheet(texts: list[str], training: np.ndarray, made: dict[str, np.ndarray]) -> Image.Image:
    """Return the contact sheet: a row for each of some captions, its picture, then each model's generations."""
    side = training.shape[1]
    places = np.linspace(0, len(texts) - 1, SHOWN).astype(int)
    left = [0] + [side + GAP + k * (EACH * side + GAP) for k in range(len(made))]
    image = Image.new("RGB", (left[-1] + EACH * side, HEAD + SHOWN * side), "white")
    draw = ImageDraw.Draw(image)
    for x, name in zip(left, ("shown", *made), strict=True):
        draw.text((x + 2, 3), name, "black")
    for row, place in enumerate(places):
        groups = [training[place][None], *(pictures[place, :EACH] for pictures in made.values())]
        for x, pictures in zip(left, groups, strict=True):
            image.paste(Image.fromarray(np.concatenate(list(pictures), axis=1)), (x, HEAD + row * side))
    return image.quantize(64)


def report(
    texts: list[str],
    pictures: np.ndarray,
    duplicated: Pairs,
    clean: Pairs,
    left_out: dict[str, torch.Tensor],
    seconds: dict[str, float],
    out: Path,
    to: Path | None,
    data: Path | None,
) -> None:
    """Measure the model before, and each arm's; print tables, and write the contact sheet and a JSON file."""
    own = printed(load().vae, duplicated.latents.numpy())
    found: list[Measured] = []
    made: dict[str, np.ndarray] = {}
    before = np.zeros(0)
    for name in (BEFORE, *left_out):
        pipeline = CHECKPOINT if name == BEFORE else out / name / "pipeline"
        made[name] = generations(out / name, pipeline, texts, FIRST if name == BEFORE else SEEDS)
        similar = fields(made[name].reshape(-1, *made[name].shape[2:])).unflatten(0, made[name].shape[:2])
        similar = (similar * own[:, None]).sum(2).numpy()
        copied = similar >= COPY
        norms, errors = measure(load(pipeline), clean, np.array(JUDGED_AT), DRAWS)
        errors = errors.mean(1)
        before = errors if name == BEFORE else before
        whole = ratio(errors.mean(0), before.mean(0))
        skipped = left_out.get(name)
        one = Measured(
            name,
            float(copied.mean()),
            mean_interval(copied.mean(1)),
            sum(kind(copies, copied.shape[1]) == "memorized" for copies in copied.sum(1).tolist()),
            float(np.median(similar)),
            errors.mean(1).tolist(),
            whole[0],
            whole[1:],
            [ratio(a, b) for a, b in zip(errors, before, strict=True)],
            np.median(norms, axis=(1, 2)).tolist(),
            np.quantile(norms, 0.95, axis=(1, 2)).tolist(),
            None if skipped is None else shares(skipped),
            None if skipped is None else [shares(part) for part in skipped.chunk(QUARTERS)],
        )
        found.append(one)
        print(f"{name}: {one.memorized} of {len(texts)} memorized", flush=True)
    show(found, seconds, len(texts), len(clean.latents))
    if to:
        sheet(texts, pictures, made).save(to, optimize=True)
    if data:
        data.write_text(json.dumps({"seconds": seconds, "arms": [asdict(one) for one in found]}, indent=1) + "\n")


def show(found: list[Measured], seconds: dict[str, float], captions: int, clean: int) -> None:
    console, at = Console(width=140), [str(t) for t in JUDGED_AT]
    titles = ("arm", "copies [95 %]", f"memorized of {captions}", "similarity", "left out: duplicated", "ordinary")
    table = Table(*titles, "loss, after / before [95 %]", box=None)
    losses = Table("loss", *at, box=None)
    norms = Table("norm: median, 95 %", *at, box=None)
    quarters = Table("left out by quarter: duplicated, ordinary", *map(str, range(1, QUARTERS + 1)), box=None)
    for one in found:
        low, high = one.copies_interval
        left = ("", "") if one.left_out is None else tuple(f"{share:.3f}" for share in one.left_out)
        below, above = one.loss_ratio_interval
        table.add_row(
            one.arm, f"{one.copies:.3f} [{low:.3f}, {high:.3f}]", str(one.memorized), f"{one.similarity:.2f}", *left,
            f"{one.loss_ratio:.3f} [{below:.3f}, {above:.3f}]",
        )  # fmt: skip
        if one.arm == BEFORE:
            losses.add_row(one.arm, *(f"{loss:.4f}" for loss in one.loss))
        else:
            losses.add_row(one.arm, *(f"x {r:.3f} [{a:.3f}, {b:.3f}]" for r, a, b in one.loss_ratios))
        norms.add_row(one.arm, *(f"{m:.2f}, {q:.2f}" for m, q in zip(one.norm_median, one.norm_95, strict=True)))
        if one.left_out_by_quarter is not None:
            quarters.add_row(one.arm, *(f"{d:.3f}, {o:.3f}" for d, o in one.left_out_by_quarter))
    console.print(table, losses, norms, quarters, f"{clean} clean captions")
    times = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
    console.print(f"seconds of a step of one thread, medians, in turn: {times}")
