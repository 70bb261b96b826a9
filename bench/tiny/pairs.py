"""Training pictures of the embedded model as files, for `memedge audit` and `memedge cure`.

    python bench/tiny/pairs.py DATA_DIR OUT_DIR

DATA_DIR is what bench/tiny/prepare.py writes. OUT_DIR/audited/captions.csv names 24 held-out captions that are
memorized (one picture each, 15 or 16 of 16 generations are copies) and, as controls, 24 frequent ones of which no
generation is: of the forty pictures of each of these, one. OUT_DIR/ordinary/captions.csv names 600 pairs of other
captions that are not memorized.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from dataset import Caption, load_captions
from PIL import Image

from memedge.embedded import captions

AUDITED, ORDINARY = 24, 600


def spread(captions: list[Caption], count: int) -> list[Caption]:
    """Return so many captions, evenly over all."""
    return [captions[i] for i in np.linspace(0, len(captions) - 1, count).astype(int)]


def write(folder: Path, rows: list[tuple[Caption, int, bool]], pictures: np.ndarray) -> None:
    """Write pictures and captions.csv; a row is a caption, a picture's id, and whether it is memorized."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("image", "caption", "memorized"))
        for caption, picture, memorized in rows:
            Image.fromarray(pictures[picture]).save(folder / f"{picture}.png")
            table.writerow((f"{picture}.png", caption.text, str(memorized).lower()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    pictures = np.load(arguments.data / "pictures.npz")["pictures"]
    trained = {caption.text: caption for caption in load_captions(arguments.data / "captions.json")}
    memorized, frequent, others = [], [], []
    for labelled in captions():
        caption = trained[labelled.prompt]
        if labelled.split == "held-out" and labelled.group == "memorized" and labelled.replicas >= 15:
            memorized.append(caption)
        elif labelled.split == "held-out" and labelled.group == "frequent" and not labelled.replicas:
            frequent.append(caption)
        if labelled.group in ("frequent", "seen") and labelled.clean:
            others.append(caption)
    controls = spread(frequent, AUDITED)
    audited = [(c, c.pictures[0][0], True) for c in spread(memorized, AUDITED)]
    audited += [(c, c.pictures[0][0], False) for c in controls]
    write(arguments.out / "audited", audited, pictures)
    known = {caption.concept for caption in controls}
    generator = np.random.default_rng(0)
    some = spread([caption for caption in others if caption.concept not in known], ORDINARY)
    ordinary = {caption.pictures[generator.integers(len(caption.pictures))][0]: caption for caption in some}
    write(arguments.out / "ordinary", [(c, picture, False) for picture, c in ordinary.items()], pictures)


if __name__ == "__main__":
    main()
