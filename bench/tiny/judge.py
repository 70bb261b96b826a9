"""Is the similarity right? Pairs of a generation and the training picture nearest to it, to be judged by eye, blind.

    python bench/tiny/judge.py sheets DATA_DIR PIPELINE_DIR OUT_DIR      (OUT_DIR as label.py left it)
    python bench/tiny/judge.py agree bench/tiny/judged.csv

`sheets` draws 200 pairs, as many from each twentieth of the similarity's range as there are, in a random order, and
writes OUT_DIR/judge-1.png … without the similarities, and OUT_DIR/judged.csv, whose column `copy` is to be filled in
(1: whoever knows the training picture would call the generation a copy of it; 0: not). `agree` says how often that is
what the threshold says, and which thresholds would agree best.
"""

import argparse
import csv
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from copies import fields
from dataset import load_captions
from label import COPY
from model import Model
from PIL import Image, ImageDraw
from sklearn.metrics import roc_auc_score
from vae import decode

PAIRS, LOWEST, BINS = 200, 0.5, 10
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


def sheets(data: Path, pipeline: Path, out: Path) -> None:
    pictures = np.load(data / "pictures.npz")["pictures"]
    captions = [caption.text for caption in load_captions(data / "captions.json")]
    kept, model = np.load(out / "latents.npy", mmap_mode="r"), Model.load(pipeline)
    with (out / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    pairs = []  # caption, generation, picture
    for row in rows:
        i = captions.index(row["caption"])
        pairs += [(i, k, int(picture)) for k, picture in enumerate(row["pictures"].split())]
    generator = np.random.default_rng(0)
    some = [pairs[k] for k in generator.choice(len(pairs), min(len(pairs), 20 * PAIRS), replace=False)]
    latents = np.stack([kept[i, k] for i, k, _ in some]).astype(np.float32)
    made = decode(model.vae, torch.from_numpy(latents))
    similarity = (fields(made) * fields(pictures[[p for _, _, p in some]])).sum(1).numpy()
    order = chosen(similarity, generator)
    side = SCALE * pictures.shape[1]
    per_sheet = COLUMNS * ROWS
    for number in range(0, len(order), per_sheet):
        sheet = Image.new("RGB", (COLUMNS * (side + GAP), ROWS * (2 * side + 24)), "white")
        draw = ImageDraw.Draw(sheet)
        for place, k in enumerate(order[number : number + per_sheet]):
            x, y = place % COLUMNS * (side + GAP), place // COLUMNS * (2 * side + 24)
            draw.text((x, y + 2), str(number + place + 1), fill="black")
            for down, picture in enumerate((pictures[some[k][2]], made[k])):
                big = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(big, (x, y + 14 + down * side))
        sheet.save(out / f"judge-{number // per_sheet + 1}.png", optimize=True)
    with (out / "judged.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("pair", "caption", "seed", "picture", "similarity", "copy"))
        for number, k in enumerate(order, 1):
            i, seed, picture = some[k]
            writer.writerow((number, captions[i], seed, picture, f"{similarity[k]:.4f}", ""))


def agree(judged: Path) -> None:
    with judged.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
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
    first = what.add_parser("sheets")
    for name in ("data", "pipeline", "out"):
        first.add_argument(name, type=Path)
    what.add_parser("agree").add_argument("judged", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "sheets":
        sheets(arguments.data, arguments.pipeline, arguments.out)
    else:
        agree(arguments.judged)


if __name__ == "__main__":
    main()
