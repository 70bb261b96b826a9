"""What Triton's batching gives: a real tritonserver on the embedded engine, beside its clients, over loopback.

    MEMEDGE_TEST_TRITON=ENVIRONMENT python bench/serve_triton.py [--provider cpu] [--seconds 10] [--requests 4000]

- coalescing: prompts per second of 16 clients with one prompt at a time, beside one client with batches of 16, over
  gRPC; in turn, in rounds; the median of the ratios. And how many prompts the model got at a time.
- memory: the model's process before and after --requests requests of 1 to 4 prompts, from 16 clients.

Prompts are all different. Without ENVIRONMENT one is made from PyPI (tests/support/triton_process.py).
"""

import argparse
import itertools
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tritonclient.grpc as client

from memedge.embedded import EMBEDDED_ENGINE, captions
from memedge.integrations.triton_repository import write_repository

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from triton_process import Triton, environment, tritonserver

CLIENTS, BATCH, ROUNDS = 16, 16, 5
NUMBERS = itertools.count()


def ask(caller: client.InferenceServerClient, size: int) -> None:
    """Ask for verdicts on so many prompts that nobody has asked for yet."""
    words = captions()
    numbers = itertools.islice(NUMBERS, size)
    texts = [[f"{words[number % len(words)].prompt} {number}".encode()] for number in numbers]
    tensor = client.InferInput("prompt", [size, 1], "BYTES")
    tensor.set_data_from_numpy(np.array(texts, dtype=object))
    caller.infer("memedge", [tensor])


def together(triton: Triton, clients: int, size: Callable[[], int], go_on: Callable[[], bool]) -> float:
    """Let clients ask, each one request at a time; return prompts per second."""
    asked = [0] * clients

    def work(place: int) -> None:
        with client.InferenceServerClient(triton.grpc) as caller:
            while go_on():
                count = size()
                ask(caller, count)
                asked[place] += count

    threads = [threading.Thread(target=work, args=(place,)) for place in range(clients)]
    start = time.perf_counter()
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return sum(asked) / (time.perf_counter() - start)


def for_seconds(seconds: float) -> Callable[[], bool]:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() < end


def coalescing(triton: Triton, seconds: float) -> tuple[float, float, float, float]:
    """Return prompts per second of one client's batches and of many clients, their ratio, and prompts per call."""
    rounds, calls, prompts = [], 0.0, 0.0
    for _ in range(ROUNDS):
        whole = together(triton, 1, lambda: BATCH, for_seconds(seconds))
        calls -= triton.count("nv_inference_exec_count")
        prompts -= triton.count("nv_inference_count")
        single = together(triton, CLIENTS, lambda: 1, for_seconds(seconds))
        calls += triton.count("nv_inference_exec_count")
        prompts += triton.count("nv_inference_count")
        rounds.append((whole, single, single / whole))
    whole, single, ratio = (statistics.median(column) for column in zip(*rounds, strict=True))
    return whole, single, ratio, prompts / calls


def memory(triton: Triton, requests: int) -> tuple[int, int]:
    """Return the bytes that the model's process holds before and after so many requests."""
    draw = random.Random(0)
    before = triton.resident()
    left = iter(range(requests))
    together(triton, CLIENTS, lambda: draw.randint(1, 4), lambda: next(left, None) is not None)
    return before, triton.resident()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--requests", type=int, default=4000, help="of the measurement of memory")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, environment(Path(name)) as place:
        repository, folder = Path(name) / "models", Path(name) / "server"
        write_repository(EMBEDDED_ENGINE, repository, wanted.provider)
        folder.mkdir()
        with tritonserver(place, repository, folder) as triton:
            together(triton, CLIENTS, lambda: 1, for_seconds(wanted.seconds / 2))
            whole, single, ratio, size = coalescing(triton, wanted.seconds)
            before, after = memory(triton, wanted.requests)
    print(f"{wanted.provider}, {len(os.sched_getaffinity(0))} cores for server and clients")
    print(f"one client, batches of {BATCH}: {whole:.1f} prompts/s")
    print(f"{CLIENTS} clients, a prompt each: {single:.1f} prompts/s, {size:.1f} prompts a call; ratio {ratio:.2f}")
    print(f"memory: {before / 1e6:.0f} MB, after {wanted.requests} requests {after / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
