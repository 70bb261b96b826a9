"""The CUDA reduction against what one would write in torch: time, error and bandwidth on one NVIDIA GPU, in one run.

    python bench/cuda_reduction.py [--rounds N] [--compile] [--json FILE]

Errors are the largest over all rows, against float64 arithmetic on the same values: relative for the norm, absolute for
the cosine over channels. GB/s counts the predictions' bytes once, over the median time of a call on the GPU, from
events around many of them; a copy from device memory to device memory, of as many bytes, counts what it reads and what
it writes. Calls take turns through several sets of inputs, more than the cache holds where there is room for them.
`reduce_rows` is timed on the host, from the call to the results there.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch_reduction import torch_eager, torch_sums

from memedge.engine import reduction

ROWS = (2, 32, 512, 4096)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUND_S = 5e-3  # of one round's calls, at least
CACHE = 200 << 20  # bytes in all sets together, where they are large enough: four times an H100's L2
MOST_SETS = 64

Pair = tuple[torch.Tensor, torch.Tensor]
Call = Callable[[torch.Tensor, torch.Tensor], Any]


@dataclass
class Row:
    """One implementation on one case; times in microseconds."""

    rows: int
    dtype: str
    implementation: str
    median_us: float
    best_us: float
    norm_error: float | None
    cosine_error: float | None
    gb_per_s: float
    copy_gb_per_s: float


def fused(cond: torch.Tensor, uncond: torch.Tensor) -> Pair:
    """The kernel alone, on torch's stream."""
    out = torch.empty((3, len(cond)), dtype=torch.float64, device=cond.device)
    rows, channels, height, width = cond.shape
    reduction.core.cuda_guidance_stats(
        cond.data_ptr(),
        uncond.data_ptr(),
        out.data_ptr(),
        str(cond.dtype).removeprefix("torch."),
        rows,
        rows,
        channels,
        height * width,
        "uncond_delta",
        torch.cuda.current_stream().cuda_stream,
        row_ptr=0,
    )
    return out[0], out[1]


def whole(cond: torch.Tensor, uncond: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """As a user of memedge would, through DLPack; the results are on the host."""
    rows = reduction.reduce_rows(cond, uncond)
    return rows.norm, rows.channel


def truth(cond: torch.Tensor, uncond: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    c, u = cond.double(), uncond.double()
    delta = c - u
    norms = u.norm(dim=1).clamp_min(1e-8) * delta.norm(dim=1).clamp_min(1e-8)
    channel = ((u * delta).sum(1) / norms).mean(dim=(1, 2))
    return delta.flatten(1).norm(dim=1).cpu().numpy(), channel.cpu().numpy()


def on_gpu(call: Call, sets: list[Pair], rounds: int) -> list[float]:
    """Return the seconds of a call in each round, by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(count: int) -> float:
        start.record()
        for i in range(count):
            call(*sets[i % len(sets)])
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    once(len(sets))
    repeats = max(len(sets), int(ROUND_S / once(3)))
    return [once(repeats) for _ in range(rounds)]


def on_host(call: Call, sets: list[Pair], rounds: int) -> list[float]:
    """Return the seconds of a call in each round, as whoever calls it sees them."""

    def once(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(count):
            call(*sets[i % len(sets)])
        return (time.perf_counter() - start) / count

    once(len(sets))
    repeats = max(len(sets), int(ROUND_S / once(3)))
    return [once(repeats) for _ in range(rounds)]


def case(rows: int, dtype: torch.dtype, rounds: int, compile_too: bool) -> list[Row]:
    """Measure every implementation on [rows, 4, 64, 64]."""
    size = 2 * rows * 4 * 64 * 64 * dtype.itemsize
    sets = []
    for _ in range(min(MOST_SETS, 1 + CACHE // size)):
        uncond = torch.randn(rows, 4, 64, 64, device="cuda")
        sets.append(((uncond + 0.1 * torch.randn_like(uncond)).to(dtype), uncond.to(dtype)))
    target = torch.empty(size, dtype=torch.uint8, device="cuda")
    source = [torch.cat([x.flatten().view(torch.uint8) for x in pair]) for pair in sets]
    copying = on_gpu(torch.Tensor.copy_, [(target, one) for one in source], rounds)
    copied = 2 * size / median(copying) / 1e9
    del source, target

    calls: dict[str, Call] = {"kernel": fused, "torch": torch_eager, "torch in sums": torch_sums}
    if compile_too:
        torch.compiler.reset()  # else the ninth case is one too many
        calls["torch.compile"] = torch.compile(torch_eager, fullgraph=True, dynamic=False)
    calls["reduce_rows, on the host"] = whole
    expected = truth(*sets[0])
    found = []
    for name, call in calls.items():
        norm, cosine = (np.asarray(x.cpu() if isinstance(x, torch.Tensor) else x) for x in call(*sets[0]))
        seconds = (on_host if call is whole else on_gpu)(call, sets, rounds)
        middle = median(seconds)
        errors = float(np.abs(norm / expected[0] - 1).max()), float(np.abs(cosine - expected[1]).max())
        name_of = str(dtype).removeprefix("torch.")
        found.append(Row(rows, name_of, name, middle * 1e6, min(seconds) * 1e6, *errors, size / middle / 1e9, copied))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="timings per implementation and case")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes a while")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    table = Table(title=f"{torch.cuda.get_device_name()}: [rows, 4, 64, 64]", box=None)
    for column in ("rows", "dtype", "implementation"):
        table.add_column(column)
    for column in ("median µs", "best µs", "norm error", "cosine error", "GB/s", "copy GB/s"):
        table.add_column(column, justify="right")
    for rows in ROWS:
        for dtype in DTYPES:
            for row in case(rows, dtype, arguments.rounds, arguments.compile):
                found.append(row)
                print(f"{row.rows} {row.dtype} {row.implementation}: {row.median_us:.1f} µs", flush=True)
                table.add_row(
                    str(row.rows),
                    row.dtype,
                    row.implementation,
                    f"{row.median_us:.1f}",
                    f"{row.best_us:.1f}",
                    f"{row.norm_error:.1e}",
                    f"{row.cosine_error:.1e}",
                    f"{row.gb_per_s:.0f}",
                    f"{row.copy_gb_per_s:.0f}",
                )
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
