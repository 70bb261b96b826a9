"""`memedge score --early`: on the embedded engine, whose calibration for cpu-fp32 holds a screen."""

import csv
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import fails, memedge

from memedge import Detector
from memedge.commands.early_scorer import EarlyScorer
from memedge.engine.errors import InputError

CPU = ("--provider", "cpu")
CUT = "a red house " * 30
PROMPTS = ["the left luggage sign", "a green star on a hill", "", "=1+1", CUT, "a fox", "a green star on a hill"]
NAMES = ["prompt", "norm", "alignment", "score", "memorized", "truncated", "passes", "reason"]


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "in.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "id"], *([prompt, i] for i, prompt in enumerate(PROMPTS))])
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(source: Path, output: Path, *options: object) -> str:
    """Score, and return what was said."""
    done = memedge("score", source, "-o", output, *options, *CPU)
    assert done.returncode == 0, done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("early", ["proven", "conformal", "screen"])
def test_verdicts_are_those_of_the_detector(detector, source, early, tmp_path):
    output = tmp_path / "out.jsonl"
    said = scored(source, output, "--early", early)
    expected = detector.detect(PROMPTS, early)
    rows = lines(output)
    assert all(list(row) == [*NAMES, "id"] for row in rows)
    for row, verdict in zip(rows, expected, strict=True):
        for name in ("prompt", "memorized", "truncated"):
            assert row[name] == getattr(verdict, name)
        for name in ("norm", "alignment", "score", "passes"):
            wanted = getattr(verdict, name)
            assert row[name] == (None if wanted is None else pytest.approx(wanted, rel=1e-4, abs=1e-4)), name
        assert row["reason"].split()[0] == verdict.reason.split()[0]
    lacking = sum(row["score"] is None for row in rows)
    assert (lacking > 0) == (early == "screen")
    assert (f"{lacking} decided early, without a score." in said) == (lacking > 0)


def test_what_the_screen_passed_is_empty_in_cells(source, tmp_path):
    scored(source, tmp_path / "out.csv", "--early", "screen", "--report", tmp_path / "out.html")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*NAMES, "id"]
    star = rows[1]
    assert [star[name] for name in NAMES[1:6]] == ["", "", "", "false", "false"]
    assert float(star["passes"]) < 0.1 and star["reason"].startswith("screened: read-out ")
    assert rows[6]["passes"] == star["passes"]  # a repeat's passes are those of the one time that it was judged
    assert rows[0]["score"] and float(rows[0]["passes"]) > 1
    page = (tmp_path / "out.html").read_text()
    assert "Rows decided early, without a score" in page and "passes left out: screen" in page
    assert json.loads((tmp_path / "out.csv.job.json").read_text())["judge"]["early"] == "screen"


def test_shards_by_workers_merge_to_the_highest(source, tmp_path):
    whole = tmp_path / "whole.jsonl"
    scored(source, whole, "--early", "screen", "--sort", "score")
    parts = [tmp_path / f"{i}.jsonl" for i in (1, 2)]
    scored(source, parts[0], "--early", "screen", "--shard", "1/2", "--workers", "2")
    scored(source, parts[1], "--early", "conformal", "--shard", "2/2")
    merging = ("merge", *parts, "-o", tmp_path / "merged.jsonl", "--sort", "score")
    fails(memedge(*merging), "are of jobs with another choice of --early: merge shards of one job.")
    scored(source, parts[1], "--early", "screen", "--shard", "2/2", "--overwrite")
    done = memedge(*merging)
    assert done.returncode == 0 and "decided early, without a score." in " ".join(done.stderr.split())
    rows, expected = lines(tmp_path / "merged.jsonl"), lines(whole)
    for name in ("prompt", "memorized", "id"):
        assert [row[name] for row in rows] == [row[name] for row in expected]
    without = [row["score"] is None for row in rows]
    assert without == sorted(without)  # those without a score come last


def test_another_choice_is_not_gone_on_with(source, tmp_path):
    output = tmp_path / "out.csv"
    scored(source, output, "--early", "screen")
    assert "finished before, nothing to do" in scored(source, output, "--early", "screen", "--resume")
    for other in ((), ("--early", "conformal")):
        fails(
            memedge("score", source, "-o", output, *other, "--resume", *CPU),
            "is the output of a job with another choice of --early",
        )


def test_mistakes(source, tmp_path):
    """Before anything is scored, or kept."""
    with (tmp_path / "clash.csv").open("w") as file:
        file.write("prompt,reason\na star,why\n")
    before, output = set(tmp_path.iterdir()), tmp_path / "out.csv"
    for file, arguments, words in (
        (source, ("--early", "screen", "--threshold", "-14"), "The screen holds for the calibrated threshold"),
        (
            source,
            ("--early", "screen", "--threshold", "-14", "--workers", "2"),
            "The screen holds for the calibrated threshold",
        ),
        (tmp_path / "clash.csv", ("--early", "screen"), "has a column 'reason', which is the name of one of"),
    ):
        fails(memedge("score", file, "-o", output, *arguments, *CPU), words)
    fails(memedge("score", source, "-o", output, "--early", "off", *CPU), "'off' is not one of", code=2)
    assert set(tmp_path.iterdir()) == before


def test_an_engine_without_a_calibration(source, engine, tmp_path):
    """Nothing can be left out with proof there: all is computed, and says why there is no verdict."""
    fails(
        memedge("score", source, "-o", tmp_path / "out.csv", "--early", "screen", "--engine", engine),
        "run `memedge calibrate`, or use early='conformal'.",
    )
    done = memedge("score", source, "-o", tmp_path / "out.jsonl", "--early", "proven", "--engine", engine)
    assert done.returncode == 0, done.stderr
    assert all(row["memorized"] is None and row["norm"] is not None for row in lines(tmp_path / "out.jsonl"))


def test_what_scores_travels(detector):
    """To a worker, or to a node of Ray's."""
    with pytest.raises(InputError, match="The screen holds for the calibrated threshold"):
        EarlyScorer(detector.at(threshold=-14.0), "screen")
    scorer = EarlyScorer(Detector.load(provider="cpu", threads=1), "screen")
    again = pickle.loads(pickle.dumps(scorer))
    assert again.info.fingerprint == scorer.info.fingerprint
    assert [one.memorized for one in again.score(PROMPTS)] == [one.memorized for one in detector.detect(PROMPTS)]


def page_lines() -> Iterator[str]:
    page = (Path(__file__).parents[3] / "docs/commands.md").read_text()
    section = page[page.index("## Passes left out") :]
    found = re.search(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert found
    yield from found[1].splitlines()


@pytest.mark.slow
def test_the_lines_of_the_page_run(tmp_path):
    """As they stand in docs/commands.md, in a shell."""
    (tmp_path / "captions.csv").write_text("id,caption\n7,the left luggage sign\n8,a green star on a hill\n")
    program = f'memedge() {{ "{sys.executable}" -P -m memedge.cli "$@" --provider cpu; }}\n'
    for line in page_lines():
        done = subprocess.run(["bash", "-c", program + line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    with (tmp_path / "screened.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["memorized"], bool(row["score"])) for row in rows] == [("true", True), ("false", False)]
    assert [row["id"] for row in lines(tmp_path / "worst.jsonl")] == ["7"]
