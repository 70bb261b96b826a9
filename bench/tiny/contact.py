"""Contact sheet: what captions of each group show in training, and what the model makes of them.

python bench/tiny/contact.py DATA_DIR OUT_DIR SHEET.png     (OUT_DIR as label.py left it)
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from dataset import GROUPS, SIZE, Emoji
from PIL import Image, ImageDraw

PER_GROUP = 8
TRAINING = 4  # training pictures per row, then the generations
ZOOM = 2
LABEL = 230


def on_checkerboard(rgba: np.ndarray) -> np.ndarray:
    """Return uint8 RGB [H, W, 3] of premultiplied RGBA [4, H, W] in [0, 1]."""
    y, x = np.indices(rgba.shape[1:]) // 4
    board = np.where((x + y) % 2, 0.78, 0.92)
    rgb = rgba[:3] + (1 - rgba[3]) * board
    return (rgb.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def strip(pictures: np.ndarray) -> Image.Image:
    """Return pictures [K, 4, H, W] side by side."""
    return Image.fromarray(np.concatenate([on_checkerboard(p) for p in pictures], axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "out", "sheet"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    data = Emoji(arguments.data)
    generations = np.load(arguments.out / "generations.npz")["pictures"].astype(np.float32) / 255
    labels = list(csv.DictReader((arguments.out / "captions.csv").open()))
    chosen = [i for group in GROUPS for i in [k for k, c in enumerate(data.captions) if c.group == group][:PER_GROUP]]
    side = SIZE * ZOOM
    sheet = Image.new("RGB", (LABEL + (TRAINING + generations.shape[1]) * side + 16, len(chosen) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for row, i in enumerate(chosen):
        caption, label = data.captions[i], labels[i]
        text = f"{caption.group} {caption.fixed_share:g}\n{caption.text[:34]}\nreplicas {label['replicas']}/8"
        draw.text((4, row * side + 8), text, fill="black")
        if caption.group != "unseen":
            shown = data.draw(torch.full((TRAINING,), i), torch.Generator().manual_seed(i)).numpy()
            sheet.paste(strip(shown).resize((TRAINING * side, side), Image.Resampling.NEAREST), (LABEL, row * side))
        made = strip(generations[i]).resize((generations.shape[1] * side, side), Image.Resampling.NEAREST)
        sheet.paste(made, (LABEL + TRAINING * side + 16, row * side))
    sheet.save(arguments.sheet, optimize=True)


if __name__ == "__main__":
    main()
