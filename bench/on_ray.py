"""Ray's actors against one process: the same prompts, scored by each, and how much faster the actors were.

    python bench/on_ray.py [--actors N] [--prompts N] [--batch N] [--json FILE]

Both have the embedded engine and one thread per process. Starting Ray and opening the engine is not in the seconds: a
first batch for each actor comes before. Needs the extra `ray`.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import numpy as np

from memedge import Detector
from memedge.integrations.ray_cluster import on_ray
from memedge.results import Scores
from memedge.scoring.mapper import Mapper, here


def batches(prompts: int, size: int, what: str = "picture") -> Iterator[list[str]]:
    for start in range(0, prompts, size):
        yield [f"{what} {row} of a red bicycle" for row in range(start, min(prompts, start + size))]


def timed(mapper: Mapper, prompts: int, size: int) -> tuple[float, dict[str, Scores]]:
    """Return the seconds that a mapper took, and the scores by the first prompt of their batch."""
    start = time.perf_counter()
    found = {batch[0]: scores for batch, scores in mapper(batches(prompts, size))}
    return time.perf_counter() - start, found


def measure(actors: int, prompts: int, size: int) -> dict[str, float]:
    """Return what both took; raises RuntimeError if they differ."""
    import ray

    detector = Detector.load(threads=1)
    mapper = here(detector.score)
    list(mapper(batches(size, size, "warm up")))
    alone, expected = timed(mapper, prompts, size)
    # Elsewhere, because Ray's processes import from the folder that this one runs in first: not the installed memedge,
    # but that of a checkout, which lacks the native core.
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        ray.init(address="local", num_cpus=actors, include_dashboard=False, log_to_driver=False)
        try:
            start = time.perf_counter()
            with on_ray(detector) as mapper:
                list(mapper(batches(8 * actors * size, size, "warm up")))
                started = time.perf_counter() - start
                together, found = timed(mapper, prompts, size)
        finally:
            ray.shutdown()
    for first, scores in expected.items():
        np.testing.assert_array_equal(found[first].score, scores.score)
    return {
        "actors": actors,
        "prompts": prompts,
        "batch": size,
        "one process, seconds": alone,
        "actors, seconds": together,
        "ratio": alone / together,
        "actors warm after, seconds": started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.actors, arguments.prompts, arguments.batch)
    for name, value in found.items():
        print(f"{name:>28} {value:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
