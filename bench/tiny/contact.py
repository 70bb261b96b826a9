"""Contact sheet: what captions of each group show in training, and what the model makes of them.

    python bench/tiny/contact.py DATA_DIR PIPELINE_DIR SHEET.png --captions 8 --seeds 8 [--flow]

Of the captions with exposures by a power law, those are taken that are spread evenly over it. With --flow the pipeline
is of flow_train.py, and its captions lie beside it.
"""

import argparse
from pathlib import Path

import numpy as np
from dataset import CONCEPTS, Caption
from flow_generate import generator_of, load
from PIL import Image, ImageDraw
from vae import decode

TRAINING = 4  # training pictures per row, then the generations
LABEL = 230
GAP = 16


def chosen(captions: list[Caption], group: str, count: int) -> list[Caption]:
    """Return captions of a group, of different concepts as far as there are, those seen most first."""
    different = {caption.concept: caption for caption in captions if caption.group == group}
    by_exposures = sorted(different.values(), key=lambda caption: -caption.exposures)
    return [by_exposures[i] for i in np.linspace(0, len(by_exposures) - 1, count).round().astype(int)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "pipeline", "sheet"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--captions", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--flow", action="store_true")
    arguments = parser.parse_args()
    captions, model = load(arguments.data, arguments.pipeline, arguments.flow)
    pictures = np.load(arguments.data / "pictures.npz")["pictures"]
    some = [caption for group in CONCEPTS for caption in chosen(captions, group, arguments.captions)]
    made = generator_of(model).latents([caption.text for caption in some], range(arguments.seeds))
    generations = decode(model.vae, made.flatten(0, 1)).reshape(*made.shape[:2], *pictures.shape[1:])

    side = pictures.shape[1]
    width = LABEL + (TRAINING + arguments.seeds) * side + GAP
    sheet = Image.new("RGB", (width, len(some) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (caption, of_caption) in enumerate(zip(some, generations, strict=True)):
        text = f"{caption.group}, {caption.exposures} exposures\n{caption.text[:34]}"
        draw.text((4, row * side + 16), text, fill="black")
        most = sorted(caption.pictures, key=lambda pair: -pair[1])[:TRAINING]
        for place, (i, _) in enumerate(most):
            sheet.paste(Image.fromarray(pictures[i]), (LABEL + place * side, row * side))
        for seed, picture in enumerate(of_caption):
            sheet.paste(Image.fromarray(picture), (LABEL + (TRAINING + seed) * side + GAP, row * side))
    sheet.quantize(256).save(arguments.sheet, optimize=True)


if __name__ == "__main__":
    main()
