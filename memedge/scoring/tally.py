"""What a scoring run says at its end of all its rows, kept while they are written: in bounded memory, a row at a time.

Counts and lists are exact. Bins of the distribution are, but for values within 0.025 % of an edge that is not the
threshold (memedge/scoring/distribution.py).
"""

import heapq
from dataclasses import dataclass
from typing import Literal

from memedge.scoring.counts import Counts
from memedge.scoring.distribution import Distribution
from memedge.scoring.score_files import ScoreRow

LISTED = 50  # prompts of each list


@dataclass
class ListedPrompt:
    """A prompt that is listed, once however many rows have it.

    Attributes:
        row: the first row added of the prompt with this score.
        number: that row's number in the input, from 1.
        rows: rows of the prompt with this score. Equal prompts have equal scores, unless they were scored apart; then
            the list has the score that puts the prompt highest, and counts the rows of that one.
    """

    row: ScoreRow
    number: int
    rows: int


class Tally:
    """Counts, distribution and remarkable prompts of all rows of a run.

    Args:
        threshold: what verdicts are by, or None.
        kind: what is tallied: "score"; "norm" where the engine has no weights that make a score.

    Attributes:
        threshold, kind: as given.
        rows: rows added.
        early: those among them that were decided without a score. They are in no distribution and in no list.
        early_memorized: those of them that are memorized.
        distribution: of the score, or the norm.
    """

    def __init__(self, threshold: float | None, kind: Literal["score", "norm"]):
        self.threshold, self.kind = threshold, kind
        self.rows = self.early = self.early_memorized = 0
        self.distribution = Distribution(threshold)
        self._counts = Counts()
        self._highest, self._above, self._below, self._cut = (_Prompts(LISTED) for _ in range(4))

    def add(self, row: ScoreRow, number: int) -> None:
        """Add a row: the `number`-th of the input, from 1. Rows may come in any order."""
        value = self.value(row)
        self.rows += 1
        self._counts.add(row)
        if value is None:
            self.early += 1
            self.early_memorized += bool(row.memorized)
            return
        self.distribution.add(value)
        if value >= self._highest.floor:
            self._highest.offer(value, row, number)
        if self.threshold is not None:
            nearness = -abs(value - self.threshold)
            side = self._above if value >= self.threshold else self._below
            if nearness >= side.floor:
                side.offer(nearness, row, number)
        if row.truncated and value >= self._cut.floor:
            self._cut.offer(value, row, number)

    def value(self, row: ScoreRow) -> float | None:
        """Return a row's score, or its norm; None if it was decided without."""
        return row.norm if self.kind == "norm" else row.score

    @property
    def valued(self) -> int:
        """Rows with a score, or a norm."""
        return self.rows - self.early

    @property
    def memorized(self) -> int | None:
        """Rows judged memorized; None if no row was judged."""
        return self._counts.memorized

    @property
    def truncated(self) -> int:
        """Rows whose prompt was longer than the text encoder reads."""
        return self._counts.truncated

    @property
    def suspicious(self) -> list[ListedPrompt]:
        """The LISTED prompts of the highest values, highest first."""
        return self._highest.listed()

    @property
    def above(self) -> list[ListedPrompt]:
        """The LISTED prompts nearest to the threshold among those that reach it, nearest first."""
        return self._above.listed()

    @property
    def below(self) -> list[ListedPrompt]:
        """The LISTED prompts nearest to the threshold among those below it, nearest first."""
        return self._below.listed()

    @property
    def truncated_highest(self) -> list[ListedPrompt]:
        """The LISTED truncated prompts of the highest values, highest first."""
        return self._cut.listed()


class _Prompts:
    """The `most` different prompts of the greatest keys; of equal keys, those that came first.

    A prompt's key is the greatest of its rows. The least key listed never falls, so a prompt that is left out or put
    out comes back with a greater key alone. A listed prompt has therefore been here since its first row of that key:
    its rows of that key are all counted.
    """

    def __init__(self, most: int):
        self.floor = float("-inf")  # rows of a smaller key need not be offered
        self._most = most
        self._found: dict[str, tuple[float, ListedPrompt]] = {}
        self._order: list[tuple[float, int, str]] = []  # a heap: the one to put out comes first
        self._offers = 0

    def offer(self, key: float, row: ScoreRow, number: int) -> None:
        """Add a row if its prompt belongs here."""
        self._offers += 1
        entry = key, -self._offers, row.prompt
        if known := self._found.get(row.prompt):
            if key == known[0]:
                known[1].rows += 1
            if key <= known[0]:
                return
            self._order = [one for one in self._order if one[2] != row.prompt]
            heapq.heapify(self._order)
            heapq.heappush(self._order, entry)
        elif len(self._found) < self._most:
            heapq.heappush(self._order, entry)
        elif key > self._order[0][0]:
            del self._found[heapq.heapreplace(self._order, entry)[2]]
        else:
            return
        self._found[row.prompt] = key, ListedPrompt(row, number, 1)
        if len(self._found) == self._most:
            self.floor = self._order[0][0]

    def listed(self) -> list[ListedPrompt]:
        return [self._found[prompt][1] for _, _, prompt in sorted(self._order, reverse=True)]
