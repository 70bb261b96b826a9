"""What is shipped with memedge: a small engine, captions that its model was trained on or not, and pictures of them."""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"
EMBEDDED_ENGINE = DATA / "engine"
CAPTIONS = DATA / "captions.csv"
CLEAN_RATE = 2 / 16
PICTURES = DATA / "pictures"  # one strip per caption: training picture | generations, each 64 × 64, made beforehand


@dataclass(frozen=True)
class Caption:
    """A caption of the embedded model's benchmark. Labels come from what the model generates (docs/embedded-model.md).

    Attributes:
        prompt: the caption.
        group: how the model met it: "memorized", "near", "template", "partly", "frequent", "seen" or "unseen".
        split: "calibration" or "held-out"; no concept is in both.
        memorized: whether most of its generations are copies of training pictures: at least 9 of 16.
        replicas, generations: how many are, of how many: 16, or 4 of an unseen caption without a copy among them.
        rate, rate_low, rate_high: their share, and its 95 % interval (Wilson).
        strip: its picture in PICTURES, or None.
    """

    prompt: str
    group: str
    split: str
    memorized: bool
    replicas: int
    generations: int
    rate: float
    rate_low: float
    rate_high: float
    strip: Path | None

    @property
    def clean(self) -> bool:
        """Whether at most 2 of 16 generations are copies. What is neither clean nor memorized is so in part."""
        return self.rate <= CLEAN_RATE


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
                generations=int(row["generations"]),
                rate=float(row["rate"]),
                rate_low=float(row["rate_low"]),
                rate_high=float(row["rate_high"]),
                strip=PICTURES / row["picture"] if row["picture"] else None,
            )
            for row in csv.DictReader(file)
        )
