"""The journal of an evaluation: each prompt's scores by each detector, which survive a kill at any moment."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memedge.engine.arrays import Floats
from memedge.scoring.journal import JobFile, prompt_key

_HEADER = {
    "format": "version of memedge",
    "engine": "engine, calibration, provider or precision",
    "memorized": "list of memorized prompts",
    "clean": "list of clean prompts",
    "draws": "largest number of draws",
    "seed": "seed",
}


class Measurements(JobFile):
    """The scores of prompts by detector, and the seconds that they took."""

    def __init__(self, path: Path, header: dict[str, str], resume: bool):
        """Open the journal at `path`, or make it where there is none; raises as JobFile."""
        table = (
            "CREATE TABLE results (detector NOT NULL, prompt NOT NULL, scores NOT NULL, seconds NOT NULL,"
            " PRIMARY KEY (detector, prompt)) WITHOUT ROWID"
        )
        super().__init__(path, header, _HEADER, table, resume)

    def get(self, detector: str, prompt: str) -> tuple[Floats, float] | None:
        """Return a prompt's score on each draw, and its seconds, or None if it is not measured yet."""
        query = "SELECT scores, seconds FROM results WHERE detector = ? AND prompt = ?"
        row = self.find(query, detector, prompt_key(prompt))
        return None if row is None else (np.frombuffer(row[0], dtype="<f8"), row[1])

    def put(self, detector: str, prompts: Sequence[str], scores: Floats, seconds: float) -> None:
        """Commit the scores [B, n] of B prompts, which took these seconds each."""
        rows = [
            (detector, prompt_key(prompt), score.astype("<f8").tobytes(), seconds)
            for prompt, score in zip(prompts, scores, strict=True)
        ]
        self.insert("INSERT INTO results VALUES (?, ?, ?, ?)", rows)
