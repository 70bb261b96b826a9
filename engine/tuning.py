"""How many rows to give the UNet at once: measured here, within the memory there is."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from memedge.engine.engine import Engine
from memedge.engine.errors import EngineError
from memedge.engine.machine import available_memory, peak_memory
from memedge.engine.memory import Tensor
from memedge.engine.reduction import OPERANDS

MOST = 64
CALLS = 3  # per size; the fastest counts
GAIN = 0.03  # a larger batch must be at least this much faster per row
MEMORY_SHARE = 0.5  # of what is available may be taken by a larger batch


def best_rows_per_call(engine: Engine, clock: Callable[[], float] = time.perf_counter) -> int:
    """Return the smallest number of rows per UNet call, a power of two, whose time per row is nearly the best.

    Sizes double until time per row no longer falls by GAIN, or until the next size would take more than MEMORY_SHARE of
    the memory that is left, judged by what this one took, or does not fit.

    Raises:
        EngineError: not even one row can be computed.
    """
    if engine.backend.most_rows == 1:
        return 1
    states = engine.encode(engine.tokenize(["how many at once"])[0]).tensor
    best, fastest = 1, float("inf")
    rows = 1
    most = engine.backend.most_rows or MOST
    while rows <= most:
        before, available = peak_memory(), available_memory()
        try:
            seconds = _seconds_per_row(engine, states, rows, clock)
        except EngineError:
            if rows == 1:
                raise
            break  # a GPU has no room for it; how much it has is known to it alone
        if seconds > fastest * (1 - GAIN):
            break
        best, fastest = rows, seconds
        grown = peak_memory() - before
        rows *= 2
        if available is not None and 2 * grown > MEMORY_SHARE * available:
            break
    return best


def _seconds_per_row(engine: Engine, states: Tensor, rows: int, clock: Callable[[], float]) -> float:
    prompt, row = np.zeros(rows, dtype=np.int64), np.arange(rows) % engine.passes
    call = partial(engine.backend.statistics, states, prompt, row, engine.uncond, OPERANDS[0])
    call()  # the first call of a shape allocates
    times = []
    for _ in range(CALLS):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times) / rows
