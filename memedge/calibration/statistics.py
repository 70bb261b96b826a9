"""The journal of a calibration: each prompt's norm, alignment of each pair that may be chosen, and changes at taps."""

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
_FORMAT = "2"


class StatisticsJournal(JobFile):
    """Statistics of prompts by their token ids, for whatever lists: those of a fit that failed serve corrected ones."""

    def __init__(self, path: Path, engine: str, resume: bool):
        """Open the journal at `path`, or make it where there is none; raises as JobFile."""
        columns = ", ".join(f"{name} NOT NULL" for name in ("norm", *CHOICES, "changes"))
        table = f"CREATE TABLE results (prompt PRIMARY KEY, {columns}) WITHOUT ROWID"
        super().__init__(path, {"format": _FORMAT, "engine": engine}, _HEADER, table, resume)

    def get(self, key: bytes) -> Floats | None:
        """Return a prompt's norm, alignments in the order of CHOICES, and changes; or None if it has none yet."""
        found = self.find(f"SELECT {', '.join(('norm', *CHOICES, 'changes'))} FROM results WHERE prompt = ?", key)
        return None if found is None else np.concatenate([found[:-1], np.frombuffer(found[-1])])

    def put(self, keys: Sequence[bytes], statistics: Floats) -> None:
        """Commit the statistics of B prompts, [B, 1 + len(CHOICES) + C] with the changes of C channels of all taps."""
        own = 1 + len(CHOICES)
        marks = ", ".join("?" * (own + 2))
        rows = [(key, *map(float, row[:own]), row[own:].tobytes()) for key, row in zip(keys, statistics, strict=True)]
        self.insert(f"INSERT INTO results VALUES ({marks})", rows)
