"""What is lost where a scoring run ends in any way: point × rows lost × rows repeated × prompts that were kept.

    python bench/kills.py [--rounds N] [--rows N] [--json FILE]

Each round scores the embedded model's captions with the real command, ends it at a random moment or spoils its output,
runs the same command again with --resume, and compares the rows with those of a run that nobody disturbed: prompts and
kept columns equal, statistics within the rounding of batches. The seed is fixed, the moments are not: they hang on the
machine's speed.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from memedge.embedded import captions

ROUNDS, ROWS, SHARDS = 3, 600, 3
WITHIN = 1e-4  # of norm, relative, and of alignment, absolute: docs/methods.md
SMALL = 40_000  # bytes: the disk that is full


class Trial:
    """One job in a folder of its own."""

    def __init__(self, folder: Path, source: Path, choose: random.Random):
        self.folder, self.source, self.choose = folder, source, choose
        self.said = ""

    def command(self, output: str, *options: str) -> list[str]:
        line = [sys.executable, "-m", "memedge", "score", str(self.source), "-o", str(self.folder / output)]
        return [*line, "--provider", "cpu", "--threads", "1", "--format", "jsonl", "--json", *options]

    def start(self, line: list[str], **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen(line, cwd="/", **pipes, **options)

    def wait_for_results(self, process: subprocess.Popen[str], output: str) -> None:
        """Return at a random moment after the first results are in the journal."""
        journal = self.folder / f"{output}.partial"
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > 16_384):
            time.sleep(0.005)
        time.sleep(self.choose.uniform(0, 1.5))

    def end(self, process: subprocess.Popen[str]) -> int:
        _, said = process.communicate(timeout=600)
        self.said = said.strip().splitlines()[-1] if said.strip() else ""
        return process.returncode

    def finish(self, line: list[str]) -> dict[str, Any]:
        """Run a command to its end and return what it says."""
        done = subprocess.run(line, cwd="/", capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{line}: {done.stderr}")
        summary: dict[str, Any] = json.loads(done.stdout)
        return summary

    def ended_by(self, send: Callable[[subprocess.Popen[str]], None], *options: str) -> dict[str, Any]:
        """Score, let `send` end it at a random moment, and go on."""
        process = self.start(self.command("out", *options))
        self.wait_for_results(process, "out")
        if process.poll() is None:
            send(process)
        self.end(process)
        return self.finish(self.command("out", *options, "--resume"))


def children(process: subprocess.Popen[str]) -> list[int]:
    """Return the worker processes of a run: all but multiprocessing's own helper."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = status.read_text().rpartition(")")[2].split()
            line = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(words[1]) == process.pid and b"resource_tracker" not in line:
            found.append(int(status.parent.name))
    return found


def kill_one_worker(process: subprocess.Popen[str]) -> None:
    for pid in children(process)[:1]:
        os.kill(pid, signal.SIGKILL)


def kill_all_workers(process: subprocess.Popen[str]) -> None:
    for pid in children(process):
        os.kill(pid, signal.SIGKILL)


