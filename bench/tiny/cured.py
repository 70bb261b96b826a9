"""Is it cured? The embedded model after pruning, after a filter, after a cure: prompts, audit, quality, detector.

    python bench/tiny/cured.py DATA_DIR NAME PIPELINE_DIR AUDIT_DIR [NAME PIPELINE_DIR AUDIT_DIR …] [--json FILE]

DATA_DIR is what bench/tiny/prepare.py writes; an audit is what `memedge audit` wrote of the pipeline (of a cured one,
its folder cure/after). Each model's row:

- by caption, within n steps: the share of the audit's memorized pictures that are printed so, with 95 % intervals
  (Wilson).
- concept: of 24 frequent captions, the share of 4 generations that show what the caption says (concepts.py), with the
  95 % interval of resampled captions.
- AUC: of the shipped detector's score on an engine made of the model, of the audit's memorized captions against the
  frequent ones. found, false alarms: of these captions, at the threshold that was calibrated on the model as shipped,
  which belongs to that one alone: what a server sees that changes its model and not its engine's calibration.
- norm: the median of the memorized captions.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from concepts import Data, Gallery
from generate import Generator
from model import Model
from pairs import AUDITED, spread
from prune import interval
from rich.console import Console
from rich.table import Table
from vae import decode

from memedge import Detector, export_engine
from memedge.audit.figures import Share
from memedge.embedded import EMBEDDED_ENGINE, captions
from memedge.metrics import auc

GENERATIONS = 4
STEPS = 10, 20, 30  # of audits


@dataclass(frozen=True)
class Row:
    """One model's figures."""

    model: str
    pictures: int
    by_caption: Share
    within: dict[int, Share]
    concept: float
    concept_interval: tuple[float, float]
    auc: float
    found: float
    false_alarms: float
    norm: float


def engine_of(pipeline: Path, place: Path) -> Detector:
    """Export a pipeline, and give its engine the calibration of the shipped one."""
    export_engine(str(pipeline), place)
    manifest, shipped = (json.loads((folder / "manifest.json").read_text()) for folder in (place, EMBEDDED_ENGINE))
    manifest["calibrations"] = shipped["calibrations"]
    (place / "manifest.json").write_text(json.dumps(manifest))
    return Detector.load(place, "cpu", threads=1)


def measure(name: str, pipeline: Path, audit: Path, data: Data, gallery: Gallery, frequent: list[str]) -> Row:
    images = [one for one in json.loads((audit / "report.json").read_text())["images"] if one["memorized"]]
    within = {
        step: Share.among([one["steps"] is not None and one["steps"] <= step for one in images]) for step in STEPS
    }
    model = Model.load(pipeline)
    latents = Generator(model, 1).latents(frequent, range(GENERATIONS))
    made = np.split(decode(model.vae, latents.flatten(0, 1)), len(frequent))
    concepts = {caption.text: caption.concept for caption in data.captions}
    shown = np.array([gallery.shows(some, concepts[text]).mean() for some, text in zip(made, frequent, strict=True)])
    place = Path(tempfile.mkdtemp())
    try:
        detector = engine_of(pipeline, place / "engine")
        memorized, clean = (detector.score(texts) for texts in ([one["caption"] for one in images], frequent))
    finally:
        shutil.rmtree(place)
    assert memorized.memorized is not None
    assert clean.memorized is not None
    return Row(
        name,
        len(images),
        Share.among([bool(one["by_prompt"]) for one in images]),
        within,
        float(shown.mean()),
        interval(shown),
        float(auc(np.asarray(memorized.score), np.asarray(clean.score))),
        float(np.mean(memorized.memorized)),
        float(np.mean(clean.memorized)),
        float(np.median(memorized.norm)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+", metavar="NAME PIPELINE_DIR AUDIT_DIR")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names, pipelines, audits = (arguments.models[start::3] for start in range(3))
    data = Data(arguments.data, Model.load(Path(pipelines[0])).vae)
    trained = {caption.text: caption for caption in data.captions}
    held_out = [one.prompt for one in captions() if one.split == "held-out" and one.group == "frequent"]
    frequent = [caption.text for caption in spread([trained[text] for text in held_out], AUDITED)]
    gallery = Gallery(data)
    rows = [
        measure(name, Path(pipeline), Path(audit), data, gallery, frequent)
        for name, pipeline, audit in zip(names, pipelines, audits, strict=True)
    ]
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def show(rows: list[Row]) -> None:
    head = ("", "pictures", "by caption", *(f"within {step} steps" for step in STEPS))
    table = Table(*head, "concept", "AUC", "found", "false alarms", "norm", box=None)
    for row in rows:
        shares = [f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in (row.by_caption, *row.within.values())]
        low, high = row.concept_interval
        table.add_row(
            row.model,
            str(row.pictures),
            *shares,
            f"{row.concept:.2f} [{low:.2f}, {high:.2f}]",
            f"{row.auc:.3f}",
            f"{row.found:.2f}",
            f"{row.false_alarms:.2f}",
            f"{row.norm:.2f}",
        )
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
