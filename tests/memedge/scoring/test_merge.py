"""Shards and their merging: what comes out is what one job writes."""

import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from memedge.engine.errors import InputError
from memedge.prompts.columns import Columns
from memedge.prompts.corpus import Corpus
from memedge.prompts.files import read_prompts
from memedge.prompts.inputs import find_files
from memedge.results import Scores
from memedge.scoring.job import Job, JobSummary, run
from memedge.scoring.mapper import here
from memedge.scoring.merge import Shards
from memedge.scoring.ordering import Order
from memedge.scoring.output import Output
from memedge.scoring.record import Judge
from memedge.scoring.shard import Shard

ROWS = 300
SUFFIXES = (".csv", ".tsv", ".jsonl", ".jsonl.gz", ".csv.zst", ".parquet")


def hashes(prompts: list[str]) -> np.ndarray:
    digests = b"".join(hashlib.sha256(prompt.encode()).digest()[:8] for prompt in prompts)
    return np.frombuffer(digests, np.int64).reshape(-1, 1)


def scores(prompts: list[str]) -> Scores:
    norm = (hashes(prompts)[:, 0] % 997) / 7
    return Scores(norm, norm / -200, norm * 2, norm > 70, np.array([len(p) > 40 for p in prompts]), 140.0)


def tokenize(prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    return hashes(prompts), np.array([len(prompt) > 40 for prompt in prompts])


def score(source: Path, output: Path, shard: Shard | None = None, **options) -> JobSummary:
    corpus = Corpus(find_files([str(source)]), Columns(kept=options.pop("kept", None)))
    judge = Judge(options.pop("engine", "k"), threshold=140.0)
    job = Job(corpus, Output.at(output), judge, shard, id_column=options.pop("id", None))
    return run(
        job, here(scores), lambda texts: (hashes(list(texts)), np.array([len(t) > 40 for t in texts])), **options
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Repeats, lines within a prompt, the empty prompt, formulas, keys that rows lack, values of several types."""
    choose = random.Random(0)
    texts = ["", "=1+1", "a\nb", "'=x", '"quoted", with a comma\t', *(f"prompt {i}" * (1 + i % 9) for i in range(90))]
    path = tmp_path_factory.mktemp("input") / "prompts.jsonl"
    with path.open("w") as file:
        for number in range(ROWS):
            row = {"caption": choose.choice(texts), "id": f"{number:03}", "mixed": choose.choice([1, "1", None, [2.5]])}
            if number % 3:
                row["sometimes"] = number / 8
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("suffix", [*SUFFIXES, ""])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_shards_give_the_file_of_one_job(source, suffix, count, tmp_path):
    """Byte by byte, but for the parquet files of folders, whose row groups may lie elsewhere."""
    whole, merged = tmp_path / f"whole{suffix}", tmp_path / f"merged{suffix}"
    done = score(source, whole, id="id", part_rows=70)
    places = [tmp_path / f"shard{i}{suffix}" for i in range(1, count + 1)]
    found = [score(source, place, Shard(i, count), id="id") for i, place in enumerate(places, start=1)]
    assert sum(one.rows for one in found) == ROWS and sum(one.unique for one in found) == done.unique
    shuffled = random.Random(count).sample(places, count)
    joined = Shards.open([str(place) for place in shuffled]).merge(Output.at(merged), part_rows=70)
    assert (joined.rows, joined.unique, joined.memorized, joined.truncated, joined.parts) == (
        ROWS, done.unique, done.memorized, done.truncated, done.parts
    )  # fmt: skip
    if suffix:
        assert merged.read_bytes() == whole.read_bytes()
    else:
        names = [f"part-{i:05}.parquet" for i in range(1, 6)]
        assert sorted(path.name for path in merged.iterdir()) == ["_job.json", *names]
        for name in names:
            assert pq.read_table(merged / name).equals(pq.read_table(whole / name))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_merging_to_another_format_is_scoring_to_it(source, suffix, tmp_path):
    for i in (1, 2):
        score(source, tmp_path / f"{i}.jsonl", Shard(i, 2))
    shards = Shards.open([str(tmp_path / f"{i}.jsonl") for i in (1, 2)])
    for order in (Order(), Order(by_score=True), Order(top=7)):
        merged = tmp_path / f"merged-{order}{suffix}"
        shards.merge(Output.at(merged), order=order)
        whole = tmp_path / f"whole-{order}{suffix}"
        corpus = Corpus(find_files([str(source)]), Columns(kept=None))
        job = Job(corpus, Output.at(whole), Judge("k", threshold=140.0), order=order)
        run(job, here(scores), tokenize)
        assert merged.read_bytes() == whole.read_bytes()


def test_rows_belong_to_the_shard_of_their_text(source, tmp_path):
    """Equal prompts meet, whatever the files; the rule is the one that is documented."""
    expected: dict[int, list[str]] = {1: [], 2: [], 3: []}
    for prompt in read_prompts(source):
        expected[int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 3 + 1].append(prompt)
    for i in (1, 2, 3):
        score(source, tmp_path / f"{i}.jsonl", Shard(i, 3))
        assert list(read_prompts(tmp_path / f"{i}.jsonl")) == expected[i]


def test_a_shard_without_rows(tmp_path):
    source = tmp_path / "prompts.txt"
    source.write_text("one\n")
    for suffix in (".csv", ".parquet", ""):
        places = [tmp_path / f"{i}{suffix}" for i in range(1, 6)]
        rows = [score(source, place, Shard(i, 5)).rows for i, place in enumerate(places, start=1)]
        assert sorted(rows) == [0, 0, 0, 0, 1]
        assert Shards.open([str(place) for place in places]).merge(Output.at(tmp_path / f"all{suffix}.jsonl")).rows == 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0", "1", "a/b", "1/3/4", "-1/3", "1 / 3", "1/1000000", "", "²/3"])
def test_what_is_no_shard(text):
    with pytest.raises(InputError, match=re.escape(f"{text} is no shard: give I/N with I from 1 to N")):
        Shard.parse(text)


def test_shards_that_do_not_belong_together(source, tmp_path):
    def shard(name: str, part: str, **options) -> Path:
        score(options.pop("of", source), tmp_path / name, Shard.parse(part), **options)
        return tmp_path / name

    other = tmp_path / "other.txt"
    other.write_text("something else\n")
    one = shard("one.jsonl", "1/2")
    shard("two.jsonl", "2/2")
    score(source, tmp_path / "whole.jsonl")
    (tmp_path / "bare.jsonl").write_bytes(one.read_bytes())
    (tmp_path / "cut.jsonl").write_bytes(one.read_bytes()[:-9])
    (tmp_path / "cut.jsonl.job.json").write_bytes((tmp_path / "one.jsonl.job.json").read_bytes())
    shard("input.jsonl", "2/2", of=other)
    shard("engine.jsonl", "2/2", engine="other")
    shard("columns.jsonl", "2/2", kept=())
    shard("three.jsonl", "2/3")
    shard("two.csv", "2/2")
    shard("third.jsonl", "3/3")
    cases: dict[str, str] = {
        "one.jsonl": "Of 2 shards 2 are missing: score them, and give them too.",
        "one.jsonl one.jsonl two.jsonl": "one.jsonl are both shard 1/2: give each shard once.",
        "one.jsonl gone.jsonl": "gone.jsonl does not exist: name what memedge score wrote.",
        "one.jsonl bare.jsonl": "bare.jsonl.job.json, which says how",
        "cut.jsonl two.jsonl": "cut.jsonl lacks one.jsonl as it was written: score it again with --resume.",
        "one.jsonl whole.jsonl": "whole.jsonl is no shard but a whole output: give what --shard wrote.",
        "one.jsonl input.jsonl": "are of jobs with another input and another choice of columns: merge shards of",
        "one.jsonl engine.jsonl": "are of jobs with another engine, calibration, threshold, provider or precision",
        "one.jsonl columns.jsonl": "are of jobs with another choice of columns",
        "one.jsonl three.jsonl": "one.jsonl is one of 2 shards, and",
        "one.jsonl two.csv": "are of different formats: score the shards again, to the same one.",
        "three.jsonl third.jsonl": "Of 3 shards 1 are missing",
    }
    for names, words in cases.items():
        with pytest.raises(InputError, match=re.escape(words)) as caught:
            Shards.open([str(tmp_path / name) for name in names.split()])
        assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda lines: [*lines[:4], lines[3], *lines[5:]],
            "Row 5 is in no part, or row 4 in two: score",
        ),
        (lambda lines: lines[:-1], "has 299 rows, and had 300: score it again."),
        (lambda lines: [line.replace('"norm"', '"mron"') for line in lines], "has other columns than it had ('norm')"),
    ],
)
def test_a_shard_that_was_changed(source, change: Callable[[list[str]], list[str]], words, tmp_path):
    """Its size is that of the record: what only its rows can tell."""
    place = tmp_path / "one.jsonl"
    score(source, place, Shard(1, 1))
    lines = change(place.read_text().splitlines())
    place.write_text("\n".join(lines) + "\n")
    record = tmp_path / "one.jsonl.job.json"
    text = re.sub(r'"bytes": \d+', f'"bytes": {place.stat().st_size}', record.read_text())
    record.write_text(text)
    output = tmp_path / "merged.csv"
    with pytest.raises(InputError, match=re.escape(words)):
        Shards.open([str(place)]).merge(Output.at(output))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "one.jsonl.job.json"]


def test_an_output_that_is_there(source, tmp_path):
    place, output = tmp_path / "one.jsonl", tmp_path / "merged.csv"
    score(source, place, Shard(1, 1))
    output.write_text("mine")
    shards = Shards.open([str(place)])
    with pytest.raises(InputError, match=r"merged\.csv is there already: replace it with --overwrite"):
        shards.merge(Output.at(output))
    with pytest.raises(InputError, match=r"one\.jsonl is the input file too: name another file for the output"):
        shards.merge(Output.at(place), overwrite=True)
    shards.merge(Output.at(output), overwrite=True)
    assert len(list(read_prompts(output))) == ROWS


def test_two_at_once_are_refused(source, tmp_path):
    place, output = tmp_path / "one.jsonl", tmp_path / "merged.csv"
    score(source, place, Shard(1, 1))
    shards = Shards.open([str(place)])

    def second(*_: object) -> None:
        with pytest.raises(InputError, match=r"merged\.csv\.partial is in use by another process that writes the same"):
            shards.merge(Output.at(output))

    shards.merge(Output.at(output), progress=second)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "merged.csv", "merged.csv.job.json", "one.jsonl", "one.jsonl.job.json"
    ]  # fmt: skip
