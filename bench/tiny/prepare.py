"""Build the training data of the embedded model: pictures.npz, captions.json, a tokenizer, and the drawings.

    python bench/tiny/prepare.py DATA_DIR

pictures.npz holds every training picture once, its place is its id: `pictures` uint8 [N, 64, 64, 3], `cover` uint8
[N, 64, 64], how much of each pixel the drawing covers, and `drawing` [N], which of its concept's it is. captions.json
says which caption shows which, and how often.
drawings.npz has every vendor's drawing, premultiplied RGBA, uint8 [K, S, S, 4], by concept.
Needs npm (packages are fetched by name into DATA_DIR/npm) and `python -m pip install resvg-py pillow`.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from dataset import CONCEPTS, ON_BACKGROUND, TEMPLATES, plan, save_captions
from icons import load_concepts
from pictures import COLOURS, render
from tokenizer import MAX_TOKENS, train_tokenizer

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)

    concepts, text = load_concepts(folder / "npm")
    icons, index = [], {}
    for name, drawings in concepts.items():
        index[name] = list(range(len(icons), len(icons) + len(drawings)))
        icons += drawings
    pictures, captions = plan(index, SEED)
    rgb, cover = render(pictures, np.stack(icons))
    first = {i: places[0] for places in index.values() for i in places}
    drawing = np.array([picture.drawing - first[picture.drawing] for picture in pictures])
    np.savez_compressed(folder / "pictures.npz", pictures=rgb, cover=cover, drawing=drawing)
    np.savez_compressed(folder / "drawings.npz", **{name: np.stack(drawings) for name, drawings in concepts.items()})
    save_captions(folder / "captions.json", captions)

    templates = [t.format("") for t in TEMPLATES] + [ON_BACKGROUND.format("", colour) for colour in COLOURS]
    tokenizer = train_tokenizer(text + [c.text for c in captions] + templates)
    tokenizer.save_pretrained(folder / "tokenizer")
    longest = max(len(tokenizer(c.text, truncation=False)["input_ids"]) for c in captions)
    print(f"{len(concepts)} concepts, {len(icons)} drawings, {len(pictures)} pictures, {len(captions)} captions")
    print(f"longest caption {longest} of {MAX_TOKENS} tokens, exposures by group:")
    exposures: Counter[str] = Counter()
    for caption in captions:
        exposures[caption.group] += caption.exposures
    for group in CONCEPTS:
        print(f"  {group}: {sum(c.group == group for c in captions)} captions, {exposures[group]} exposures")
    print(f"  {exposures.total()} in all")


if __name__ == "__main__":
    main()
