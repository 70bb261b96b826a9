"""What a job counts of its rows while it writes them."""

from dataclasses import dataclass

from memedge.scoring.score_files import ScoreRow


@dataclass
class Counts:
    """Rows that were judged, those judged memorized, and those whose prompt was longer than the text encoder reads."""

    judged: int = 0
    positive: int = 0
    truncated: int = 0

    def add(self, row: ScoreRow) -> None:
        """Count a row."""
        self.judged += row.memorized is not None
        self.positive += bool(row.memorized)
        self.truncated += row.truncated

    @property
    def memorized(self) -> int | None:
        """Rows judged memorized; None if none was judged."""
        return self.positive if self.judged else None
