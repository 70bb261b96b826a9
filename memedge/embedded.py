"""What is shipped with memedge: a small engine, captions that its model was trained on or not, and pictures of them."""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"
EMBEDDED_ENGINE = DATA / "engine"
CAPTIONS = DATA / "captions.csv"
PICTURES = DATA / "pictures"  # one strip per caption: training picture | generations, each 32 × 32, made beforehand


@dataclass(frozen=True)
class Caption:
    """A caption of the embedded model's benchmark (bench/tiny says how it was labelled).

    Attributes:
        prompt: the caption.
        group: how the model met it: "memorized", "partly", "template", "once", "frequent" or "unseen".
        split: "calibration" or "held-out".
        memorized: whether its generations replicate training pictures.
        replicas: how many of 8 generations do.
        strip: its picture in PICTURES, or None.
    """

    prompt: str
    group: str
    split: str
    memorized: bool
    replicas: int
    strip: Path | None


@cache
def captions() -> tuple[Caption, ...]:
    """Return all captions, in the order of the file."""
    with CAPTIONS.open(newline="", encoding="utf-8") as file:
        return tuple(
            Caption(
                prompt=row["caption"],
                group=row["group"],
                split=row["split"],
                memorized=row["memorized"] == "true",
                replicas=int(row["replicas"]),
                strip=PICTURES / row["picture"] if row["picture"] else None,
            )
            for row in csv.DictReader(file)
        )
