"""Build the training data of the embedded model: icons.npz, captions.json and a tokenizer.

    python bench/tiny/prepare.py DATA_DIR

Needs npm (packages are fetched by name into DATA_DIR/npm) and `python -m pip install resvg-py pillow`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from dataset import TEMPLATES, Emoji, assign_groups, describe
from icons import load_concepts
from tokenizer import train_tokenizer

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
    np.savez_compressed(folder / "icons.npz", icons=np.stack(icons))
    captions = assign_groups(index, SEED)

    # The channel statistics need the distribution itself: write once without them, measure, write again.
    meta = folder / "captions.json"
    meta.write_text(describe(captions, [0.0] * 4, [1.0] * 4))
    data, generator = Emoji(folder), torch.Generator().manual_seed(SEED)
    sample = data.draw(data.choose(8192, generator), generator)
    meta.write_text(describe(captions, sample.mean((0, 2, 3)).tolist(), sample.std((0, 2, 3)).tolist()))

    tokenizer = train_tokenizer(text + [c.text for c in captions] + [t.format("") for t in TEMPLATES])
    tokenizer.save_pretrained(folder / "tokenizer")
    longest = max(len(tokenizer(c.text)["input_ids"]) for c in captions)
    print(f"{len(concepts)} concepts, {len(icons)} drawings, {len(captions)} captions, longest {longest} tokens")


if __name__ == "__main__":
    main()
