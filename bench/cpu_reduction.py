"""The fused reduction against what one would write otherwise: time, error and bandwidth, in one run.

    python bench/cpu_reduction.py [--threads N] [--rounds N] [--json FILE]

Each round times every implementation once, in an order shuffled anew, each after an untimed call of its own, so that
all meet the same machine and equally warm caches; medians and ratios of medians are reported. Errors are the largest
over all rows, against float64 arithmetic on the same values: relative for the norm, absolute for the cosine. That is
the cosine over channels, but in NumKong's rows (batched, one thread whatever --threads says): its `angular` can only
give the flat one, for which it is compared with the flat truth.

GB/s counts the predictions' bytes once, over the median. "of reading" is its share of the rate at which this machine
reads: the same arrays' bytes, by NumPy's `max` (one stream) or NumKong's `hamming` (two), with one thread or all,
whichever has the best median in the same rounds. The same rounds, since caches that nothing else uses in between would
be read instead, twice as fast. Starting threads counts in the reduction's time and not in the machine's.

Run it on an idle machine: where other processes hold the cores, OpenMP's threads wait for each other and figures of
torch with several threads grow many times over (the load average is printed). torch's `cosine_similarity` is slow over
a dimension that is not the last, so torch also appears written out in sums. Valid for the machine it ran on only.
"""

import argparse
import json
import os
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numkong
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch_reduction import torch_eager, torch_sums

from memedge.engine import reduction

SHAPES = ((2, 4, 64, 64), (512, 4, 64, 64))
DTYPES = ("float32", "float16")

Result = tuple[Any, Any]  # norm [R], cosine [R]; None where it isn't computed


@dataclass
class Row:
    """One implementation on one case; times in microseconds."""

    shape: tuple[int, ...]
    dtype: str
    implementation: str
    median_us: float
    best_us: float
    ratio: float
    norm_error: float
    cosine_error: float | None
    gb_per_s: float
    read_gb_per_s: float
    read_share: float


def numpy_plain(cond: np.ndarray, uncond: np.ndarray) -> Result:
    """As a user of NumPy would write docs/methods.md §1."""
    u = uncond.astype(np.float32, copy=False)
    delta = cond.astype(np.float32, copy=False) - u
    norms = np.maximum(np.linalg.norm(u, axis=1), 1e-8) * np.maximum(np.linalg.norm(delta, axis=1), 1e-8)
    channel = ((u * delta).sum(axis=1) / norms).mean(axis=(1, 2))
    return np.linalg.norm(delta.reshape(len(delta), -1), axis=1), channel


def numkong_norm(cond: np.ndarray, uncond: np.ndarray) -> Result:
    """Reads the inputs once, like the reduction, but for the norm alone."""
    rows = len(cond)
    return np.sqrt(numkong.sqeuclidean(cond.reshape(rows, -1), uncond.reshape(rows, -1))), None


def numkong_both(cond: np.ndarray, uncond: np.ndarray) -> Callable[[], Result]:
    """Norm and flat cosine. Δ, which `angular` needs in memory, is written to the same buffer by every call."""
    rows = len(cond)
    delta = np.empty(cond.size, cond.dtype)

    def call() -> Result:
        numkong.blend(cond.reshape(-1), uncond.reshape(-1), alpha=1, beta=-1, out=delta)
        distance = numkong.angular(uncond.reshape(rows, -1), delta.reshape(rows, -1))
        return numkong_norm(cond, uncond)[0], 1 - np.asarray(distance)

    return call


def fallback(cond: np.ndarray, uncond: np.ndarray) -> Result:
    """The package's own path without the native core."""
    core, reduction.core = reduction.core, None
    try:
        rows = reduction.reduce_rows(cond, uncond)
    finally:
        reduction.core = core
    return rows.norm, rows.channel


def fused(cond: np.ndarray, uncond: np.ndarray, threads: int) -> Result:
    rows = reduction.reduce_rows(cond, uncond, threads=threads)
    return rows.norm, rows.channel


def kernel(cond: np.ndarray, uncond: np.ndarray, threads: int, isa: str) -> Callable[[], Result]:
    """The native call alone, on a chosen instruction set."""
    core = reduction.core
    rows, channels, height, width = cond.shape
    out = np.empty((3, rows))
    pointers = core.address(cond), core.address(uncond), core.address(out)

    def call() -> Result:
        core.guidance_stats(
            *pointers, cond.dtype.name, rows, rows, channels, height * width, "uncond_delta", threads, isa
        )
        return out[0], out[1]

    return call


