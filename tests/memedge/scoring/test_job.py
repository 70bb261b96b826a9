"""The scoring job: what it writes, that nothing is scored twice, that a kill at any moment costs one batch at most."""

import csv
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from memedge.engine.errors import InputError, NotFiniteError
from memedge.results import Scores
from memedge.scoring.job import JobSummary
from memedge.scoring.journal import Journal, ids_key
from memedge.scoring.output import Output
from memedge.scoring.shard import Shard

# A scorer whose results follow from the prompts alone, and which notes every prompt it is given; and a way to die at
# any moment: the profiler's hook sees each call and return of Python and C functions.
CHILD = """
import hashlib, os, signal, sys
from pathlib import Path
import numpy as np
from memedge.prompts.columns import Columns
from memedge.prompts.corpus import Corpus
from memedge.prompts.inputs import find_files
from memedge.results import Scores
from memedge.scoring.job import Job, run
from memedge.scoring.mapper import here
from memedge.scoring.output import Output
from memedge.scoring.record import Judge

def tokenize(prompts):
    digests = [hashlib.sha256(prompt.lower().encode()).digest() for prompt in prompts]
    ids = np.frombuffer(b"".join(digests), np.int64).reshape(-1, 4)
    return ids, np.array([len(p) > 8 for p in prompts])

def digest(source):
    return Corpus(find_files([str(source)]), Columns()).inspect(lambda rows: None).sha256

def score_file(score, source, output, *, engine_key, resume, kept=(), shard=None, **options):
    corpus = Corpus(find_files([str(source)]), Columns(kept=kept))
    job = Job(corpus, Output.at(output), Judge(engine_key), shard=shard)
    return run(job, here(score), tokenize, resume=resume, **options)

def fake(prompts, calibrated=True):
    digests = [hashlib.sha256(prompt.encode()).digest() for prompt in prompts]
    norm = np.array([int.from_bytes(digest[:6]) / 7 for digest in digests])
    alignment = np.array([digest[6] / 128 - 1 for digest in digests])
    score, memorized = (norm + alignment, norm > 2e13) if calibrated else (None, None)
    return Scores(norm, alignment, score, memorized, np.array([len(p) > 8 for p in prompts]), 2e13)

def noting(log):
    def score(prompts):
        with open(log, "ab") as file:
            file.write(b"".join(hashlib.sha256(prompt.encode()).hexdigest().encode() + b"\\n" for prompt in prompts))
        return fake(prompts)
    return score

def die_at(moment):
    '''moment: how many events to live for, or "event function" by name. Returns a function that counts the events.'''
    events = 0
    def hook(frame, event, argument):
        nonlocal events
        events += 1
        if event.startswith("c_"):
            name = getattr(argument, "__name__", "")
        else:
            name = frame.f_code.co_name
        if moment == events or moment == f"{event} {name}":
            os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(hook)
    return lambda: events
"""
KILLED = (
    CHILD
    + """
source, output, log, moment = sys.argv[1:]
if output.endswith(".parquet"):
    import pyarrow.parquet  # not the moments we are after
count = die_at(int(moment) if moment.isdigit() else moment)
score_file(noting(log), Path(source), Path(output), engine_key="k", resume=True, batch_size=8)
sys.setprofile(None)
print(count())
"""
)
HELPERS: dict[str, Any] = {}
exec(CHILD, HELPERS)
score_file = HELPERS["score_file"]


def fake(prompts: list[str], calibrated: bool = True) -> Scores:
    scores = HELPERS["fake"](prompts, calibrated)
    assert isinstance(scores, Scores)
    return scores


