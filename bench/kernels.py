"""The fused reduction against what one would write otherwise: time, error and bandwidth, in one run.

    python bench/kernels.py [--threads N] [--rounds N] [--json FILE]

Each round times every implementation once, in an order shuffled anew, each after an untimed call of its own, so that
all meet the same machine and equally warm caches; medians and ratios of medians are reported. Errors are the largest
over all rows, against float64 arithmetic on the same values: relative for the norm, absolute for the channel cosine.
GB/s counts the predictions' bytes once; the machine's own figure is the best rate at which torch sums a float32 buffer
of as many bytes, with as many threads.

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
import time
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from memedge.engine import reduction

SHAPES = ((2, 4, 64, 64), (512, 4, 64, 64))
DTYPES = ("float32", "float16")

Result = tuple[Any, Any]  # norm [R], channel cosine [R]


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
    channel_error: float
    gb_per_s: float
    machine_gb_per_s: float


def numpy_plain(cond: np.ndarray, uncond: np.ndarray) -> Result:
    """As a user of NumPy would write METHODS.md §1."""
    u = uncond.astype(np.float32, copy=False)
    delta = cond.astype(np.float32, copy=False) - u
    norms = np.maximum(np.linalg.norm(u, axis=1), 1e-8) * np.maximum(np.linalg.norm(delta, axis=1), 1e-8)
    channel = ((u * delta).sum(axis=1) / norms).mean(axis=(1, 2))
    return np.linalg.norm(delta.reshape(len(delta), -1), axis=1), channel


def torch_eager(cond: torch.Tensor, uncond: torch.Tensor) -> Result:
    """As a user of torch would."""
    u = uncond.float()
    delta = cond.float() - u
    channel = torch.nn.functional.cosine_similarity(u, delta, dim=1).mean(dim=(1, 2))
    return delta.flatten(1).norm(dim=1), channel


def torch_sums(cond: torch.Tensor, uncond: torch.Tensor) -> Result:
    """As someone would who found `cosine_similarity` slow here."""
    u = uncond.float()
    delta = cond.float() - u
    squared = delta.square()
    norms = u.square().sum(1).sqrt().clamp_min(1e-8) * squared.sum(1).sqrt().clamp_min(1e-8)
    return squared.sum((1, 2, 3)).sqrt(), ((u * delta).sum(1) / norms).mean(dim=(1, 2))


def fallback(cond: np.ndarray, uncond: np.ndarray) -> Result:
    """The package's own path without the native core."""
    core, reduction._core = reduction._core, None
    try:
        rows = reduction.reduce_rows(cond, uncond)
    finally:
        reduction._core = core
    return rows.norm, rows.channel


def fused(cond: np.ndarray, uncond: np.ndarray, threads: int) -> Result:
    rows = reduction.reduce_rows(cond, uncond, threads=threads)
    return rows.norm, rows.channel


def kernel(cond: np.ndarray, uncond: np.ndarray, threads: int, isa: str) -> Callable[[], Result]:
    """The native call alone, on a chosen instruction set."""
    core = reduction._core
    rows, channels, height, width = cond.shape
    out = np.empty((3, rows))
    pointers = core.address(cond), core.address(uncond), core.address(out)

    def call() -> Result:
        core.guidance_stats(
            *pointers, cond.dtype.name, rows, rows, channels, height * width, "uncond_delta", threads, isa
        )
        return out[0], out[1]

    return call


def truth(cond: np.ndarray, uncond: np.ndarray) -> Result:
    c, u = cond.astype(np.float64), uncond.astype(np.float64)
    delta = c - u
    norms = np.maximum(np.linalg.norm(u, axis=1), 1e-8) * np.maximum(np.linalg.norm(delta, axis=1), 1e-8)
    return np.sqrt((delta**2).sum(axis=(1, 2, 3))), ((u * delta).sum(axis=1) / norms).mean(axis=(1, 2))


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each implementation, once per round; short ones are repeated within a round."""
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(2e-3 / (time.perf_counter() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name, call in shuffled.sample(list(calls.items()), len(calls)):
            call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds


def case(shape: tuple[int, ...], dtype: str, threads: int, rounds: int) -> list[Row]:
    rng = np.random.default_rng(0)
    uncond = rng.standard_normal(shape, np.float32)
    cond = (uncond + 0.1 * rng.standard_normal(shape, np.float32)).astype(dtype)
    uncond = uncond.astype(dtype)
    tensors = torch.from_numpy(cond), torch.from_numpy(uncond)
    buffer = torch.ones((cond.nbytes + uncond.nbytes) // 4)

    status = reduction.core_status()
    ours = f"reduce_rows ({status.isa or 'NumPy'})"
    calls: dict[str, Callable[[], Any]] = {ours: lambda: fused(cond, uncond, threads)}
    for isa in status.isas:
        calls[f"kernel {isa}"] = kernel(cond, uncond, threads, isa)
    calls["reduce_rows (no core)"] = lambda: fallback(cond, uncond)
    calls["NumPy"] = lambda: numpy_plain(cond, uncond)
    calls["torch cosine_similarity"] = lambda: torch_eager(*tensors)
    calls["torch in sums"] = lambda: torch_sums(*tensors)

    expected = truth(cond, uncond)
    errors = {}
    for name, call in calls.items():
        norm, channel = (np.asarray(x, np.float64) for x in call())
        errors[name] = np.abs(norm / expected[0] - 1).max(), np.abs(channel - expected[1]).max()

    size = cond.nbytes + uncond.nbytes
    machine = size / min(timeit.repeat(buffer.sum, number=1, repeat=30)) / 1e9
    seconds = measure(calls, rounds)
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
    parser.add_argument("--rounds", type=int, default=30, help="timings per implementation and case")
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
        "core": asdict(status),
    }
    console = Console()
    console.print(f"{machine['processor']}, {arguments.threads} threads, load {machine['load_average']:.1f}")
    console.print(f"{status.path} path: {status.reason}")
    rows = []
    for shape in SHAPES:
        for dtype in DTYPES:
            found = case(shape, dtype, arguments.threads, arguments.rounds)
            table = Table(title=f"{list(shape)} {dtype}; plain reading: {found[0].machine_gb_per_s:.1f} GB/s")
            table.add_column("implementation")
            for column in ("median µs", "best µs", "ratio", "norm error", "channel error", "GB/s"):
                table.add_column(column, justify="right")
            for row in found:
                table.add_row(
                    row.implementation,
                    f"{row.median_us:.1f}",
                    f"{row.best_us:.1f}",
                    f"{row.ratio:.2f}",
                    f"{row.norm_error:.1e}",
                    f"{row.channel_error:.1e}",
                    f"{row.gb_per_s:.1f}",
                )
            console.print(table)
            rows += found
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
