"""Label captions by what the model does: generate 16 pictures each, and look for training pictures among them.

    python bench/tiny/label.py DATA_DIR PIPELINE_DIR OUT_DIR [--captions 100] [--flow]

A generation is a copy if its similarity (copies.py) with any training picture is at least COPY, which judged.csv
supports (judge.py). A caption is memorized if most of its generations are copies, 9 of 16 or more, partly memorized at
3 to 8, clean at 2 or fewer. Of a caption that was left out of training, 4 generations are made first, and the others
only if there is a copy among them.

Latents are kept in OUT_DIR/latents.npy, and a run that was cut off goes on from there. Writes OUT_DIR/labels.csv: a row
a caption, with the copies' share, its 95 % interval (Wilson), and the nearest training picture of each generation. With
--captions, that many spread over the groups, to see how training goes. With --flow the pipeline is of flow_train.py,
and its captions lie beside it.
"""

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from copies import fields, nearest, printed
from dataset import Caption
from flow_generate import FlowGenerator, generator_of, load
from flow_model import FlowModel
from generate import SHAPE, Generator
from model import Model
from scipy.stats import binomtest
from vae import decode

SEEDS = 16
FIRST = 4  # of captions that were left out of training
COPY = 0.8
MEMORIZED, PARTLY = 9, 3  # of 16
TOGETHER = 16  # captions generated at once
COLUMNS = (
    "caption", "group", "split", "memorized", "replicas", "generations", "rate", "rate_low", "rate_high",
    "similarity", "exposures", "concept", "pictures",
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """The pictures that a model was trained on: their ids [M], and their fields (copies.py) [M, D]."""

    ids: np.ndarray
    fields: torch.Tensor


def kind(copies: int, generations: int) -> str:
    """Return "memorized", "partly" or "clean"."""
    rate = copies / generations
    return "memorized" if rate >= MEMORIZED / SEEDS else "partly" if rate >= PARTLY / SEEDS else "clean"


def spread(captions: list[Caption], count: int | None) -> list[int]:
    """Return the indices of all captions, or of so many, evenly over groups and their exposures."""
    if count is None:
        return list(range(len(captions)))
    groups = list(dict.fromkeys(caption.group for caption in captions))
    chosen = []
    for group in groups:
        of = sorted((i for i, c in enumerate(captions) if c.group == group), key=lambda i: captions[i].exposures)
        chosen += [of[i] for i in np.unique(np.linspace(0, len(of) - 1, count // len(groups)).astype(int))]
    return chosen


def generate(generator: Generator | FlowGenerator, texts: list[str], kept: np.ndarray, wanted: dict[int, int]) -> None:
    """Fill in what is missing of the latents [N, 16, 4, 16, 16]: the first so many of each caption."""
    start, jobs = time.monotonic(), []
    for count in sorted(set(wanted.values())):
        have = np.isfinite(kept[:, :count, 0, 0, 0].astype(np.float32)).sum(1)
        for done in sorted({int(have[i]) for i, n in wanted.items() if n == count and have[i] < count}):
            some = [i for i, n in wanted.items() if n == count and have[i] == done]
            jobs += [(some[k : k + TOGETHER], range(done, count)) for k in range(0, len(some), TOGETHER)]
    for number, (some, seeds) in enumerate(jobs, 1):
        made = generator.latents([texts[i] for i in some], seeds)
        kept[some, seeds.start : seeds.stop] = made.numpy().astype(np.float16)
        if number % 10 == 0 or number == len(jobs):
            left = (time.monotonic() - start) / number * (len(jobs) - number) / 60
            print(f"{number} of {len(jobs)} batches, {left:.0f} minutes left", flush=True)


def matched(
    model: Model | FlowModel,
    kept: np.ndarray,
    wanted: dict[int, int],
    training: Training,
    matches: dict[int, np.ndarray],
) -> None:
    """Add to matches, for captions that are not in it with as many generations, similarity and picture [2, n]."""
    for i, count in wanted.items():
        if i in matches and matches[i].shape[1] == count:
            continue
        pictures = decode(model.vae, torch.from_numpy(kept[i, :count].astype(np.float32)))
        value, picture = nearest(fields(pictures), training.fields)
        matches[i] = np.stack([value.numpy(), training.ids[picture.numpy()]])


def row(caption: Caption, match: np.ndarray) -> tuple[str | int | float, ...]:
    """Return a line of labels.csv."""
    generations = match.shape[1]
    copies = int((match[0] >= COPY).sum())
    interval = binomtest(copies, generations).proportion_ci(method="wilson")
    return (
        caption.text,
        caption.group,
        caption.split,
        str(kind(copies, generations) == "memorized").lower(),
        copies,
        generations,
        f"{copies / generations:.4f}",
        f"{interval.low:.4f}",
        f"{interval.high:.4f}",
        f"{np.median(match[0]):.3f}",
        caption.exposures,
        caption.concept,
        " ".join(str(int(i)) for i in match[1]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "pipeline", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--captions", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flow", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    captions, model = load(arguments.data, arguments.pipeline, arguments.flow)
    chosen = spread(captions, arguments.captions)
    path = arguments.out / "latents.npy"
    if path.exists():
        kept = np.load(path, mmap_mode="r+")
    else:
        kept = np.lib.format.open_memmap(path, "w+", np.float16, (len(captions), SEEDS, *SHAPE))
        kept[:] = np.nan
    ids = np.array(sorted({i for caption in captions for i, _ in caption.pictures}))
    training = Training(ids, printed(model.vae, np.load(arguments.data / "latents.npy")[ids]))
    generator, matches = generator_of(model, arguments.threads), dict[int, np.ndarray]()
    texts = [caption.text for caption in captions]

    wanted = {i: SEEDS if captions[i].pictures else FIRST for i in chosen}
    generate(generator, texts, kept, wanted)
    matched(model, kept, wanted, training, matches)
    wanted = {i: SEEDS if (matches[i][0] >= COPY).any() else n for i, n in wanted.items()}
    generate(generator, texts, kept, wanted)
    matched(model, kept, wanted, training, matches)

    rows = [dict(zip(COLUMNS, row(captions[i], matches[i]), strict=True)) for i in chosen]
    with (arguments.out / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print("group | captions | memorized | partly | clean | mean share of copies | median similarity")
    for group in dict.fromkeys(str(found["group"]) for found in rows):
        some = [found for found in rows if found["group"] == group]
        kinds = [kind(int(found["replicas"]), int(found["generations"])) for found in some]
        counts = " | ".join(str(kinds.count(name)) for name in ("memorized", "partly", "clean"))
        rate = np.mean([float(found["rate"]) for found in some])
        similar = np.median([float(found["similarity"]) for found in some])
        print(f"{group} | {len(some)} | {counts} | {rate:.3f} | {similar:.2f}")


if __name__ == "__main__":
    main()
