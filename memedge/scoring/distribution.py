"""How the scores of any number of rows are distributed, in memory that does not grow with them.

Each value is counted under the nearest number that float32's sign, exponent and first eleven binary digits can hold:
within 0.025 % of it, finer than three decimal digits. Bins are chosen when all values are known. Values from the
threshold on are counted apart from those below it, so that no bin mixes the two.
"""

import math
from array import array
from dataclasses import dataclass

import numpy as np

from memedge.engine.arrays import Floats, Indices

DROPPED = 12  # of float32's 32 bits
PRECISION = 2.0**-12  # relative: half a step of the eleven digits of the fraction that are kept
CHUNK = 8192  # values that wait to be counted together
LARGEST = float(np.float32(3e38))  # what is beyond is counted here

BODY = (0.005, 0.995)  # quantiles; what lies farther from these than REACH times their distance gets no bins of its own
REACH = 3.0
STEPS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)  # widths of bins, times a power of ten


@dataclass(frozen=True)
class Bins:
    """Values counted in bins of one width.

    Attributes:
        edges: n + 1 ascending; bin i holds values from edges[i] on and below edges[i + 1]. If all values are equal,
            there is one bin of no width.
        rows: n counts.
        beyond: whether the first bin also has values below it, and the last one values above it.
        split: the first bin of values from the threshold on: 0 if all are, n if none is; None without a threshold.
    """

    edges: list[float]
    rows: list[int]
    beyond: tuple[bool, bool]
    split: int | None

    def words(self, place: int, between: str = " to ") -> str:
        """Return which values a bin holds, such as "2.3 to 2.5", with as many digits as tell edges apart."""
        width = self.edges[1] - self.edges[0]
        if width == 0:
            return f"{self.edges[0]:.4g}"
        digits = max(0, 1 - math.floor(math.log10(width)))
        low, high = (f"{self.edges[place + side]:.{digits}f}" for side in (0, 1))
        if place == 0 and self.beyond[0]:
            return f"below {high}"
        if place == len(self.rows) - 1 and self.beyond[1]:
            return f"from {low} on"
        return f"{low}{between}{high}"


class Distribution:
    """Counts of finite values.

    Args:
        threshold: values from it on are counted apart; None: there is none.
    """

    def __init__(self, threshold: float | None):
        self.threshold = threshold
        self._ends = math.inf, -math.inf
        self._waiting = array("d")
        # A page of memory is taken when a value first falls there: most never are.
        self._counts = np.zeros((2, 1 << (32 - DROPPED)), dtype=np.int64)

    def add(self, value: float) -> None:
        """Count a value."""
        self._waiting.append(value)
        if len(self._waiting) == CHUNK:
            self._count()

    @property
    def lowest(self) -> float:
        """The lowest value; infinite if there is none."""
        self._count()
        return self._ends[0]

    @property
    def highest(self) -> float:
        """The highest value."""
        self._count()
        return self._ends[1]

    def quantile(self, share: float) -> float:
        """Return a value, rounded as counted, that a share of all is at or below; there must be a value."""
        values, counts = self._ordered()
        totals = np.cumsum(counts.sum(axis=0))
        return float(values[np.searchsorted(totals, share * totals[-1])])

    def bins(self, most: int) -> Bins:
        """Return at most `most` + 2 bins, the threshold between two of them; there must be a value.

        A few values far from the rest are counted in the outermost bins.
        """
        values, counts = self._ordered()
        if self.lowest == self.highest:
            split = None if self.threshold is None else int(self.threshold > self.lowest)
            return Bins([self.lowest, self.lowest], [int(counts.sum())], (False, False), split)
        edges, split = self._edges(most)
        count = len(edges) - 1
        place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, count - 1)
        # The rounding may have moved a value across the threshold.
        below, above = np.minimum(place, (split or count) - 1), np.maximum(place, min(split or 0, count - 1))
        rows = np.zeros(count, dtype=np.int64)
        np.add.at(rows, below, counts[0])
        np.add.at(rows, above, counts[1])
        beyond = self.lowest < edges[0], self.highest >= edges[-1]
        return Bins(edges.tolist(), rows.tolist(), (bool(beyond[0]), bool(beyond[1])), split)

    def _edges(self, most: int) -> tuple[Floats, int | None]:
        """Return the edges of `Bins`, and its `split`."""
        left, right = self._range()
        # Narrower than two steps of what is counted, some bins would stay empty for that alone.
        width = _width(max((right - left) / most, 4 * PRECISION * max(abs(left), abs(right))))
        origin = 0.0 if self.threshold is None or not self._is_inside else self.threshold
        first, last = math.floor((left - origin) / width), math.floor((right - origin) / width) + 1
        split = None
        if self._is_inside:
            first = min(first, -1)  # values below the threshold need a bin, however few they are
            split = -first
        elif self.threshold is not None:
            split = 0 if self.threshold <= self.lowest else last - first
        return origin + width * np.arange(first, last + 1, dtype=np.float64), split

    @property
    def _is_inside(self) -> bool:
        """Whether there are values on both sides of the threshold."""
        return self.threshold is not None and self.lowest < self.threshold <= self.highest

    def _range(self) -> tuple[float, float]:
        """Return what bins are for: all values, but for a few far from the rest; the threshold is within if it can."""
        low, high = (self.quantile(share) for share in BODY)
        reach = REACH * (high - low) if high > low else math.inf
        left, right = max(self.lowest, low - reach), min(self.highest, high + reach)
        if self.threshold is not None and self._is_inside:
            left, right = min(left, self.threshold), max(right, self.threshold)
        return left, right

    def _count(self) -> None:
        if not self._waiting:
            return
        values = np.frombuffer(self._waiting)
        self._ends = min(self._ends[0], float(values.min())), max(self._ends[1], float(values.max()))
        bits = np.clip(values, -LARGEST, LARGEST).astype(np.float32).view(np.uint32)
        nearest = (bits + np.uint32(1 << (DROPPED - 1))) >> np.uint32(DROPPED)
        above = 0 if self.threshold is None else (values >= self.threshold) * self._counts.shape[1]
        keys, counts = np.unique(nearest.astype(np.int64) + above, return_counts=True)
        self._counts.reshape(-1)[keys] += counts
        self._waiting = array("d")

    def _ordered(self) -> tuple[Floats, Indices]:
        """Return the values that occur, float64 [N], ascending, and their counts below and above, int64 [2, N]."""
        self._count()
        keys = np.flatnonzero(self._counts.any(axis=0))
        values = (keys.astype(np.uint32) << np.uint32(DROPPED)).view(np.float32).astype(np.float64)
        order = np.argsort(values, kind="stable")
        return values[order], self._counts[:, keys[order]]


def _width(least: float) -> float:
    """Return the next larger of the widths that read well."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in STEPS if step * power >= least * (1 - 1e-9))
