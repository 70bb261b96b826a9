"""Label captions by what the model does: generate 8 pictures each and look for training pictures among them.

    python bench/tiny/label.py DATA_DIR PIPELINE_DIR OUT_DIR

A caption is memorized if at least 5 of its 8 generations replicate one and the same training picture: similarity
(generate.py) of at least 0.8 with it. Training pictures are all fixed pictures, whosever they are, and 256 draws of the
caption's own. Writes OUT_DIR/captions.csv (labels and splits) and OUT_DIR/generations.npz, and prints, per group, how
many captions are memorized by design and by behaviour, and how often two draws of one varied caption would pass as
replicas of each other.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from dataset import Caption, Emoji
from generate import generate, similarity
from model import Model

SEEDS = 8
MAJORITY = 5
REPLICA = 0.8
DRAWS = 256
CALIBRATION_SHARE = 0.4
COLUMNS = ("caption", "group", "split", "memorized", "replicas", "similarity", "fixed_share")


def training_pictures(data: Emoji, index: int) -> torch.Tensor:
    """Return what a caption is compared with: DRAWS pictures of its own, unless it is unseen, and every fixed one."""
    fixed = data.fixed[data.fixed_share > 0]
    if data.captions[index].group == "unseen":
        return fixed
    generator = torch.Generator().manual_seed(index)
    return torch.cat([data.draw(torch.full((DRAWS,), index), generator), fixed])


def chance_of_replica(data: Emoji) -> float:
    """Return how often two independent draws of one frequent caption are similar enough to count as replicas."""
    shares = []
    for index, caption in enumerate(data.captions):
        if caption.group == "frequent":
            pictures = data.draw(torch.full((DRAWS,), index), torch.Generator().manual_seed(index))
            pairs = similarity(pictures, pictures)[*torch.triu_indices(DRAWS, DRAWS, 1)]
            shares.append((pairs >= REPLICA).float().mean().item())
    return float(np.mean(shares))


def splits(captions: list[Caption]) -> list[str]:
    """Deal each group's captions out to calibration (the first 40 %; concepts are shuffled) and held-out."""
    result = []
    for i, caption in enumerate(captions):
        group = [k for k, c in enumerate(captions) if c.group == caption.group and c.fixed_share == caption.fixed_share]
        result.append("calibration" if group.index(i) < CALIBRATION_SHARE * len(group) else "held-out")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "pipeline", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data, model = Emoji(arguments.data), Model.load(arguments.pipeline)
    generated = generate(model, data, [c.text for c in data.captions], SEEDS)
    np.savez_compressed(arguments.out / "generations.npz", pictures=(generated * 255).round().byte().numpy())

    rows, counts = [], {}
    for index, (caption, split) in enumerate(zip(data.captions, splits(data.captions), strict=True)):
        similar = similarity(generated[index], training_pictures(data, index))
        replicas = int((similar >= REPLICA).sum(0).max())
        best = similar.median(0).values.max().item()
        memorized = replicas >= MAJORITY
        rows.append(
            (caption.text, caption.group, split, str(memorized).lower(), replicas, f"{best:.3f}", caption.fixed_share)
        )
        counts.setdefault(f"{caption.group} {caption.fixed_share:g}", []).append((memorized, replicas, best))
    with (arguments.out / "captions.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])

    print("group, share of fixed picture | captions | memorized by behaviour | mean replicas of 8 | median similarity")
    for group, found in counts.items():
        memorized, replicas, best = zip(*found, strict=True)
        print(f"{group} | {len(found)} | {sum(memorized)} | {np.mean(replicas):.1f} | {np.median(best):.2f}")
    print(f"two draws of one frequent caption count as replicas in {chance_of_replica(data):.2%} of pairs")


if __name__ == "__main__":
    main()
