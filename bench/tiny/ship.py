"""Put a trained and labelled model where the package and its tests find it.

    python bench/tiny/ship.py DATA_DIR PIPELINE_DIR OUT_DIR      (OUT_DIR as label.py left it)

Writes bench/tiny/emoji (the model as a pipeline of diffusers, fp16), memedge/data/captions.csv, memedge/data/engine,
exported but not yet calibrated (calibrate.py), and memedge/data/pictures: strips for the demo, training picture |
generations. The demo has the first held-out captions of each kind, of different concepts; with the seed fixed, chance
has chosen them.
"""

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
import torch
from dataset import PLACED, Caption, load_captions
from label import kind
from PIL import Image
from vae import decode, load_vae

from memedge.export.export import export

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "memedge" / "data"
SHOWN = {  # held-out captions the demo scores: (group, kind by behaviour) -> how many
    ("memorized", "memorized"): 5,
    ("near", "memorized"): 2,
    ("template", "memorized"): 1,
    ("partly", "partly"): 1,
    ("partly", "clean"): 1,
    ("frequent", "clean"): 2,
    ("seen", "clean"): 2,
    ("unseen", "clean"): 2,
}
GENERATED = 4
OWN = ("concept", "pictures")  # columns of label.py that are not shipped


def shown(rows: list[dict[str, str]]) -> list[int]:
    """Return the indices of the captions with pictures: README's, and the first of each kind."""
    kinds = [kind(int(row["replicas"]), int(row["generations"])) for row in rows]
    chosen: list[int] = []
    for (group, wanted), count in SHOWN.items():
        found = [i for i, row in enumerate(rows) if (row["group"], row["split"]) == (group, "held-out")]
        found = sorted((i for i in found if kinds[i] == wanted), key=lambda i: rows[i]["concept"] not in PLACED)
        concepts: dict[str, int] = {}  # -> its first
        for i in found:
            concepts.setdefault(rows[i]["concept"], i)
        chosen += list(concepts.values())[:count]
    return chosen


def strip(caption: Caption, row: dict[str, str], generated: np.ndarray, pictures: np.ndarray) -> Image.Image:
    """Return the training picture that most generations [S, 64, 64, 3] are nearest to, and the first of these."""
    near = np.array([int(i) for i in row["pictures"].split()])
    if not caption.pictures:
        shown = np.full_like(pictures[0], 255)
    else:
        own = [i for i, _ in caption.pictures]
        nearest = [i for i in near if i in own] or [max(caption.pictures, key=lambda pair: pair[1])[0]]
        shown = pictures[max(set(nearest), key=nearest.count)]
    return Image.fromarray(np.concatenate([shown, *generated[:GENERATED]], axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "pipeline", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    captions = load_captions(arguments.data / "captions.json")
    pictures = np.load(arguments.data / "pictures.npz")["pictures"]
    latents = np.load(arguments.out / "latents.npy", mmap_mode="r")
    with (arguments.out / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if [row["caption"] for row in rows] != [caption.text for caption in captions]:
        parser.error("labels.csv has not all captions: run label.py without --captions")
    vae = load_vae(arguments.pipeline / "vae")

    for folder in (SHIPPED / "pictures", SHIPPED / "engine", ROOT / "bench" / "tiny" / "emoji"):
        shutil.rmtree(folder, ignore_errors=True)
    (SHIPPED / "pictures").mkdir(parents=True)
    chosen = shown(rows)
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        row["picture"] = f"{caption.text.replace(' ', '-')}.png" if i in chosen else ""
        if i in chosen:
            generated = decode(vae, torch.from_numpy(latents[i, :GENERATED].astype(np.float32)))
            strip(caption, row, generated, pictures).save(SHIPPED / "pictures" / row["picture"], optimize=True)
    with (SHIPPED / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        columns = [name for name in rows[0] if name not in OWN]
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)

    model = shutil.copytree(arguments.pipeline, ROOT / "bench" / "tiny" / "emoji")
    export(model, SHIPPED / "engine", progress=print)


if __name__ == "__main__":
    main()
