"""Put a trained and labelled model where the package and its tests find it.

    python bench/tiny/ship.py DATA_DIR PIPELINE_DIR OUT_DIR      (OUT_DIR as label.py left it)

Writes bench/tiny/emoji (the model as a pipeline of diffusers, fp16), memedge/data/captions.csv, memedge/data/pictures
(strips for the demo: training picture | generations) and memedge/data/engine, exported but not yet calibrated
(calibrate.py).
"""

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
import torch
from contact import strip
from dataset import SIZE, Emoji
from generate import similarity
from label import DRAWS, training_pictures
from vae import add_vae

from memedge.export.export import export

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "memedge" / "data"
SHOWN = {  # held-out captions the demo scores: (group, memorized by behaviour) -> how many
    ("memorized", True): 4,
    ("partly", True): 1,
    ("partly", False): 1,
    ("template", False): 1,
    ("frequent", False): 3,
    ("rare", False): 1,
    ("unseen", False): 2,
}
GENERATED = 4


def shown(rows: list[dict[str, str]]) -> list[int]:
    """Return the indices of the captions with pictures: the first of each kind."""
    chosen = []
    for (group, memorized), count in SHOWN.items():
        wanted = {"group": group, "split": "held-out", "memorized": str(memorized).lower()}
        chosen += [i for i, row in enumerate(rows) if wanted.items() <= row.items()][:count]
    return chosen


def nearest(data: Emoji, index: int, generated: torch.Tensor) -> torch.Tensor:
    """Return the caption's training picture that the generations [K, 4, H, W] resemble most; a blank for the unseen."""
    if data.captions[index].group == "unseen":
        return torch.zeros(1, 4, SIZE, SIZE)
    pictures = training_pictures(data, index)[:DRAWS]
    best = similarity(generated, pictures).median(0).values.argmax()
    return pictures[best : best + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "pipeline", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    data = Emoji(arguments.data)
    generations = torch.from_numpy(np.load(arguments.out / "generations.npz")["pictures"]).float() / 255
    with (arguments.out / "captions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    for folder in (SHIPPED / "pictures", SHIPPED / "engine", ROOT / "bench" / "tiny" / "emoji"):
        shutil.rmtree(folder, ignore_errors=True)
    (SHIPPED / "pictures").mkdir(parents=True)
    chosen = shown(rows)
    for i, row in enumerate(rows):
        row["picture"] = f"{row['caption'].replace(' ', '-')}.png" if i in chosen else ""
        if i in chosen:
            pictures = torch.cat([nearest(data, i, generations[i]), generations[i][:GENERATED]])
            strip(pictures.numpy()).save(SHIPPED / "pictures" / row["picture"], optimize=True)
    with (SHIPPED / "captions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    model = shutil.copytree(arguments.pipeline, ROOT / "bench" / "tiny" / "emoji")
    add_vae(model, data.mean[:, 0, 0], data.std[:, 0, 0])
    export(model, SHIPPED / "engine", progress=print)


if __name__ == "__main__":
    main()
