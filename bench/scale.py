"""What scoring files costs as they grow: time and memory by rows, processes, repeats, shards and merging.

    python bench/scale.py [--threads N] [--full] [--json FILE]

Every row is scoring.job.run in a fresh process, whose peak resident size is reported; opening the engine is not in the
seconds.
- engine: the embedded engine, whole, on different prompts; --full also scores 100 000, a quarter of an hour or more.
- 80 % repeats: as many rows, of which one in five is new.
- processes: the embedded engine in 2 processes, and in 1, each with one thread.
- no model: fixed scores in place of the engine's: NOT the time of scoring, but of all that could grow with the rows:
  reading, tokenizing, finding duplicates, the journal, writing. Up to 100 000 rows; --full up to 10 000 000, half an
  hour. CSV to CSV, and parquet to a folder of parquet parts.
- shards: the same in 4 shards, one after the other, and their merging.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track
from rich.table import Table

from memedge import Detector
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.directory import EngineDirectory
from memedge.engine.machine import peak_memory
from memedge.engine.tokenizer import PromptTokenizer
from memedge.prompts.columns import Columns
from memedge.prompts.corpus import Corpus
from memedge.prompts.inputs import find_files
from memedge.results import Scores
from memedge.scoring.job import Job, run
from memedge.scoring.mapper import Mapper, here
from memedge.scoring.merge import Shards
from memedge.scoring.output import Output
from memedge.scoring.record import Judge
from memedge.scoring.shard import Shard
from memedge.scoring.workers import processes

BATCH = 32  # the command's own
SIZES = (10, 100, 1000)
LARGE = 100_000
NO_MODEL = (1000, 10_000, 100_000)
HUGE = (1_000_000, 10_000_000)
PROCESSES_ROWS = 1000
REPEATS = 5  # rows for each different prompt, where there are repeats
SHARDS = 4
CHUNK = 100_000  # rows of the input made at once


def fixed(prompts: list[str]) -> Scores:
    """Return the same score for every prompt."""
    zeros, no = np.zeros(len(prompts)), np.zeros(len(prompts), dtype=bool)
    return Scores(zeros, zeros, zeros, no, no, 1.0)


def prompts(rows: int, repeats: int) -> Iterator[list[str]]:
    """Yield prompts in chunks; each different one comes `repeats` times, far apart."""
    different = rows // repeats
    for start in range(0, rows, CHUNK):
        yield [f"picture of a red bicycle number {i % different}" for i in range(start, min(rows, start + CHUNK))]


def make_input(path: Path, rows: int, repeats: int) -> None:
    """Write a file with a column of prompts and one of ids."""
    numbers = iter(range(rows))
    if path.suffix == ".parquet":
        schema = pa.schema([("id", pa.int64()), ("prompt", pa.string())])
        with pq.ParquetWriter(path, schema) as writer:
            for chunk in prompts(rows, repeats):
                ids = [next(numbers) for _ in chunk]
                writer.write_table(pa.table({"id": ids, "prompt": chunk}, schema=schema), row_group_size=10_000)
        return
    with path.open("w") as file:
        file.write("id,prompt\n")
        for chunk in prompts(rows, repeats):
            file.writelines(f"{next(numbers)},{prompt}\n" for prompt in chunk)


@contextmanager
def mapper(side: str, threads: int) -> Iterator[Mapper]:
    if side.endswith("processes"):
        with processes(partial(Detector.load, threads=1), int(side.split()[0]), "auto") as team:
            yield team.mapper
    elif side.startswith("no model") or "shard" in side:
        yield here(fixed)
    else:
        detector = Detector.load(threads=threads)
        detector.score(["warm up"] * BATCH)  # many prompts and one: OpenVINO compiles a graph for each
        detector.warmup()
        yield here(detector.score)


def measure_here(side: str, rows: int, threads: int) -> dict[str, float]:
    """Score that many rows in this process, and return what it took."""
    directory = EngineDirectory.open(EMBEDDED_ENGINE)
    tokenize = PromptTokenizer(directory.tokenizers, directory.token_lengths)
    repeats = REPEATS if "repeats" in side else 1
    suffix = ".parquet" if "parquet" in side else ".csv"
    with tempfile.TemporaryDirectory() as name, mapper(side, threads) as scores:
        folder = Path(name)
        source = folder / f"prompts{suffix}"
        make_input(source, rows, repeats)
        corpus = Corpus(find_files([str(source)]), Columns(kept=None))
        output = Output.at(folder / ("scores" if "parquet" in side else "scores.csv"))
        go = partial(run, mapper=scores, tokenize=tokenize, batch_size=BATCH)
        start = time.perf_counter()
        if side == f"{SHARDS} shards, merged":
            outputs = [Output.at(folder / f"{i}.csv") for i in range(1, SHARDS + 1)]
            found = [go(Job(corpus, o, Judge(side), shard=Shard(i, SHARDS))) for i, o in enumerate(outputs, start=1)]
            scored = sum(one.scored_now for one in found)
            Shards.open([str(one.place) for one in outputs]).merge(output)
        else:
            scored = go(Job(corpus, output, Judge(side))).scored_now
        seconds = time.perf_counter() - start
    if scored != rows // repeats:
        raise RuntimeError(f"{scored} of {rows // repeats} prompts were scored")
    return {"seconds": seconds, "rows/s": rows / seconds, "peak_MB": peak_memory() / 1e6}


def measure(side: str, rows: int, threads: int = 1) -> dict[str, str | float]:
    """Do `measure_here` in a fresh process."""
    code = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import scale;"
        f"print(json.dumps(scale.measure_here({side!r}, {rows}, {threads})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {"side": side, "rows": rows, **json.loads(done.stdout)}


def cases(full: bool) -> list[tuple[str, int]]:
    """Return (side, rows) of every row."""
    return [
        *(("engine", size) for size in (*SIZES, *([LARGE] if full else []))),
        ("engine, 80 % repeats", SIZES[-1]),
        *((f"{n} processes", PROCESSES_ROWS) for n in (1, 2, 1, 2)),
        *(("no model", size) for size in (*NO_MODEL, *(HUGE if full else ()))),
        ("no model, 80 % repeats", HUGE[0] if full else NO_MODEL[-1]),
        ("no model, parquet", HUGE[0] if full else NO_MODEL[-1]),
        (f"{SHARDS} shards, merged", HUGE[0] if full else NO_MODEL[1]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full", action="store_true", help=f"up to {HUGE[-1]} rows, and {LARGE} with the engine")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    rows = []
    for side, size in track(cases(arguments.full), "measuring", console=console, transient=True):
        rows.append(measure(side, size, arguments.threads))
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=120).print(table)
    print(f"{arguments.threads} thread(s), embedded engine; 'no model' and shards: fixed scores, so no scoring time")


if __name__ == "__main__":
    main()
