"""The command line: what it prints, where, its exit codes, and one sentence for every mistake."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

KEYS = {"prompt", "memorized", "score", "norm", "alignment", "threshold", "truncated", "passes"}


def memedge(*arguments: object, cwd=None, environment=None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memedge.cli", *map(str, arguments)],
        cwd=cwd or "/",  # not the checkout, whose folder would hide the installed package
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )


def fails(done: subprocess.CompletedProcess[str], words: str, code: int = 1) -> None:
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.startswith("memedge: ")
        assert len(done.stderr.strip().splitlines()) == 1


def test_detect(detector):
    done = memedge("detect", "a star", "", "cat " * 50, "--provider", "cpu", "--json")
    assert done.returncode == 0
    verdicts = json.loads(done.stdout)
    assert all(v.keys() >= KEYS for v in verdicts)
    scores = detector.score(["a star", "", "cat " * 50])
    assert [v["memorized"] for v in verdicts] == scores.memorized.tolist()
    np.testing.assert_allclose([v["score"] for v in verdicts], scores.score, rtol=1e-4)
    assert [v["truncated"] for v in verdicts] == [False, False, True]
    table = memedge("detect", "a star [bold]", environment={"COLUMNS": "100"})
    assert "a star [bold]" in table.stdout
    assert "threshold" in table.stderr


def test_without_calibration(engine):
    done = memedge("detect", "a star", "--engine", engine, "--json")
    verdict = json.loads(done.stdout)[0]
    assert (verdict["memorized"], verdict["score"], verdict["threshold"]) == (None, None, None)
    assert "No verdicts" in memedge("detect", "a star", "--engine", engine).stderr


def test_demo(tmp_path):
    done = memedge("demo", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    verdicts = json.loads(done.stdout)
    memorized = [v["memorized"] for v in verdicts]
    assert memorized == sorted(memorized, reverse=True)
    assert {True, False} == set(memorized)
    with Image.open(tmp_path / "memedge-demo.png") as picture:
        assert picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 1000
    assert list(tmp_path.iterdir()) == [tmp_path / "memedge-demo.png"]


def test_info_and_doctor(engine):
    manifest = json.loads((engine / "manifest.json").read_text())
    info = json.loads(memedge("info", engine, "--json").stdout)
    assert info["manifest"] == manifest
    assert manifest["source"]["id"] in memedge("info", engine).stdout
    findings = {f["part"]: f for f in json.loads(memedge("doctor", "--json").stdout)}
    assert findings["engine"]["state"] == "active"
    assert findings["native core"]["state"] in ("active", "missing")
    without = memedge("doctor", "--json", environment={"MEMEDGE_NO_CORE": "1"})
    assert {f["part"]: f for f in json.loads(without.stdout)}["native core"]["state"] == "missing"
    assert without.returncode == 0
    broken = memedge("doctor", "--engine", engine / "nowhere")
    assert broken.returncode == 1
    assert "broken" in broken.stdout


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl", "parquet"])
def test_score(detector, tmp_path, suffix):
    prompts = ["a star", "house, red", "a star", "cat " * 50]
    (tmp_path / "in.csv").write_text("prompt\n" + "".join(f'"{p}"\n' for p in prompts))
    output = tmp_path / f"out.{suffix}"
    done = memedge("score", tmp_path / "in.csv", "-o", output, "--provider", "cpu", "--json")
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


def test_score_survives_a_kill(tmp_path):
    """SIGKILL in the middle, then --resume: nothing lost, nothing scored twice, the output of a whole run."""
    source, output = tmp_path / "in.txt", tmp_path / "out.csv"
    source.write_text("".join(f"prompt number {i}\n" for i in range(400)))
    command = [sys.executable, "-m", "memedge.cli", "score", source, "-o", output]
    process = subprocess.Popen(command, cwd="/", stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.csv.partial"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size > 16_384):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    fails(memedge("score", source, "-o", output), "--resume")
    done = memedge("score", source, "-o", output, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["scored_now"] < 400
    whole = tmp_path / "whole.csv"
    assert memedge("score", source, "-o", whole).returncode == 0
    with output.open() as a, whole.open() as b:
        resumed, uninterrupted = list(csv.DictReader(a)), list(csv.DictReader(b))
    assert [r["prompt"] for r in resumed] == [r["prompt"] for r in uninterrupted]
    np.testing.assert_allclose(
        [float(r["norm"]) for r in resumed], [float(r["norm"]) for r in uninterrupted], rtol=1e-4
    )


def test_score_mistakes(tmp_path):
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
        fails(memedge("score", *arguments), words)
    assert set(tmp_path.iterdir()) == before


def test_mistakes(engine, tmp_path):
    damaged = shutil.copytree(engine, tmp_path / "damaged")
    (damaged / "unet.onnx.data").write_bytes(b"")
    for arguments, words in [
        (("detect", "a", "--engine", tmp_path), "holds no manifest.json"),
        (("detect", "a", "--engine", damaged), "bytes instead of"),
        (("detect", "a", "--provider", "abacus"), "no provider 'abacus'"),
        (("detect", "a", "--provider", "cuda"), "Provider 'cuda' needs onnxruntime-gpu"),
        (("detect", "a", "--precision", "fp16"), "is an fp32 engine"),
        (("detect", b"\xff".decode(errors="surrogateescape")), "UTF-8"),
        (("info", engine, "--engine", engine), "Two engine directories"),
        (("demo", "-o", tmp_path / "absent" / "demo.png"), "does not exist"),
        (("demo", "-o", "/proc/demo.png"), "/proc/demo.png"),
    ]:
        fails(memedge(*arguments), words)
    for arguments, words in [
        (("detect",), "PROMPT"),
        (("detect", "a", "--threads", 0), "--threads"),
        (("detect", "a", "--sharpness"), "No such option"),
        (("bogus",), "No such command"),
    ]:
        fails(memedge(*arguments), words, code=2)


def test_full_disk():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "memedge.cli", "detect", "a star", "--json"]
        done = subprocess.run(command, cwd="/", stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_every_command():
    text = memedge("--help").stdout
    assert all(
        name in text
        for name in (
            "detect",
            "explain",
            "score",
            "info",
            "calibrate",
            "doctor",
            "demo",
            "export",
            "bench",
            "Exit codes",
        )
    )
