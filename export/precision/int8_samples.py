"""The prompts that an int8 engine is calibrated on, and those its drift is measured on."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memedge.embedded import captions
from memedge.engine.errors import InputError
from memedge.prompts import files

# Enough to see how far activations go; SD 1.4 takes 11 s for each on one core, and 16 s for each one compared.
ACTIVATIONS = 16
DEFAULT_DRIFT = 32
FEWEST = 8


@dataclass(frozen=True)
class Samples:
    """Prompts to calibrate on, others to measure the drift on, and which of those are memorized [B], if known."""

    activations: list[str]
    drift: list[str]
    memorized: npt.NDArray[np.bool_] | None


def read_samples(path: Path | None) -> Samples:
    """Return all the prompts of a file, evenly spaced ones to calibrate on; without a file, some of our captions.

    A CSV file may have a column `memorized` (true or false).

    Raises:
        InputError: as files.read_prompts; fewer than 8 different prompts; another label than true or false.
    """
    if path is None:
        # Short captions of things: prompts like anyone's.
        shipped = [caption.prompt for caption in captions()]
        return _divide(_spread(shipped, ACTIVATIONS + DEFAULT_DRIFT), None)
    prompts = list(files.read_prompts(path))
    labels = _labels(path)
    known = dict(zip(prompts, labels or [False] * len(prompts), strict=True))
    known.pop("", None)  # its score is 0 in any precision
    if len(known) < FEWEST:
        raise InputError(f"{path} holds {len(known)} different prompts: give at least {FEWEST} to export in int8.")
    return _divide(list(known), np.array(list(known.values())) if labels else None)


def _labels(path: Path) -> list[bool]:
    """Return what the column `memorized` says, or nothing if there is none; the file has been read as prompts."""
    if path.suffix.lower() != ".csv":
        return []
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if "memorized" not in (rows.fieldnames or ()):
            return []
        labels = [row["memorized"].strip().lower() for row in rows]
    for label in labels:
        if label not in ("true", "false"):
            raise InputError(f"{path}: the column 'memorized' holds {label!r}; write true or false in every row.")
    return [label == "true" for label in labels]


def _divide(prompts: list[str], memorized: npt.NDArray[np.bool_] | None) -> Samples:
    activations = _spread(prompts, min(ACTIVATIONS, len(prompts) // 2))
    rest = [index for index, prompt in enumerate(prompts) if prompt not in activations]
    return Samples(activations, [prompts[i] for i in rest], None if memorized is None else memorized[rest])


def _spread(prompts: list[str], count: int) -> list[str]:
    return [prompts[i] for i in np.linspace(0, len(prompts) - 1, count).astype(int)]
