"""Captions changed a little, and what the model makes of each: is a verdict for a caption one for its variants too?

    python bench/tiny/variants.py DATA_DIR PIPELINE_DIR [OUT.csv]     default: bench/tiny/variants.csv, which is shipped

Some held-out captions of all groups that were trained often, each in five variants: two letters swapped, a letter left
out (both in its longest word, away from the first letter), a "!" behind it, the concept alone, and another template
around it. Each is labelled as label.py labels captions: 16 generations, compared with all training pictures.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from copies import fields, nearest, printed
from dataset import TEMPLATES, Caption, load_captions
from generate import Generator
from label import COPY, SEEDS, TOGETHER, kind
from model import Model
from vae import decode

EACH = {"memorized": 40, "near": 20, "template": 20, "partly": 20, "frequent": 20}  # captions of a group
COLUMNS = ("prompt", "caption", "group", "kind", "memorized", "replicas", "generations")


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
    captions = [c for c in load_captions(arguments.data / "captions.json") if c.split == "held-out"]
    chosen = [c for group, count in EACH.items() for c in [c for c in captions if c.group == group][:count]]
    model, rng = Model.load(arguments.pipeline), np.random.default_rng(0)
    training = printed(model.vae, np.load(arguments.data / "latents.npy"))
    generator = Generator(model)
    jobs = [(caption, name, prompt) for caption in chosen for name, prompt in variants(caption, rng).items()]
    rows: list[tuple[str | int, ...]] = []
    for start in range(0, len(jobs), TOGETHER):
        some = jobs[start : start + TOGETHER]
        latents = generator.latents([prompt for _, _, prompt in some], range(SEEDS))
        similar, _ = nearest(fields(decode(model.vae, latents.flatten(0, 1))), training)
        copies = (similar.reshape(len(some), SEEDS) >= COPY).sum(1).tolist()
        rows += [
            (prompt, caption.text, caption.group, name, str(kind(n, SEEDS) == "memorized").lower(), n, SEEDS)
            for (caption, name, prompt), n in zip(some, copies, strict=True)
        ]
        print(f"{len(rows)} of {len(jobs)}", flush=True)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
