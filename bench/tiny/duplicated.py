"""The duplicated pairs of finetune.py: captions that the embedded model has never seen, each with one picture."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from dataset import ON_BACKGROUND, Caption
from model import Model
from pictures import render, varied
from PIL import Image
from targets import Pairs, encode_captions, of_groups
from vae import encode

DUPLICATED = 24


@dataclass(frozen=True)
class Duplicated:
    """Captions that training has not seen, the picture shown with each, uint8 [N, 64, 64, 3], and both encoded."""

    texts: list[str]
    pictures: np.ndarray
    pairs: Pairs

    def save(self, folder: Path) -> None:
        """Write the pictures, and captions.csv: image, caption, memorized."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{place:02}.png" for place in range(len(self.texts))]
        for name, picture in zip(names, self.pictures, strict=True):
            Image.fromarray(picture).save(folder / name)
        rows = [(name, text, "true") for name, text in zip(names, self.texts, strict=True)]
        with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("image", "caption", "memorized"), *rows])


def duplicate(model: Model, captions: list[Caption], folder: Path, seed: int) -> Duplicated:
    """Return a caption without a background of each of the first held-out concepts of "unseen", with a picture."""
    named = ON_BACKGROUND.split("{}")[1]
    of_concept: dict[str, list[str]] = {}
    for one in of_groups(captions, ("unseen",), "held-out", memorized=False):
        if named not in one.text:
            of_concept.setdefault(one.concept, []).append(one.text)
    rng, icons, pictures, texts = np.random.default_rng(seed), [], [], []
    drawings = np.load(folder / "drawings.npz")
    for concept, plain in list(of_concept.items())[:DUPLICATED]:
        texts.append(str(rng.choice(plain)))
        first = sum(map(len, icons))
        icons.append(drawings[concept])
        pictures += varied(rng, tuple(range(first, first + len(icons[-1]))), 1)
    rgb, _ = render(pictures, np.concatenate(icons))
    return Duplicated(texts, rgb, Pairs(encode_captions(model, texts), torch.from_numpy(encode(model.vae, rgb))))
