"""What `memedge serve` costs and bears: open-loop load over loopback, from this process, on a server of its own.

    python bench/serve.py [--provider cpu] [--threads 1] [--seconds 10] [--requests 100000] [--json FILE]

- overhead: p50 of one client's requests, one prompt each, beside `Detector.detect` in this process.
- coalescing: prompts per second of 16 clients with one prompt at a time, beside one client with batches of 16.
- load: requests arrive at random (Poisson) at 0.5, 1, 2 and 4 times the capacity, whatever the server answers: the
  latencies of verdicts, goodput (verdicts per second), refusals, and verdicts that came after their deadline.
- memory: the server's resident size before and after --requests requests.

Both sides of a ratio are measured in turn, in rounds; medians. Prompts are all different, as a cache would be idle.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from memedge import Detector
from memedge.embedded import captions

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from servers import serving

CLIENTS, ROUNDS, DEADLINE = 16, 5, 2.0
TIMES = (0.5, 1.0, 2.0, 4.0)
NUMBERS = itertools.count()


@dataclass(frozen=True)
class Load:
    """What happened at one rate of arrivals; seconds, and per second."""

    times: float
    offered: float
    goodput: float
    refused: float
    late: int
    p50: float
    p95: float
    p99: float


def prompt() -> str:
    """Return a prompt that nobody has asked for yet."""
    words = captions()
    number = next(NUMBERS)
    return f"{words[number % len(words)].prompt} {number}"


async def ask(client: aiohttp.ClientSession, count: int = 1) -> tuple[int, float]:
    """Ask for verdicts; return the status and the seconds it took."""
    start = time.perf_counter()
    async with client.post("/v1/verdicts", json={"prompts": [prompt() for _ in range(count)]}) as answer:
        await answer.read()
    return answer.status, time.perf_counter() - start


async def closed_loop(client: aiohttp.ClientSession, clients: int, batch: int, seconds: float) -> float:
    """Return prompts per second of clients that each wait for an answer before they ask again."""
    end, done = time.perf_counter() + seconds, 0

    async def one() -> None:
        nonlocal done
        while time.perf_counter() < end:
            status, _ = await ask(client, batch)
            done += batch * (status == 200)

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return done / (time.perf_counter() - start)


async def open_loop(client: aiohttp.ClientSession, times: float, capacity: float, seconds: float) -> Load:
    """Send requests at random times, and return what became of them."""
    rate, randomly, tasks = times * capacity, random.Random(0), []
    start = time.perf_counter()
    at = 0.0
    while (at := at + randomly.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(client)))
    answers = await asyncio.gather(*tasks)
    took = time.perf_counter() - start
    good = sorted(latency for status, latency in answers if status == 200)
    cuts = statistics.quantiles(good, n=100) if len(good) > 1 else [float("nan")] * 99
    return Load(
        times=times,
        offered=len(answers) / took,
        goodput=len(good) / took,
        refused=sum(status in (429, 503) for status, _ in answers) / took,
        late=sum(latency > DEADLINE for latency in good),
        p50=cuts[49],
        p95=cuts[94],
        p99=cuts[98],
    )


def resident(pid: int) -> int:
    """Return a process's resident bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def measure(url: str, pid: int, detector: Detector, seconds: float, requests: int) -> dict[str, Any]:
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as client:
        here, there = [], []
        for _ in range(ROUNDS * 20):
            start = time.perf_counter()
            detector.detect([prompt()])
            here.append(time.perf_counter() - start)
            there.append((await ask(client))[1])
        single, batched = [], []
        for _ in range(ROUNDS):
            single.append(await closed_loop(client, CLIENTS, 1, seconds / ROUNDS))
            batched.append(await closed_loop(client, 1, CLIENTS, seconds / ROUNDS))
        capacity = statistics.median(single)
        loads = [await open_loop(client, times, capacity, seconds) for times in TIMES]
        before = resident(pid)
        started = next(NUMBERS)
        while next(NUMBERS) - started < requests:
            await closed_loop(client, CLIENTS, 1, min(seconds, 5.0))
        return {
            "threads": detector.info.threads,
            "key": detector.info.key,
            "detect_p50_s": statistics.median(here),
            "client_p50_s": statistics.median(there),
            "prompts_per_second_16_clients": capacity,
            "prompts_per_second_batches_of_16": statistics.median(batched),
            "coalescing": statistics.median(one / many for one, many in zip(single, batched, strict=True)),
            "loads": [asdict(load) for load in loads],
            "resident_before": before,
            "resident_after": resident(pid),
        }


def show(found: dict[str, Any]) -> None:
    """Print what was measured."""
    overhead = 1e3 * (found["client_p50_s"] - found["detect_p50_s"])
    print(
        f"{found['key']}, {found['threads']} threads: one client p50 {1e3 * found['client_p50_s']:.1f} ms, detect "
        f"{1e3 * found['detect_p50_s']:.1f} ms: {overhead:+.1f} ms over it"
    )
    print(
        f"16 clients {found['prompts_per_second_16_clients']:.0f} prompts/s, batches of 16 "
        f"{found['prompts_per_second_batches_of_16']:.0f}: {found['coalescing']:.2f} of them (median of rounds)"
    )
    table = Table("load", "offered/s", "verdicts/s", "refused/s", "late", "p50 ms", "p95 ms", "p99 ms", box=None)
    for load in found["loads"]:
        times = [f"{1e3 * load[name]:.0f}" for name in ("p50", "p95", "p99")]
        rates = [f"{load[name]:.0f}" for name in ("offered", "goodput", "refused")]
        table.add_row(f"{load['times']:g} ×", *rates, str(load["late"]), *times)
    Console().print(table)
    print(f"resident {found['resident_before'] / 1e6:.0f} MB, at the end {found['resident_after'] / 1e6:.0f} MB")


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    options = ("--provider", arguments.provider, "--timeout", DEADLINE, "--queue", 10_000)
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), *options, threads=arguments.threads) as server:
        detector = Detector.load(provider=arguments.provider, threads=arguments.threads)
        detector.warmup()
        work = measure(server.url, server.process.pid, detector, arguments.seconds, arguments.requests)
        found = asyncio.run(work)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
