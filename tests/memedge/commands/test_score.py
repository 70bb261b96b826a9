"""`memedge score`: every format, after a kill, and one sentence for every mistake."""

import csv
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import fails, memedge

CPU = ("--provider", "cpu")


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl", "parquet"])
def test_score(detector, tmp_path, suffix):
    prompts = ["a star", "house, red", "a star", "cat " * 50]
    (tmp_path / "in.csv").write_text("prompt\n" + "".join(f'"{p}"\n' for p in prompts))
    output = tmp_path / f"out.{suffix}"
    done = memedge("score", tmp_path / "in.csv", "-o", output, *CPU, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["rows"], summary["unique"], summary["scored_now"]) == (4, 3, 3)
    columns = ["prompt", "norm", "alignment", "score", "memorized", "truncated"]
    if suffix == "parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(output).to_pylist()
    elif suffix == "jsonl":
        rows = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if suffix == "txt" else ","))
    assert [list(row) for row in rows] == [columns] * 4
    assert [row["prompt"] for row in rows] == prompts
    np.testing.assert_allclose([float(row["score"]) for row in rows], detector.score(prompts).score, rtol=1e-4)
    assert [str(row["truncated"]).lower() for row in rows] == ["false", "false", "false", "true"]
    assert {p.name for p in tmp_path.iterdir()} == {"in.csv", output.name}


@pytest.mark.slow
def test_survives_a_kill(tmp_path):
    """SIGKILL in the middle, then --resume: nothing lost, nothing scored twice, the output of a whole run."""
    source, output = tmp_path / "in.txt", tmp_path / "out.csv"
    source.write_text("".join(f"prompt number {i}\n" for i in range(240)))
    command = [sys.executable, "-m", "memedge.cli", "score", source, "-o", output, *CPU]
    process = subprocess.Popen(command, cwd="/", stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.csv.partial"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 16_384):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    fails(memedge("score", source, "-o", output, *CPU), "--resume")
    done = memedge("score", source, "-o", output, *CPU, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["scored_now"] < 240
    whole = tmp_path / "whole.csv"
    assert memedge("score", source, "-o", whole, *CPU).returncode == 0
    with output.open() as a, whole.open() as b:
        resumed, uninterrupted = list(csv.DictReader(a)), list(csv.DictReader(b))
    assert [r["prompt"] for r in resumed] == [r["prompt"] for r in uninterrupted]
    np.testing.assert_allclose(
        [float(r["norm"]) for r in resumed], [float(r["norm"]) for r in uninterrupted], rtol=1e-4
    )


def test_mistakes(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "no-column.csv").write_text("text\na star\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "good.txt").write_text("a star\n")
    out = tmp_path / "out.csv"
    before = set(tmp_path.iterdir())
    for arguments, words in [
        ((tmp_path / "absent.txt", "-o", out), "absent.txt"),
        ((tmp_path / "empty.txt", "-o", out), "empty.txt"),
        ((tmp_path / "no-column.csv", "-o", out), "prompt"),
        ((tmp_path / "latin.txt", "-o", out), "UTF-8"),
        ((tmp_path / "good.txt", "-o", tmp_path / "absent" / "out.csv"), "absent"),
        ((tmp_path / "good.txt", "-o", tmp_path / "good.txt"), "input"),
        ((tmp_path / "good.txt", "-o", tmp_path / "out.xls"), ".parquet"),
        ((tmp_path / "good.txt", "-o", out, "--engine", tmp_path), "holds no manifest.json"),
    ]:
        fails(memedge("score", *arguments, *CPU), words)
    for size in ("0", "many"):
        fails(memedge("score", tmp_path / "good.txt", "-o", out, "--batch-size", size), "nor auto", code=2)
    assert set(tmp_path.iterdir()) == before
