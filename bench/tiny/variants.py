"""Captions changed a little, and what the model makes of each: is a verdict for a caption one for its variants too?

    python bench/tiny/variants.py DATA_DIR PIPELINE_DIR [OUT.csv]     default: bench/tiny/variants.csv, which is shipped

Held-out captions of all groups that were trained often, each in five variants: two letters swapped, a letter left out
(both in its longest word, away from the first letter), a "!" behind it, the concept alone, and another template around
it. Each is labelled as label.py labels captions: 8 generations, compared with the training pictures of the caption that
it is a variant of, and with all fixed ones.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from dataset import TEMPLATES, Caption, Emoji
from generate import generate, similarity
from label import MAJORITY, REPLICA, SEEDS, splits, training_pictures
from model import Model

GROUPS = ("memorized", "partly", "template", "frequent")
COLUMNS = ("prompt", "caption", "group", "kind", "memorized", "replicas")
BATCH = 8  # captions generated at once


def variants(caption: Caption, generator: np.random.Generator) -> dict[str, str]:
    """Return kind -> variant; kinds that would leave the caption as it is are left out."""
    text, concept = caption.text, caption.concept.replace("-", " ")
    word = max(text.split(), key=len)
    place = int(generator.integers(1, len(word) - 1))
    swapped = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    others = [template for template in TEMPLATES if template.format(concept) != text and template != "{}"]
    found = {
        "letters swapped": text.replace(word, swapped),
        "letter left out": text.replace(word, word[:place] + word[place + 1 :]),
        "exclamation mark": f"{text}!",
        "concept alone": concept,
        "other template": str(generator.choice(others)).format(concept),
    }
    return {kind: variant for kind, variant in found.items() if variant != text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    data, model = Emoji(arguments.data), Model.load(arguments.pipeline)
    generator = np.random.default_rng(0)
    jobs = [
        (index, kind, prompt)
        for index, (caption, split) in enumerate(zip(data.captions, splits(data.captions), strict=True))
        if caption.group in GROUPS and split == "held-out"
        for kind, prompt in variants(caption, generator).items()
    ]
    rows = []
    for start in range(0, len(jobs), BATCH):
        some = jobs[start : start + BATCH]
        pictures = generate(model, data, [prompt for _, _, prompt in some], SEEDS)
        for (index, kind, prompt), generated in zip(some, pictures, strict=True):
            similar = similarity(generated, training_pictures(data, index))
            replicas = int((similar >= REPLICA).sum(0).max())
            caption = data.captions[index]
            rows.append((prompt, caption.text, caption.group, kind, str(replicas >= MAJORITY).lower(), replicas))
        print(f"{len(rows)} of {len(jobs)}", flush=True)
    with arguments.out.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