def truth(cond: np.ndarray, uncond: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Norm, channel cosine and flat cosine."""
    c, u = cond.astype(np.float64), uncond.astype(np.float64)
    delta = c - u
    norms = np.maximum(np.linalg.norm(u, axis=1), 1e-8) * np.maximum(np.linalg.norm(delta, axis=1), 1e-8)
    channel = ((u * delta).sum(axis=1) / norms).mean(axis=(1, 2))
    norm, size = (np.sqrt((x**2).sum(axis=(1, 2, 3))) for x in (delta, u))
    return norm, channel, (u * delta).sum(axis=(1, 2, 3)) / (norm * size)


def read_largest(cond: np.ndarray, uncond: np.ndarray) -> None:
    cond.max(), uncond.max()


def read_differing(cond: np.ndarray, uncond: np.ndarray) -> None:
    numkong.hamming(cond, uncond, "uint1")


def reader(read: Callable[..., None], cond: np.ndarray, uncond: np.ndarray, threads: int) -> Callable[[], float]:
    """Like `stopwatch`, of so many threads that read the bytes between them, from when all have started."""
    rows = len(cond)
    cond, uncond = (x.reshape(rows, -1).view(np.uint8) for x in (cond, uncond))
    repeats = max(1, (1 << 25) // (cond.nbytes + uncond.nbytes))
    barrier = threading.Barrier(threads)

    def work(*part: np.ndarray) -> tuple[float, float]:
        read(*part)
        barrier.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            read(*part)
        return start, time.perf_counter()

    def timed() -> float:
        with ThreadPoolExecutor(threads) as pool:
            parts = np.array_split(cond, threads), np.array_split(uncond, threads)
            starts, ends = zip(*pool.map(work, *parts), strict=True)
        return (max(ends) - min(starts)) / repeats

    return timed


def stopwatch(call: Callable[[], Any]) -> Callable[[], float]:
    """A call that returns the seconds one takes, after an untimed one; short ones are repeated."""
    call()
    start = time.perf_counter()
    call()
    repeats = max(1, round(2e-3 / (time.perf_counter() - start)))

    def timed() -> float:
        call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    return timed


def measure(timed: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, once per round, in an order of its own."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(list(timed), len(timed)):
            seconds[name].append(timed[name]())
    return seconds


def case(shape: tuple[int, ...], dtype: str, threads: int, rounds: int) -> list[Row]:
    rng = np.random.default_rng(0)
    uncond = rng.standard_normal(shape, np.float32)
    cond = (uncond + 0.1 * rng.standard_normal(shape, np.float32)).astype(dtype)
    uncond = uncond.astype(dtype)
    tensors = torch.from_numpy(cond), torch.from_numpy(uncond)
    compiled = torch.compile(torch_eager, fullgraph=True, dynamic=False)

    status = reduction.core_status()
    ours = f"reduce_rows ({status.isa or 'NumPy'})"
    calls: dict[str, Callable[[], Any]] = {ours: lambda: fused(cond, uncond, threads)}
    for isa in status.isas:
        calls[f"kernel {isa}"] = kernel(cond, uncond, threads, isa)
    calls["reduce_rows (no core)"] = lambda: fallback(cond, uncond)
    calls["NumPy"] = lambda: numpy_plain(cond, uncond)
    calls["torch cosine_similarity"] = lambda: torch_eager(*tensors)
    calls["torch.compile of it"] = lambda: compiled(*tensors)
    calls["torch in sums"] = lambda: torch_sums(*tensors)
    calls["NumKong, norm only"] = lambda: numkong_norm(cond, uncond)
    calls["NumKong, norm and flat"] = numkong_both(cond, uncond)

    true_norm, true_channel, true_flat = truth(cond, uncond)
    errors: dict[str, tuple[float, float | None]] = {}
    for name, call in calls.items():  # the first call of what is compiled: not timed
        norm, cosine = call()
        true_cosine = true_flat if name.startswith("NumKong") else true_channel
        errors[name] = (
            float(np.abs(np.asarray(norm, np.float64) / true_norm - 1).max()),
            None if cosine is None else float(np.abs(np.asarray(cosine, np.float64) - true_cosine).max()),
        )

    size = cond.nbytes + uncond.nbytes
    readers = {
        f"{read.__name__} {count}": reader(read, cond, uncond, count)
        for read in (read_largest, read_differing)
        for count in {1, min(threads, len(cond))}
    }
    seconds = measure({name: stopwatch(call) for name, call in calls.items()} | readers, rounds)
    machine = size / min(statistics.median(seconds.pop(name)) for name in readers) / 1e9
    base = statistics.median(seconds[ours])
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        rows.append(
            Row(
                shape,
                dtype,
                name,
                median * 1e6,
                min(times) * 1e6,
                median / base,
                *errors[name],
                size / median / 1e9,
                machine,
                size / median / 1e9 / machine,
            )
        )
    return rows


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="for every implementation")
    parser.add_argument("--rounds", type=int, default=12, help="timings per implementation and case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    status = reduction.core_status()
    machine = {
        "processor": processor(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "load_average": os.getloadavg()[0],
        "numpy": np.__version__,
        "torch": torch.__version__,
        "numkong": numkong.__version__,
        "core": asdict(status),
    }
    console = Console()
    console.print(f"{machine['processor']}, {arguments.threads} threads, load {machine['load_average']:.1f}")
    console.print(f"{status.path} path: {status.reason}")
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            found = case(shape, dtype, arguments.threads, arguments.rounds)
            table = Table(title=f"{list(shape)} {dtype}; reading: {found[0].read_gb_per_s:.1f} GB/s")
            table.add_column("implementation")
            for column in ("median µs", "best µs", "ratio", "norm error", "cosine error", "GB/s", "of reading"):
                table.add_column(column, justify="right")
            for row in found:
                table.add_row(
                    row.implementation,
                    f"{row.median_us:.1f}",
                    f"{row.best_us:.1f}",
                    f"{row.ratio:.2f}",
                    f"{row.norm_error:.1e}",
                    "–" if row.cosine_error is None else f"{row.cosine_error:.1e}",
                    f"{row.gb_per_s:.1f}",
                    f"{row.read_share:.0%}",
                )
            console.print(table)
            rows += found
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
