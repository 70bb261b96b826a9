"""Is the similarity right? Pairs of a generation and the training picture nearest to it, to be judged by eye, blind.

    python bench/tiny/judge.py sheets DATA_DIR PIPELINE_DIR OUT_DIR      (OUT_DIR as label.py left it)
    python bench/tiny/judge.py measure DATA_DIR PIPELINE_DIR OUT_DIR bench/tiny/judged.csv
    python bench/tiny/judge.py agree bench/tiny/judged.csv

`sheets` draws 200 pairs, as many from each twentieth of the similarity's range as there are, in a random order, and
writes OUT_DIR/judge-1.png … without the similarities, and OUT_DIR/judged.csv, whose column `copy` is to be filled in
(1: whoever knows the training picture would call the generation a copy of it; 0: not). `measure` writes the similarity
of the same pairs anew, for when copies.py has changed. `agree` says how often the threshold says what the eye does, and
which thresholds would agree best.
"""

import argparse
import csv
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from copies import fields, printed
from dataset import load_captions
from label import COPY
from model import Model
from PIL import Image, ImageDraw
from sklearn.metrics import roc_auc_score
from vae import decode

PAIRS, LOWEST, BINS = 200, 0.5, 10
HEAD = ("pair", "caption", "seed", "picture", "similarity", "copy")
COLUMNS, ROWS, SCALE, GAP = 10, 5, 2, 8  # of a sheet; a pair is one above the other


def chosen(similarity: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the indices of PAIRS values, spread over the range, in a random order."""
    edges = np.linspace(LOWEST, 1, BINS + 1)
    bins = [np.flatnonzero((similarity >= a) & (similarity < b)) for a, b in pairwise(edges)]
    bins = [generator.permutation(bin) for bin in bins]
    found: list[int] = []
    for place in range(max(len(bin) for bin in bins)):  # in turn, so that full bins make up for empty ones
        found += [int(bin[place]) for bin in bins if place < len(bin)]
    return generator.permutation(found[:PAIRS])


class Pairs:
    """Generations that label.py kept, and the training pictures to compare them with."""

    def __init__(self, data: Path, pipeline: Path, out: Path):
        self.captions = [caption.text for caption in load_captions(data / "captions.json")]
        self.pictures = np.load(data / "pictures.npz")["pictures"]
        self._latents, self._kept = np.load(data / "latents.npy"), np.load(out / "latents.npy", mmap_mode="r")
        self._vae = Model.load(pipeline).vae

    def compare(self, pairs: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return generations [N, 64, 64, 3] and similarities [N], of indices of caption, generation and picture."""
        latents = np.stack([self._kept[i, k] for i, k, _ in pairs]).astype(np.float32)
        made = decode(self._vae, torch.from_numpy(latents))
        training = printed(self._vae, self._latents[[picture for _, _, picture in pairs]])
        return made, (fields(made) * training).sum(1).numpy()


def sheets(of: Pairs, out: Path) -> None:
    with (out / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    pairs = []  # caption, generation, picture
    for row in rows:
        i = of.captions.index(row["caption"])
        pairs += [(i, k, int(picture)) for k, picture in enumerate(row["pictures"].split())]
    generator = np.random.default_rng(0)
    some = [pairs[k] for k in generator.choice(len(pairs), min(len(pairs), 20 * PAIRS), replace=False)]
    made, similarity = of.compare(some)
    order = chosen(similarity, generator)
    side = SCALE * of.pictures.shape[1]
    per_sheet = COLUMNS * ROWS
    for number in range(0, len(order), per_sheet):
        sheet = Image.new("RGB", (COLUMNS * (side + GAP), ROWS * (2 * side + 24)), "white")
        draw = ImageDraw.Draw(sheet)
        for place, k in enumerate(order[number : number + per_sheet]):
            x, y = place % COLUMNS * (side + GAP), place // COLUMNS * (2 * side + 24)
            draw.text((x, y + 2), str(number + place + 1), fill="black")
            for down, picture in enumerate((of.pictures[some[k][2]], made[k])):
                big = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(big, (x, y + 14 + down * side))
        sheet.save(out / f"judge-{number // per_sheet + 1}.png", optimize=True)
    found = [(of.captions[some[k][0]], *some[k][1:], f"{similarity[k]:.4f}", "") for k in order]
    write(out / "judged.csv", [(number, *row) for number, row in enumerate(found, 1)])


def measure(of: Pairs, judged: Path) -> None:
    rows = read(judged)
    pairs = [(of.captions.index(row["caption"]), int(row["seed"]), int(row["picture"])) for row in rows]
    similarity = of.compare(pairs)[1]
    given = [{**row, "similarity": f"{value:.4f}"} for row, value in zip(rows, similarity, strict=True)]
    write(judged, [tuple(row.values()) for row in given])


def read(judged: Path) -> list[dict[str, str]]:
    with judged.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(judged: Path, rows: list[tuple[int | str, ...]]) -> None:
    with judged.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([HEAD, *rows])


def agree(judged: Path) -> None:
    rows = read(judged)
    similarity = np.array([float(row["similarity"]) for row in rows])
    copy = np.array([row["copy"] == "1" for row in rows])
    said = similarity >= COPY
    print(f"{len(rows)} pairs, {copy.sum()} judged copies; AUC {roc_auc_score(copy, similarity):.3f}")
    wrong = f"{(said & ~copy).sum()} too many, {(~said & copy).sum()} missed"
    print(f"similarity >= {COPY}: {(said == copy).sum()} agree, {wrong}")
    thresholds = np.unique(similarity)
    agreement = np.array([((similarity >= t) == copy).mean() for t in thresholds])
    best = thresholds[agreement == agreement.max()]
    print(f"best: {agreement.max():.3f} agree at {best.min():.3f} to {best.max():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True, dest="what")
    folders = ("data", "pipeline", "out")
    for command, names in (("sheets", folders), ("measure", (*folders, "judged")), ("agree", ("judged",))):
        of_command = what.add_parser(command)
        for name in names:
            of_command.add_argument(name, type=Path)
    arguments = parser.parse_args()
    if arguments.what == "agree":
        agree(arguments.judged)
        return
    pairs = Pairs(arguments.data, arguments.pipeline, arguments.out)
    if arguments.what == "sheets":
        sheets(pairs, arguments.out)
    else:
        measure(pairs, arguments.judged)


if __name__ == "__main__":
    main()