def full_disk(trial: Trial) -> dict[str, Any]:
    limit = SMALL
    process = trial.start(
        trial.command("out"), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    trial.end(process)
    return trial.finish(trial.command("out", "--resume"))


def deleted_part(trial: Trial) -> dict[str, Any]:
    trial.finish(trial.command("out"))
    (trial.folder / "out" / "part-00001.jsonl").unlink()
    return trial.finish(trial.command("out", "--resume"))


def two_at_once(trial: Trial) -> dict[str, Any]:
    first = trial.start(trial.command("out"))
    trial.wait_for_results(first, "out")
    second = trial.start(trial.command("out", "--resume"))
    trial.end(second)
    said = trial.said
    if trial.end(first) == 0:
        trial.said = said
    return trial.finish(trial.command("out", "--resume"))


def killed_shards(trial: Trial) -> dict[str, Any]:
    kept = 0
    for i in range(1, SHARDS + 1):
        options = ("--shard", f"{i}/{SHARDS}")
        process = trial.start(trial.command(f"shard{i}", *options))
        trial.wait_for_results(process, f"shard{i}")
        process.kill()
        trial.end(process)
        done = trial.finish(trial.command(f"shard{i}", *options, "--resume"))
        kept += done["unique"] - done["scored_now"]
    parts = [str(trial.folder / f"shard{i}") for i in range(1, SHARDS + 1)]
    line = [sys.executable, "-m", "memedge", "merge", *parts, "-o", str(trial.folder / "out"), "--format", "jsonl"]
    process = trial.start(line)
    time.sleep(trial.choose.uniform(0.3, 1.5))
    process.kill()
    trial.end(process)
    if (trial.folder / "out").exists():
        line.append("--overwrite")
    summary = trial.finish([*line, "--json"])
    return summary | {"scored_now": summary["unique"] - kept}


POINTS: dict[str, Callable[[Trial], dict[str, Any]]] = {
    "SIGKILL of the command": lambda trial: trial.ended_by(lambda process: process.kill()),
    "SIGTERM of the command": lambda trial: trial.ended_by(lambda process: process.terminate()),
    "Ctrl-C": lambda trial: trial.ended_by(lambda process: os.killpg(process.pid, signal.SIGINT)),
    "SIGKILL, two workers": lambda trial: trial.ended_by(lambda process: process.kill(), "--workers", "2"),
    "SIGTERM to the group, two workers": lambda trial: trial.ended_by(
        lambda process: os.killpg(process.pid, signal.SIGTERM), "--workers", "2"
    ),
    "SIGKILL of one worker of two": lambda trial: trial.ended_by(kill_one_worker, "--workers", "2"),
    "SIGKILL of both workers": lambda trial: trial.ended_by(kill_all_workers, "--workers", "2"),
    "full disk": full_disk,
    "a part deleted by hand": deleted_part,
    "two runs at once": two_at_once,
    "SIGKILL of each shard, and of merging": killed_shards,
}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def compare(found: list[dict[str, Any]], whole: list[dict[str, Any]]) -> tuple[int, int]:
    """Return how many rows are lost or differ, and how many are there more than once; another order counts as one."""
    numbers = Counter(row["n"] for row in found)
    by_number = {row["n"]: row for row in found}
    lost = 0
    for row in whole:
        other = by_number.get(row["n"])
        same = other is not None and (other["prompt"], other["memorized"]) == (row["prompt"], row["memorized"])
        if not same or other is None or not np.isclose(other["norm"], row["norm"], rtol=WITHIN, atol=WITHIN):
            lost += 1
    order = [row["n"] for row in found] == [row["n"] for row in whole]
    return lost, sum(numbers.values()) - len(numbers) + (0 if order else 1)


def measure(rounds: int, rows: int) -> list[dict[str, Any]]:
    """Try every point that many times."""
    texts = [caption.prompt for caption in captions()]
    choose = random.Random(0)
    results = []
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "prompts.jsonl")
        different = rows - rows // 5
        numbers = (i % different for i in range(rows))
        lines = ({"prompt": f"{texts[k % len(texts)]} {k // len(texts)}", "n": i} for i, k in enumerate(numbers))
        source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        whole = Trial(Path(name), source, choose)
        unique = whole.finish(whole.command("whole"))["unique"]
        expected = rows_of(Path(name, "whole"))
        trials = [(point, number) for point in POINTS for number in range(rounds)]
        for point, number in track(trials, "killing", console=Console(stderr=True), transient=True):
            trial = Trial(Path(name, f"{len(results)}"), source, choose)
            trial.folder.mkdir()
            summary = POINTS[point](trial)
            lost, repeated = compare(rows_of(trial.folder / "out"), expected)
            beside = sorted(p.name for p in trial.folder.iterdir() if "partial" in p.name)
            results.append(
                {
                    "point": point,
                    "round": number + 1,
                    "rows lost": lost,
                    "rows repeated": repeated,
                    "prompts": unique,
                    "of them kept": summary["unique"] - summary["scored_now"],
                    "left behind": beside,
                    "said": trial.said.replace(str(trial.folder), "…"),
                }
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = measure(arguments.rounds, arguments.rows)
    table = Table("point", "rounds", "rows lost", "rows repeated", "prompts kept", "what it said", box=None)
    for point in POINTS:
        some = [result for result in results if result["point"] == point]
        kept = "–".join(str(f(r["of them kept"] for r in some)) for f in (min, max))
        lost, repeated = (sum(r[name] for r in some) for name in ("rows lost", "rows repeated"))
        table.add_row(
            point, str(len(some)), str(lost), str(repeated), f"{kept} of {some[0]['prompts']}", some[0]["said"]
        )
    Console(width=200).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if any(result["rows lost"] or result["rows repeated"] or result["left behind"] for result in results):
        sys.exit("rows were lost or repeated, or files left behind")


if __name__ == "__main__":
    main()