def run(source: Path, output: Path, resume: bool = False, **options: Any) -> JobSummary:
    return score_file(options.pop("score", fake), source, output, engine_key="k", resume=resume, **options)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """42 rows, 40 distinct prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {number}\n" for number in [*range(40), 3, 3]))
    return path


@pytest.fixture
def unfinished(source: Path) -> Path:
    """The output of a job over `source` that ended after two batches of 8."""

    def score(prompts: list[str]) -> Scores:
        if "prompt 16" in prompts:
            raise NotFiniteError("A tensor holds NaN.")
        return fake(prompts)

    output = source.with_name("scores.csv")
    with pytest.raises(NotFiniteError):
        run(source, output, score=score, batch_size=8)
    assert names(source.parent) == {"prompts.txt", "scores.csv.partial"}
    return output


def test_a_job_gives_a_row_per_row_and_leaves_only_the_output(tmp_path: Path) -> None:
    source, output = tmp_path / "in.csv", tmp_path / "out.jsonl"
    values = ["a", "", "a", "b\nc", "longer than eight", "longer than eight"]
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], *[[value] for value in values]])
    output.write_text("an older output")
    calls: list[list[str]] = []

    def score(prompts: list[str]) -> Scores:
        calls.append(prompts)
        return fake(prompts)

    with pytest.raises(InputError, match=r"out\.jsonl is there already: replace it with --overwrite, or name another"):
        run(source, output, score=score, batch_size=3)
    assert output.read_text() == "an older output"
    summary = run(source, output, score=score, batch_size=3, overwrite=True)
    assert calls == [["a", "", "b\nc"], ["longer than eight"]]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    expected = fake(values)
    assert expected.score is not None and expected.memorized is not None
    assert [row["prompt"] for row in rows] == values
    for name in ("norm", "alignment", "score", "memorized", "truncated"):
        assert [row[name] for row in rows] == getattr(expected, name).tolist()
    assert summary == JobSummary(6, 4, 4, int(expected.memorized.sum()), 2, output, 1)
    assert names(tmp_path) == {"in.csv", "out.jsonl", "out.jsonl.job.json"}


def test_an_uncalibrated_engine_gives_no_verdicts(source: Path) -> None:
    output = source.with_name("out.csv")
    summary = run(source, output, score=lambda prompts: fake(prompts, calibrated=False))
    assert summary.memorized is None
    with output.open(newline="") as file:
        assert {(row["score"], row["memorized"]) for row in csv.DictReader(file)} == {("", "")}


def test_negative_zero_survives_the_journal(source: Path) -> None:
    output = source.with_name("out.jsonl")
    zeros = np.full(40, -0.0)
    truths = np.zeros(40, bool)
    run(source, output, score=lambda _: Scores(zeros, zeros, zeros, truths, truths, 0.0), batch_size=40)
    assert '"norm": -0.0, "alignment": -0.0, "score": -0.0' in output.read_text()


def test_nan_and_a_wrong_number_of_results_are_never_written(source: Path) -> None:
    output = source.with_name("out.csv")
    good = fake(["a"] * 40)
    bad = Scores(np.full(40, np.nan), good.alignment, good.score, good.memorized, good.truncated, None)
    with pytest.raises(sqlite3.IntegrityError, match="NOT NULL"):
        run(source, output, score=lambda _: bad, batch_size=40)
    with pytest.raises(ValueError, match="zip"):
        run(source, output, score=lambda _: good, batch_size=39, resume=True)
    assert not output.exists()


@pytest.mark.parametrize("values", [["one"], ["longer than eight"]])
def test_one_row_is_counted(values: list[str], tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.csv"
    source.write_text("".join(f"{value}\n" for value in values))
    done = run(source, output)
    assert run(source, output, resume=True) == replace(done, scored_now=0, finished=True)


def test_progress_counts_rows(source: Path) -> None:
    seen: list[tuple[object, ...]] = []
    run(source, source.with_name("out.csv"), batch_size=16, progress=lambda *counts: seen.append(counts))
    scoring = [("scoring", rows, 42) for rows in (0, 16, 32, 32, 42, 42)]
    assert seen == [*scoring, ("writing", 42, 42)]


def test_resume_scores_only_what_is_missing(unfinished: Path, source: Path) -> None:
    scored: list[str] = []

    def score(prompts: list[str]) -> Scores:
        scored.extend(prompts)
        return fake(prompts)

    summary = run(source, unfinished, resume=True, score=score, batch_size=7)
    assert scored == [f"prompt {number}" for number in range(16, 40)]
    assert (summary.rows, summary.unique, summary.scored_now) == (42, 40, 24)
    run(source, source.with_name("whole.csv"))
    assert unfinished.read_bytes() == source.with_name("whole.csv").read_bytes()
    records = {"scores.csv.job.json", "whole.csv.job.json"}
    assert names(source.parent) == {"prompts.txt", "scores.csv", "whole.csv", *records}


def test_resume_without_a_journal_starts_from_the_beginning_or_is_finished(source: Path) -> None:
    output = source.with_name("out.csv")
    first = run(source, output, resume=True)
    before = output.stat()
    again = run(source, output, resume=True, score=lambda _: pytest.fail("scored"))
    assert (first.scored_now, first.finished) == (40, False)
    assert again == replace(first, scored_now=0, finished=True)
    assert output.stat() == before
    output.unlink()
    assert run(source, output, resume=True).scored_now == 40


def test_a_finished_output_of_another_job_is_refused(source: Path) -> None:
    output = source.with_name("out.csv")
    run(source, output)
    content = output.read_bytes()
    for options, words in (
        ({"engine_key": "other"}, "another engine, calibration, threshold, provider or precision: replace it"),
        ({"shard": Shard(1, 2)}, "another shard and another choice of columns"),
    ):
        with pytest.raises(InputError, match=words):
            score_file(fake, source, output, **{"engine_key": "k", "resume": True} | options)
    source.write_text(source.read_text() + "one more\n")
    with pytest.raises(InputError, match="is the output of a job with another input: replace it with --overwrite"):
        run(source, output, resume=True)
    assert output.read_bytes() == content
    assert run(source, output, resume=True, overwrite=True).rows == 43
    output.with_name("out.csv.job.json").unlink()
    with pytest.raises(InputError, match=r"is there, and out\.csv\.job\.json, which says how it was made, is not"):
        run(source, output, resume=True)
    output.with_name("out.csv.job.json").write_text("{}")
    with pytest.raises(InputError, match=r"job\.json does not say how an output was made: delete it, and score again"):
        run(source, output, resume=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, sqlite3.OperationalError])
def test_whatever_the_scorer_raises_passes_and_the_journal_stays(error: type[BaseException], source: Path) -> None:
    def score(_: list[str]) -> Scores:
        raise error

    output = source.with_name("out.csv")
    with pytest.raises(error):
        run(source, output, score=score)
    assert names(source.parent) == {"prompts.txt", "out.csv.partial"}
    assert run(source, output, resume=True).scored_now == 40


def test_an_unfinished_job_is_not_discarded(unfinished: Path, source: Path) -> None:
    message = "scores.csv.partial holds the results of an unfinished job: go on from it with --resume, or delete it."
    with pytest.raises(InputError, match=re.escape(message)):
        run(source, unfinished)
    assert run(source, unfinished, resume=True).scored_now == 24


def test_deleting_the_journal_starts_over(unfinished: Path, source: Path) -> None:
    unfinished.with_name("scores.csv.partial").unlink()
    unfinished.with_name("scores.csv.partial-journal").write_bytes(b"of a killed job" * 99)
    assert run(source, unfinished).scored_now == 40
    assert names(source.parent) == {"prompts.txt", "scores.csv", "scores.csv.job.json"}


def test_a_journal_of_another_job_is_refused(unfinished: Path, source: Path) -> None:
    def resume(engine_key: str = "k") -> JobSummary:
        return score_file(fake, source, unfinished, engine_key=engine_key, resume=True)

    with pytest.raises(InputError, match=r"a job with another engine, calibration, threshold, provider or precision: "):
        resume("other")
    text = source.read_text()
    source.write_text(text + "one more\n")
    with pytest.raises(InputError, match=r"from a job with another input: run that job again with --resume"):
        resume()
    with pytest.raises(InputError, match=r"from a job with another input and another engine, calibration"):
        resume("other")
    source.write_text(text)
    with closing(sqlite3.connect(unfinished.with_name("scores.csv.partial"))) as db, db:
        db.execute("UPDATE header SET value = '0' WHERE key = 'format'")
    with pytest.raises(InputError, match=r"from a job with another version of memedge: "):
        resume()


@pytest.mark.parametrize("content", [b"no database", b"no database" * 999, None, "middle"])
def test_what_is_no_journal_is_refused(content: bytes | str | None, unfinished: Path, source: Path) -> None:
    journal = unfinished.with_name("scores.csv.partial")
    if isinstance(content, bytes):
        journal.write_bytes(content)
    elif content == "middle":
        whole = journal.read_bytes()
        journal.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    else:
        journal.unlink()
        with closing(sqlite3.connect(journal)) as db, db:
            db.execute("CREATE TABLE somebody_elses (x)")
    before = journal.read_bytes()
    with pytest.raises(InputError, match=r"\.partial is not a journal of this program or is damaged: delete it"):
        run(source, unfinished, resume=True)
    assert journal.read_bytes() == before
    assert not unfinished.exists()


def test_a_second_job_on_the_same_output_is_refused(source: Path) -> None:
    output = source.with_name("out.csv")
    refused: list[str] = []

    def second(phase: str = "scoring", *_: object) -> None:
        if phase != "scoring":
            return
        for resume in (False, True):
            with pytest.raises(InputError, match=r"is in use by another process that writes the same output") as caught:
                run(source, output, resume=resume, overwrite=True)
            refused.append(str(caught.value))

    run(source, output, progress=second, batch_size=30)
    assert len(refused) == 10  # before, between and after the batches
    code = f"{CHILD}\n"
    code += "score_file(lambda _: print('in', flush=True) or input(), "
    code += "Path(sys.argv[1]), Path(sys.argv[2]), engine_key='k', resume=False, overwrite=True)"
    command = [sys.executable, "-c", code, str(source), str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"in\n"
        second()
        child.kill()
    assert run(source, output, resume=True).scored_now == 40


def test_bad_places_are_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.csv" / "mine").touch()
    (tmp_path / "link.txt").symlink_to(source)
    before = names(tmp_path)
    for output, message in {
        tmp_path
        / "gone"
        / "out.csv": r"The folder of .*out\.csv does not exist: make it, or write the output elsewhere",
        source / "out.csv": r"The folder of .*out\.csv does not exist",
        tmp_path / "folder.csv": r"folder\.csv is a folder that memedge did not write: name another",
        tmp_path / "out.xls": r"out\.xls has an unknown file type",
        source: r"prompts\.txt is the input file too: name another file",
        tmp_path / "link.txt": r"link\.txt is the input file too",
        Path("/proc/out.csv"): r"/proc.* cannot be written",  # to root too
    }.items():
        with pytest.raises(InputError, match=message):
            run(source, output, score=lambda _: pytest.fail("scored"))
    with pytest.raises(InputError, match=r"gone\.txt does not exist"):
        run(tmp_path / "gone.txt", tmp_path / "out.csv")
    with pytest.raises(InputError, match=r"A batch of 0 prompts is impossible"):
        run(source, tmp_path / "out.csv", batch_size=0)
    assert names(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write in any folder")
def test_a_read_only_folder_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match=r"closed cannot be written to; change its permissions"):
        run(source, tmp_path / "closed" / "out.csv")


def test_a_bad_last_row_is_found_before_the_first_is_scored(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('"fine"\n' * 999 + '{"prompt": null}')
    with pytest.raises(InputError, match=r"line 1000, has a prompt that is null"):
        run(source, tmp_path / "out.csv", score=lambda _: pytest.fail("scored"))
    assert names(tmp_path) == {"in.jsonl"}


@pytest.mark.parametrize("change", ["another prompt\n", "prompt 3\n", ""])
def test_an_input_that_changes_meanwhile_gives_no_output(change: str, source: Path) -> None:
    output = source.with_name("out.csv")

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "scoring" and done == total:
            source.write_text(source.read_text() + change if change else "prompt 1\n")

    with pytest.raises(InputError, match=r"prompts\.txt changed while it was scored: delete .*out\.csv\.partial and"):
        run(source, output, progress=progress)
    assert names(source.parent) == {"prompts.txt", "out.csv.partial"}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A full disk, as far as one file can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.csv"
    source.write_text("".join(f"{number:01000}\n" for number in range(2000)))
    with largest_file(65536), pytest.raises(InputError, match=r"out\.csv\.partial cannot be written: make room"):
        run(source, output)
    assert names(tmp_path) == {"in.txt", "out.csv.partial"}
    with (
        largest_file(1_000_000),
        pytest.raises(InputError, match=r"out\.csv cannot be written \(.+\): make room, then run again with --resume"),
    ):
        run(source, output, resume=True)
    assert names(tmp_path) == {"in.txt", "out.csv.partial"}
    summary = run(source, output, resume=True)
    assert (summary.rows, summary.unique, summary.scored_now) == (2000, 2000, 0)
    assert names(tmp_path) == {"in.txt", "out.csv", "out.csv.job.json"}


class KillableJob:
    """A job in a child process that can be killed at a chosen moment and is always resumed."""

    def __init__(self, folder: Path, suffix: str):
        self.source = folder / "in.jsonl"
        self.output = folder / f"out{suffix}"
        self.log = folder / "log"
        values = [f"prompt\n{number}" for number in [*range(50), *range(0, 50, 7)]]
        self.source.write_text("\n".join(map(json.dumps, values)))
        ids, _ = HELPERS["tokenize"](values)
        hashes = [hashlib.sha256(value.encode()).hexdigest() for value in values]
        self.hash_of = {ids_key(one): hash for one, hash in zip(ids, hashes, strict=True)}
        self.distinct = set(hashes)

    def run(self, moment: str) -> subprocess.CompletedProcess[str]:
        paths = [str(path) for path in (self.source, self.output, self.log)]
        return subprocess.run(
            [sys.executable, "-c", KILLED, *paths, moment], capture_output=True, text=True, check=False
        )

    def scored(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    def committed(self) -> set[str]:
        """Read from a copy: opening the journal itself would repair it before the job gets to."""
        with TemporaryDirectory() as folder:
            for path in self.output.parent.glob("*.partial*"):
                shutil.copy(path, folder)
            with closing(sqlite3.connect(Path(folder, f"{self.output.name}.partial"))) as db:
                if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'results'").fetchone():
                    return set()
                return {self.hash_of[key] for (key,) in db.execute("SELECT prompt FROM results")}

    def kill(self, moment: str) -> None:
        """Runs until `moment`; what was committed before must not be scored again."""
        done, before = self.committed(), len(self.scored())
        child = self.run(moment)
        assert child.returncode == -signal.SIGKILL, child.stderr
        assert not done & set(self.scored()[before:])
        assert done <= self.committed() or self.output.exists()

    def finish(self, expected: bytes) -> None:
        """Runs to the end, and checks all the runs together."""
        done, before, existed = self.committed(), len(self.scored()), self.output.exists()
        child = self.run("never")
        assert child.returncode == 0, child.stderr
        assert self.output.read_bytes() == expected
        if done or not existed:  # else the kill came after the job had ended
            assert set(self.scored()[before:]) == self.distinct - done
        assert len(self.scored()[before:]) == len(set(self.scored()[before:]))
        record = f"{self.output.name}.job.json"
        assert names(self.output.parent) == {self.source.name, self.output.name, record, self.log.name}


@pytest.mark.parametrize("suffix", [".csv", pytest.param(".parquet", marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_and_resume_give_the_same_file(suffix: str, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="parquet files need pyarrow, from the extra eval")
    (tmp_path / "whole").mkdir()
    whole = KillableJob(tmp_path / "whole", suffix)
    events = int(whole.run("never").stdout)
    choose = random.Random(suffix)
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        job = KillableJob(folder, suffix)
        for moment in sorted(choose.randrange(1, events // 2) for _ in range(attempt % 2 + 1)):
            job.kill(str(moment))
        job.finish(whole.output.read_bytes())


@pytest.mark.parametrize(
    "moment",
    [
        "call _create",
        "return _create",  # the tables are made but not committed
        "call score",
        "call put",
        "c_call __exit__",
        "return put",
        "call write_scores",
        "return write_scores",
        "return sync",
        "call note",
        "call complete",
        "return replace",  # the output is there, and so is the journal
        "return delete",
        "return unlink",
    ],
)
def test_a_kill_at_a_telling_moment_and_resume_give_the_same_file(moment: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, job = KillableJob(tmp_path / "whole", ".csv"), KillableJob(tmp_path / "killed", ".csv")
    whole.run("never")
    job.kill(moment)
    job.finish(whole.output.read_bytes())


def lose_parts(folder: Path) -> list[bytes]:
    """Delete the second part and cut the fourth; return what all of them held."""
    paths = sorted(folder.glob("part-*"))
    contents = [path.read_bytes() for path in paths]
    paths[1].unlink()
    paths[3].write_bytes(contents[3][:-5])
    return contents


def test_parts_that_are_gone_are_scored_again(source: Path) -> None:
    """They alone, and once; also where that is interrupted, and where the journal's end was cut off before."""
    folder = source.with_name("parts")
    scored: list[str] = []

    def score(prompts: list[str]) -> Scores:
        scored.extend(prompts)
        return fake(prompts)

    def job(limit: int = 99, **options: Any) -> JobSummary:
        def limited(prompts: list[str]) -> Scores:
            if len(scored) >= limit:
                raise KeyboardInterrupt
            return score(prompts)

        return run(source, folder, resume=True, score=limited, part_rows=10, batch_size=5, **options)

    job()
    contents = lose_parts(folder)
    scored.clear()
    with pytest.raises(KeyboardInterrupt):
        job(limit=5)
    assert names(source.parent) == {"prompts.txt", "parts", "parts.partial"}
    told: list[object] = []
    assert job(each=told.append).scored_now == 15 and told == []  # of some rows a tally would be wrong
    assert scored == [f"prompt {i}" for i in [*range(10, 20), *range(30, 40)]]
    assert [path.read_bytes() for path in sorted(folder.glob("part-*"))] == contents
    assert names(source.parent) == {"prompts.txt", "parts"}
    header = {"input": HELPERS["digest"](source), "engine": "k", "shard": "all"}
    Journal(source.with_name("parts.partial"), header, resume=False).close()  # as a kill before its end leaves it
    assert job().finished and names(source.parent) == {"prompts.txt", "parts"}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    """Held in memory, these 200 000 prompts would take 70 MB and more."""
    code = (
        CHILD
        + """
def peak():  # of this process alone, unlike getrusage's
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024
folder = Path(sys.argv[1])
with open(folder / "in.txt", "w") as file:
    for number in range(200_000):
        file.write(f"{number:0300}\\n")
before = peak()
score_file(fake, folder / "in.txt", folder / "out.csv", engine_key="k", resume=False, batch_size=2000)
print(peak() - before)
"""
    )
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 30  # MiB
    with (tmp_path / "out.csv").open() as file:
        assert sum(1 for _ in file) == 200_001


