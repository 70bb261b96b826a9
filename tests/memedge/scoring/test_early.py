"""Jobs that leave passes out: score files say what is known of each prompt, after how many passes, and why."""

import csv
import hashlib
import json
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memedge.engine.errors import InputError
from memedge.prompts.columns import Columns
from memedge.prompts.corpus import Corpus
from memedge.prompts.files import PromptFile, read_prompts, read_rows
from memedge.prompts.inputs import find_files
from memedge.results import Scores, Verdict, Verdicts
from memedge.scoring.job import Job, JobSummary, run
from memedge.scoring.mapper import Results, here
from memedge.scoring.merge import Shards
from memedge.scoring.ordering import INPUT, Order
from memedge.scoring.output import Output
from memedge.scoring.reading import Finished
from memedge.scoring.record import Judge
from memedge.scoring.shard import Shard

pq = pytest.importorskip("pyarrow.parquet")

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
NAMES = ["prompt", "norm", "alignment", "score", "memorized", "truncated", "passes", "reason"]
PROMPTS = ["", "=1+1", 'a "b", c', *(f"prompt {i}" for i in range(60))]


def digest(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode()).digest()


def verdict(prompt: str) -> Verdict:
    """Return one that the screen passed, one that the norm decided, or one after all passes."""
    kind, norm = digest(prompt)[0] % 3, digest(prompt)[1] / 7
    if kind == 0:
        return Verdict(prompt, False, None, None, None, 20.0, False, 0.0068, "screened: read-out −1 < cut 0, α", "")
    if kind == 1:
        return Verdict(prompt, norm > 20, None, norm, None, 20.0, False, 1, f"score at least {norm:.4g}", "")
    return Verdict(prompt, norm > 20, norm + 0.1, norm, -0.1, 20.0, False, 2, f"score {norm:.4g} is \t known", "")


def detect(prompts: list[str]) -> Verdicts:
    return Verdicts(map(verdict, prompts))


def tokenize(prompts: Any) -> tuple[np.ndarray, np.ndarray]:
    ids = np.frombuffer(b"".join(map(digest, prompts)), np.int64).reshape(-1, 4)
    return ids, np.array([len(prompt) > 8 for prompt in prompts])


