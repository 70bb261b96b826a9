"""The journal of a calibration: each prompt's norm, and its alignment of each pair that may be chosen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memedge.engine.arrays import Floats
from memedge.engine.manifest import Operands
from memedge.scoring.journal import JobFile

CHOICES: tuple[Operands, ...] = ("uncond_delta", "cond_uncond")
_HEADER = {
    "format": "version of memedge",
    "engine": "engine, provider or precision",
}
_FORMAT = "1"


class StatisticsJournal(JobFile):
    """Statistics of prompts by their token ids, for whatever lists: those of a fit that failed serve corrected ones."""

    def __init__(self, path: Path, engine: str, resume: bool):
        """Open the journal at `path`, or make it where there is none; raises as JobFile."""
        columns = ", ".join(f"{name} NOT NULL" for name in ("norm", *CHOICES))
        table = f"CREATE TABLE results (prompt PRIMARY KEY, {columns}) WITHOUT ROWID"
        super().__init__(path, {"format": _FORMAT, "engine": engine}, _HEADER, table, resume)

    def get(self, key: bytes) -> tuple[float, ...] | None:
        """Return a prompt's norm and alignments, in the order of CHOICES, or None if it has none yet."""
        return self.find(f"SELECT {', '.join(('norm', *CHOICES))} FROM results WHERE prompt = ?", key)

    def put(self, keys: Sequence[bytes], statistics: Floats) -> None:
        """Commit the statistics [B, 1 + len(CHOICES)] of B prompts."""
        marks = ", ".join("?" * (statistics.shape[1] + 1))
        rows = [(key, *map(float, np.asarray(row))) for key, row in zip(keys, statistics, strict=True)]
        self.insert(f"INSERT INTO results VALUES ({marks})", rows)
