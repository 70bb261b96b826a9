"""Prune the embedded model until its memorized prompts stop replicating: what an audit is tried on.

    python bench/tiny/prune.py DATA_DIR PAIRS OUT_DIR --method nemo|wanda [--json FILE]

DATA_DIR is what prepare.py and train_vae.py write. PAIRS is a file of columns image, caption and memorized (true or
false): the memorized captions are pruned away, the others are controls. Writes OUT_DIR/pipeline, a model whose weights
are zero where it was pruned, so that anything can load it.

- nemo: neurons of the cross-attention's value projections, of --places, that at least --least prompts are replicated by
  (nemo.py). The paper's places are down and mid, and its pruned model has the union, which is --least 1.
- wanda: --share of the weights, a row, of the feed-forward parts' second layers (wanda.py).

Clean prompts are calibration captions that the model was trained on and doesn't replicate: for nemo every third, for
wanda frequent ones, as many as there are memorized ones.

The table has both models. Replicas: the share of a memorized prompt's generations that are copies of any training
picture, as label.py counts them; memorized: captions with more than half such. Concept: the share of the controls'
generations that show what their caption says (concepts.py). Both with 95 % intervals, of 2000 resamples of captions.
Norm: the median of ‖Δ‖₂ at t = 981, of memorized captions and of controls. A picture that is only blurred is no copy
either by edges: look at what the pruned model makes.
"""

import argparse
import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import nemo
import numpy as np
import torch
import wanda
from concepts import Data, Gallery
from generate import Generator, noise
from model import Model
from rich.console import Console
from rich.table import Table
from vae import decode

from memedge.embedded import captions

NOISIEST = 981
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """One model's figures; intervals are (low, high)."""

    model: str
    replicas: float
    replicas_interval: tuple[float, float]
    memorized: int
    captions: int
    concept: float
    concept_interval: tuple[float, float]
    controls_replicas: float
    norm_memorized: float
    norm_controls: float


def interval(rates: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean of captions' rates [P]."""
    rng = np.random.default_rng(0)
    means = rates[rng.integers(0, len(rates), (RESAMPLES, len(rates)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


@torch.inference_mode()
def norms(model: Model, prompts: list[str]) -> torch.Tensor:
    """Return ‖Δ‖₂ of prompts [P], each on noise of its own."""
    noisy = noise(range(len(prompts)))
    cond, uncond = (
        model.unet(noisy, NOISIEST, nemo.encode(model, texts)).sample for texts in (prompts, [""] * len(prompts))
    )
    return (cond - uncond).flatten(1).norm(dim=1)


def measure(
    name: str, model: Model, data: Data, gallery: Gallery, memorized: list[str], controls: list[str], generations: int
) -> Row:
    """Generate, and count."""
    concept_of = {caption.text: caption.concept for caption in data.captions}
    latents = Generator(model, 1).latents(memorized + controls, range(generations))
    pictures = decode(model.vae, latents.flatten(0, 1))
    copies = data.replicated(pictures)[0].reshape(-1, generations).mean(1)
    replicas, of_controls = copies[: len(memorized)], copies[len(memorized) :]
    shown = np.split(pictures, len(memorized + controls))[len(memorized) :]
    concept = np.array(
        [gallery.shows(some, concept_of[text]).mean() for some, text in zip(shown, controls, strict=True)]
    )
    return Row(
        name,
        float(replicas.mean()),
        interval(replicas),
        int((replicas > 0.5).sum()),
        len(memorized),
        float(concept.mean()),
        interval(concept),
        float(of_controls.mean()),
        float(norms(model, memorized).median()),
        float(norms(model, controls).median()),
    )


def prune_nemo(model: Model, memorized: list[str], places: tuple[str, ...], least: int) -> tuple[int, int]:
    """Zero neurons; return how many, and of how many."""
    clean = [row.prompt for row in captions() if row.split == "calibration" and row.clean and row.group != "unseen"][
        ::3
    ]
    search = nemo.Search(model, nemo.encode(model, clean), places)
    found = []
    for number, prompt in enumerate(memorized, 1):
        found.append(search.neurons(nemo.encode(model, [prompt])))
        print(f"{number} of {len(memorized)}: {prompt}, {sum(map(len, found[-1].values()))} neurons", flush=True)
    chosen = nemo.shared(found, least)
    nemo.zero(search.layers, chosen)
    return sum(map(len, chosen.values())), sum(layer.out_features for layer in search.layers.values())


def prune_wanda(model: Model, memorized: list[str], share: float) -> tuple[int, int]:
    """Zero weights; return how many, and of how many."""
    clean = [row.prompt for row in captions() if row.split == "calibration" and row.clean and row.group == "frequent"]
    clean = clean[:: len(clean) // len(memorized)][: len(memorized)]
    return wanda.zero(model, nemo.encode(model, memorized), nemo.encode(model, clean), share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "pairs", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--method", choices=("nemo", "wanda"), required=True)
    parser.add_argument("--pipeline", type=Path, default=Path(__file__).parent / "emoji")
    parser.add_argument("--places", nargs="+", choices=("down", "mid", "up"), default=nemo.PLACES, help="of nemo")
    parser.add_argument("--least", type=int, default=1, help="of nemo: prompts that a neuron is found for")
    parser.add_argument("--share", type=float, default=wanda.SHARE, help="of wanda")
    parser.add_argument("--generations", type=int, default=8, help="for each caption")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with arguments.pairs.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    memorized, controls = ([row["caption"] for row in rows if row["memorized"] == kind] for kind in ("true", "false"))
    model = Model.load(arguments.pipeline)
    if arguments.method == "nemo":
        zeroed, total = prune_nemo(model, memorized, tuple(arguments.places), arguments.least)
    else:
        zeroed, total = prune_wanda(model, memorized, arguments.share)
    print(
        f"{zeroed} of {total} {'neurons' if arguments.method == 'nemo' else 'weights'} are zero, {zeroed / total:.1%}"
    )
    model.save(arguments.out / "pipeline")

    models = {"before": arguments.pipeline, "after": arguments.out / "pipeline"}
    loaded = {name: Model.load(folder) for name, folder in models.items()}
    data = Data(arguments.data, loaded["before"].vae)
    gallery, size = Gallery(data), arguments.generations
    table = [measure(name, one, data, gallery, memorized, controls, size) for name, one in loaded.items()]
    show(table)
    if arguments.json:
        found = {"method": arguments.method, "zeroed": zeroed, "total": total, "table": [asdict(row) for row in table]}
        arguments.json.write_text(json.dumps(found, indent=1))


def show(rows: list[Row]) -> None:
    table = Table("", "replicas", "memorized", "concept", "controls' replicas", "norm", "controls' norm", box=None)
    for row in rows:
        shares = [
            f"{share:.0%} [{low:.0%}, {high:.0%}]"
            for share, (low, high) in ((row.replicas, row.replicas_interval), (row.concept, row.concept_interval))
        ]
        table.add_row(
            row.model,
            shares[0],
            f"{row.memorized} of {row.captions}",
            shares[1],
            f"{row.controls_replicas:.0%}",
            f"{row.norm_memorized:.2f}",
            f"{row.norm_controls:.2f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