def score(
    source: Path,
    output: Path,
    early: str | None = "screen",
    shard: Shard | None = None,
    order: Order = INPUT,
    scorer: Callable[[list[str]], Results] = detect,
    keep: tuple[str, ...] | None = None,
    **options: Any,
) -> JobSummary:
    corpus = Corpus(find_files([str(source)]), Columns(kept=keep))
    job = Job(corpus, Output.at(output), Judge("k", threshold=20.0, early=early), shard, order)
    return run(job, here(scorer), tokenize, batch_size=8, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two columns, and every prompt in two rows."""
    path = tmp_path_factory.mktemp("input") / "in.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "id"], *([prompt, i] for i, prompt in enumerate(PROMPTS * 2))])
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file, dialect="excel" if path.suffix == ".csv" else "excel-tab"))


def expected(prompt: str) -> dict[str, Any]:
    one = verdict(prompt)
    values = one.norm, one.alignment, one.score, one.memorized, len(prompt) > 8, float(one.passes), one.reason
    return dict(zip(NAMES, (prompt, *values), strict=True))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_says_what_is_known(source: Path, suffix: str, tmp_path: Path) -> None:
    output = tmp_path / f"out{suffix}"
    done = score(source, output)
    wanted = [expected(prompt) for prompt in PROMPTS * 2]
    assert (done.rows, done.unique) == (2 * len(PROMPTS), len(PROMPTS))
    assert done.memorized == sum(row["memorized"] for row in wanted)
    rows = read(output)
    assert all(list(row) == [*NAMES, "id"] for row in rows)
    if suffix in (".jsonl", ".parquet"):
        assert [{name: row[name] for name in NAMES} for row in rows] == wanted
        assert all(isinstance(row["passes"], float) for row in rows)
    else:
        for row, one in zip(rows, wanted, strict=True):
            for name in NAMES[1:4]:
                assert row[name] == ("" if one[name] is None else repr(one[name]))
            assert (row["memorized"], float(row["passes"])) == (str(one["memorized"]).lower(), one["passes"])
            assert row["reason"] == one["reason"]
    assert [row.scores._asdict() for row in Finished.at(Output.at(output)).rows()] == wanted
    assert list(read_prompts(output)) == PROMPTS * 2  # the apostrophe of a formula is taken away again


def test_lines_of_text(source: Path, tmp_path: Path) -> None:
    score(source, tmp_path / "out.txt", keep=())
    lines = [line.split("\t") for line in (tmp_path / "out.txt").read_text().splitlines()]
    assert lines[0] == NAMES
    for prompt, cells in zip(PROMPTS, lines[1:], strict=False):
        assert cells[-1] == expected(prompt)["reason"].replace("\t", "\\t")


def test_a_run_that_was_cut_off_goes_on(source: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole.csv", tmp_path / "out.csv"
    score(source, whole)
    batches: list[list[str]] = []

    def dying(prompts: list[str]) -> Verdicts:
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(prompts)
        return detect(prompts)

    with pytest.raises(KeyboardInterrupt):
        score(source, output, scorer=dying)
    for early in ("conformal", None):
        with pytest.raises(InputError, match=r"is from a job with another choice of --early: run that job again"):
            score(source, output, early, resume=True)
    done = score(source, output, resume=True)
    assert done.scored_now == len(PROMPTS) - 24
    assert output.read_bytes() == whole.read_bytes()
    assert score(source, output, resume=True).finished
    for early in ("proven", None):
        with pytest.raises(InputError, match=r"is the output of a job with another choice of --early"):
            score(source, output, early, resume=True)


def test_a_run_of_all_passes_is_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    def dying(_: list[str]) -> Scores:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(source, tmp_path / "out.csv", None, scorer=dying)
    with pytest.raises(InputError, match="another choice of --early"):
        score(source, tmp_path / "out.csv", resume=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("order", [INPUT, Order(True), Order(top=30)], ids=str)
def test_shards_give_the_file_of_one_job(source: Path, suffix: str, order: Order, tmp_path: Path) -> None:
    whole, merged = tmp_path / f"whole{suffix}", tmp_path / f"merged{suffix}"
    done = score(source, whole, order=order)
    places = [tmp_path / f"{i}{suffix}" for i in (1, 2, 3)]
    for i, place in enumerate(places, start=1):
        score(source, place, shard=Shard(i, 3))
    joined = Shards.open([str(place) for place in places]).merge(Output.at(merged), order=order)
    assert (joined.rows, joined.unique, joined.memorized) == (done.rows, done.unique, done.memorized)
    assert merged.read_bytes() == whole.read_bytes()


def test_shards_of_other_choices_are_not_merged(source: Path, tmp_path: Path) -> None:
    places = [tmp_path / f"{i}.csv" for i in (1, 2)]
    for i, (place, early) in enumerate(zip(places, ("screen", "conformal"), strict=True), start=1):
        score(source, place, early, Shard(i, 2), scorer=whole_verdicts)
    with pytest.raises(InputError, match=r"are of jobs with another choice of --early: merge shards of one job\."):
        Shards.open([str(place) for place in places])


def whole_verdicts(prompts: list[str]) -> Verdicts:
    return Verdicts(Verdict(prompt, False, 1.5, 1.0, 0.5, 20.0, False, 2, "all is known", "") for prompt in prompts)


def test_rows_without_a_score_come_last(source: Path, tmp_path: Path) -> None:
    """As they stand in the input; also among the highest, once those with a score are used up."""
    scored = [p for p in PROMPTS if verdict(p).score is not None]
    for order, count in ((Order(True), 2 * len(PROMPTS)), (Order(top=2 * len(scored) + 5), 2 * len(scored) + 5)):
        output = tmp_path / f"{order}.jsonl"
        score(source, output, order=order)
        rows = read(output)
        scores = [row["score"] for row in rows]
        known, rest = scores[: 2 * len(scored)], scores[2 * len(scored) :]
        assert known == sorted(known, reverse=True) and rest == [None] * (count - len(known))
        numbers = [int(row["id"]) for row in rows[len(known) :]]
        assert numbers == sorted(numbers)


def test_columns_of_the_same_names_clash_only_there(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("prompt,passes,reason\na,7,why\n")
    with pytest.raises(InputError, match="has a column 'passes', which is the name of one of the output's: rename it"):
        score(tmp_path / "in.csv", tmp_path / "out.csv")
    scores = Scores(np.ones(1), np.zeros(1), np.ones(1), np.zeros(1, bool), np.zeros(1, bool), 20.0)
    score(tmp_path / "in.csv", tmp_path / "out.csv", None, scorer=lambda _: scores)
    (row,) = read(tmp_path / "out.csv")
    assert (list(row), row["passes"], row["reason"]) == (NAMES, "7", "why")
    (finished,) = Finished.at(Output.at(tmp_path / "out.csv")).rows()
    assert (finished.scores.passes, finished.kept) == (None, {"passes": "7", "reason": "why"})


def test_a_score_file_is_an_input_like_any_other(source: Path, tmp_path: Path) -> None:
    score(source, tmp_path / "out.csv")
    (row, *_) = read_rows(PromptFile.at(tmp_path / "out.csv"), Columns(kept=("passes", "reason")))
    assert row.kept == {"passes": str(expected("")["passes"]), "reason": expected("")["reason"]}
    score(tmp_path / "out.csv", tmp_path / "again.csv", keep=("id",))
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "out.csv").read_bytes()


@pytest.mark.parametrize(("early", "memorized"), [("screen", True), ("screen", None), ("proven", False)])
def test_a_norm_lacks_only_where_the_screen_passed(
    source: Path, early: str, memorized: bool | None, tmp_path: Path
) -> None:
    """NaN is NULL to SQLite."""

    def odd(prompts: list[str]) -> Verdicts:
        norm = None if memorized is None else math.nan
        return Verdicts(Verdict(p, memorized, None, norm, None, None, False, 1, "odd", "") for p in prompts)

    with pytest.raises(sqlite3.IntegrityError):
        score(source, tmp_path / "out.csv", early, scorer=odd)
    assert not (tmp_path / "out.csv").exists()