@pytest.mark.parametrize("name", ["out.csv.partial", "out.csv.partial-journal"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_a_journal_that_is_no_plain_file_is_refused(name: str, kind: str, source: Path, tmp_path: Path) -> None:
    """SQLite would write through a link, to wherever it leads."""
    place, target = source.parent / name, tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        if kind == "link":
            target.write_text("mine")
        place.symlink_to(target)
    with pytest.raises(InputError, match=re.escape(f"{name} is no plain file, which a journal has to be")):
        Journal(source.parent / "out.csv.partial", {"input": "0", "engine": "k", "shard": "all"}, resume=True)
    assert kind == "pipe" or kind == "folder" or target.exists() == (kind == "link")
    assert kind != "link" or target.read_text() == "mine"


def test_places_that_cannot_be(source: Path, tmp_path: Path) -> None:
    loop = tmp_path / "loop.csv"
    loop.symlink_to(loop)
    for output, words in (
        (loop, "cannot be written to"),
        (loop / "out.csv", "cannot be written to"),
        (tmp_path / f"{'n' * 300}.csv", "cannot be written to (File name too long)"),
        (tmp_path / f"{'n' * 245}.csv", "is too long for files beside it: use 232 bytes at most"),
        (tmp_path / "a\0b.csv", "cannot be written to"),
    ):
        with pytest.raises(InputError, match=re.escape(words)) as caught:
            Output.at(output).check([source], overwrite=False)
        assert str(caught.value).endswith(".")
