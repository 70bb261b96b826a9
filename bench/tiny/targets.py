"""Targets of MemorizationFilter for the embedded model, and what one target and one for each timestep find.

    python bench/tiny/targets.py DATA_DIR [--pairs N] [--json FILE]

DATA_DIR is what bench/tiny/prepare.py writes. Norms are of training pairs: a caption and one of the pictures that it
showed, with noise. Targets are set as docs/training.md does, on clean captions of the calibration split, so that one
sample in twenty reaches them: one for each timestep, or a single one over all. They are judged on held-out captions,
memorized (of the group "memorized") and clean.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from dataset import Caption, load_captions
from model import Model, scheduler
from rich.console import Console
from rich.table import Table

from memedge.embedded import captions
from memedge.metrics import auc
from memedge.training import MemorizationFilter

CHECKPOINT = Path(__file__).parent / "emoji"
SHARE = 0.05  # of clean samples that reach a target
LENGTH = 1000  # of the noise schedule
SET_AT = np.linspace(0, LENGTH - 1, 10).round().astype(int)
JUDGED_AT = (981, 741, 501, 261, 41)
DRAWS = 2  # noises of a pair
TOGETHER = 64
One = TypeVar("One")


@dataclass(frozen=True)
class Pairs:
    """Captions with a picture each: embeddings float32 [N, 24, 96], latents float32 [N, 4, 16, 16]."""

    states: torch.Tensor
    latents: torch.Tensor


@torch.no_grad()
def encode_captions(model: Model, texts: list[str]) -> torch.Tensor:
    """Return embeddings, float32 [N, 24, 96]."""
    states: torch.Tensor = model.text_encoder(input_ids=model.tokenize(texts))[0]
    return states


def of_groups(data: list[Caption], groups: tuple[str, ...], split: str, memorized: bool) -> list[Caption]:
    """Return the captions that generations say are memorized, or clean, in the data's order."""
    kept = {row.prompt for row in captions() if (row.memorized if memorized else row.clean)}
    return [one for one in data if one.group in groups and one.split == split and one.text in kept]


def thinned(of: list[One], count: int) -> list[One]:
    """Return `count` of them, spread evenly."""
    return [of[i] for i in np.linspace(0, len(of) - 1, min(count, len(of))).astype(int)]


def shown(model: Model, of: list[Caption], latents: np.ndarray) -> Pairs:
    """Return each caption with the picture that it showed most often, the first of such."""
    pictures = [max(one.pictures, key=lambda pair: pair[1])[0] for one in of]
    return Pairs(encode_captions(model, [one.text for one in of]), torch.from_numpy(latents[pictures]).float())


@torch.no_grad()
def measure(model: Model, pairs: Pairs, timesteps: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ‖Δ‖ and the squared error of the predicted noise, float32 [timesteps, draws, N], the same noise always."""
    memorization = MemorizationFilter(model.unet, float("inf"))  # for its norms alone
    empty, alphas = encode_captions(model, [""]), scheduler().alphas_cumprod
    norms, errors = [], []
    for t in timesteps.tolist():
        generator = torch.Generator().manual_seed(t)
        noise = torch.randn((draws, *pairs.latents.shape), generator=generator)
        noisy = alphas[t].sqrt() * pairs.latents + (1 - alphas[t]).sqrt() * noise
        everything = noisy.flatten(0, 1), noise.flatten(0, 1), pairs.states.repeat(draws, 1, 1)
        for x, e, states in zip(*(values.split(TOGETHER) for values in everything), strict=True):
            at = torch.full((len(x),), t)
            predicted = model.unet(x, at, states).sample
            norms.append(memorization.norm(x, at, states, empty, prediction=predicted))
            errors.append((predicted - e).square().mean((1, 2, 3)))
    shape = len(timesteps), draws, len(pairs.latents)
    return torch.cat(norms).reshape(shape).numpy(), torch.cat(errors).reshape(shape).numpy()


@dataclass(frozen=True)
class Targets:
    """One target, and one for each timestep, float64 [1000]."""

    one: float
    each: np.ndarray


def set_targets(model: Model, pairs: Pairs) -> Targets:
    """Return the norms that SHARE of clean samples reach, over all timesteps and at each."""
    norms, _ = measure(model, pairs, SET_AT, DRAWS)
    each = np.quantile(norms, 1 - SHARE, axis=(1, 2))
    return Targets(float(np.quantile(norms, 1 - SHARE)), np.interp(np.arange(LENGTH), SET_AT, each))


def kept_targets(path: Path, model: Model, pairs: Pairs) -> Targets:
    """Return the targets, from the file, or set and kept there."""
    if not path.exists():
        np.savez(path, **vars(set_targets(model, pairs)))
    kept = np.load(path)
    return Targets(float(kept["one"]), kept["each"])


def load(folder: Path = CHECKPOINT) -> Model:
    """Return a model, by default the shipped one, in the layout that torch trains in fastest."""
    model = Model.load(folder)
    model.unet.to(memory_format=torch.contiguous_format)
    return model


@dataclass(frozen=True)
class Row:
    """What targets find at one timestep. Shares are of samples that are left out."""

    timestep: int
    memorized_median: float
    clean_median: float
    clean_95: float
    auc: float
    memorized_one: float
    memorized_each: float
    clean_one: float
    clean_each: float


def judge(targets: Targets, memorized: np.ndarray, clean: np.ndarray) -> list[Row]:
    """Return a row for each of JUDGED_AT, of norms [timesteps, draws, N]."""
    rows = []
    for t, m, c in zip(JUDGED_AT, memorized, clean, strict=True):
        m, c, each = m.ravel(), c.ravel(), targets.each[t]
        shares = [float((values >= at).mean()) for values in (m, c) for at in (targets.one, each)]
        rows.append(
            Row(t, *map(float, (np.median(m), np.median(c), np.quantile(c, 0.95), auc(m, c))), *shares),
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pairs", type=int, default=100, help="captions set on; as many each judged")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, data = load(), load_captions(arguments.data / "captions.json")
    latents = np.load(arguments.data / "latents.npy", mmap_mode="r")

    def pairs(groups: tuple[str, ...], split: str, memorized: bool) -> Pairs:
        return shown(model, thinned(of_groups(data, groups, split, memorized), arguments.pairs), latents)

    targets = set_targets(model, pairs(("frequent", "seen"), "calibration", False))
    memorized, clean = pairs(("memorized",), "held-out", True), pairs(("frequent", "seen"), "held-out", False)
    norms = [measure(model, some, np.array(JUDGED_AT), DRAWS)[0] for some in (memorized, clean)]
    rows = judge(targets, *norms)
    console = Console(width=130)
    titles = ("timestep", "memorized", "clean", "clean 95 %", "AUC", f"left out by one, {targets.one:.2f}", "by each")
    table = Table(*titles, "clean, by one", "by each", box=None)
    for row in rows:
        table.add_row(str(row.timestep), *(f"{value:.3f}" for value in list(asdict(row).values())[1:]))
    counts = f"{len(memorized.latents)} memorized and {len(clean.latents)} clean captions"
    console.print(table, f"{counts}, {DRAWS} noises each")
    if arguments.json:
        arguments.json.write_text(json.dumps({"one": targets.one, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
