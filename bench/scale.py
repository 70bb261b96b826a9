"""What scoring a file costs as its prompts grow 10 → 100 000, and as the batch grows: linear time, flat memory.

    python bench/scale.py [--threads N] [--full] [--json FILE]

Every row is scoring.job.score_file, CSV to CSV, on different prompts, in a fresh process, whose peak resident size is
reported; loading the engine is not in the seconds.
- engine: the embedded engine, whole. Up to 1000 prompts, which take seconds; with --full also 100 000, which take a
  quarter of an hour or more.
- files only: fixed scores in place of the engine's, up to 100 000 prompts. This is NOT the time of scoring, but that of
  all that could grow with the number of prompts: reading, finding duplicates, the journal, writing. In batches of 256:
  each is committed to the disk, and in score_file's own batches of 32 that would hide the rest (see 1000 prompts).
Each batch ends in a commit to the disk, some 10 ms: engine rows with a batch of 1 show the disk, not the engine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from memedge import Detector
from memedge.engine.machine import peak_memory
from memedge.results import Scores
from memedge.scoring.job import score_file

SIZES = (10, 100, 1000)
FILES_SIZES = (*SIZES, 10_000, 100_000)
FULL = 100_000
BATCH = 32  # score_file's own
FILES_BATCH = 256
BATCHES = (1, 16, 256)
BATCH_PROMPTS = 256


def fixed(prompts: list[str]) -> Scores:
    """Return the same score for every prompt."""
    zeros, no = np.zeros(len(prompts)), np.zeros(len(prompts), dtype=bool)
    return Scores(zeros, zeros, zeros, no, no, 1.0)


def scorer(side: str, threads: int) -> Callable[[list[str]], Scores]:
    if side == "files only":
        return fixed
    detector = Detector.load(threads=threads)
    detector.score(["warm up"] * BATCH)  # many prompts and one: OpenVINO compiles a graph for each
    detector.warmup()
    return detector.score


def run(side: str, prompts: int, batch: int, threads: int) -> dict[str, float]:
    """Score that many prompts in this process, and return what it took."""
    score = scorer(side, threads)
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "prompts.csv"), Path(folder, "scores.csv")
        with source.open("w") as file:
            file.write("prompt\n")
            file.writelines(f"picture of a red bicycle number {i}\n" for i in range(prompts))
        start = time.perf_counter()
        summary = score_file(score, source, output, engine_key=side, resume=False, batch_size=batch)
        seconds = time.perf_counter() - start
    if summary.scored_now != prompts:
        raise RuntimeError(f"{summary.scored_now} of {prompts} prompts were scored")
    return {"seconds": seconds, "ms_per_prompt": 1e3 * seconds / prompts, "peak_MB": peak_memory() / 1e6}


def measure(side: str, prompts: int, batch: int, threads: int) -> dict[str, str | float]:
    """Do `run` in a fresh process."""
    code = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import scale;"
        f"print(json.dumps(scale.run({side!r}, {prompts}, {batch}, {threads})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"side": side, "prompts": prompts, "batch": batch, **json.loads(done.stdout)}


def cases(full: bool) -> list[tuple[str, int, int]]:
    """Return (side, prompts, batch) of every row."""
    return [
        *(("engine", size, BATCH) for size in (*SIZES, *([FULL] if full else []))),
        *(("engine", BATCH_PROMPTS, batch) for batch in BATCHES),
        *(("files only", size, FILES_BATCH) for size in FILES_SIZES),
        ("files only", SIZES[-1], BATCH),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true", help=f"score {FULL} prompts with the engine too")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    rows = [
        measure(side, prompts, batch, arguments.threads)
        for side, prompts, batch in track(cases(arguments.full), "measuring", console=console, transient=True)
    ]
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=120).print(table)
    print(f"{arguments.threads} thread(s), embedded engine; 'files only': fixed scores, no model, so no scoring time")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
