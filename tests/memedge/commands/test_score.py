"""`memedge score`: every format, after a kill, and one sentence for every mistake."""

import csv
import gzip
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import fails, memedge, memedge_process

from memedge.commands.optional_value import _with_value

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
    assert {p.name for p in tmp_path.iterdir()} == {"in.csv", output.name, f"{output.name}.job.json"}


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


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def corpus(tmp_path):
    """Forty rows of a hive of two parquet files, with repeats."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    prompts = ["the left luggage sign", *(f"prompt {i % 25}" for i in range(39))]
    for part, lang in enumerate(("de", "en")):
        folder = tmp_path / "corpus" / f"lang={lang}"
        folder.mkdir(parents=True)
        rows = range(20 * part, 20 * part + 20)
        table = pa.table({"Caption": [prompts[i] for i in rows], "id": list(rows), "w": [i / 8 for i in rows]})
        pq.write_table(table, folder / "part.parquet")
    return tmp_path / "corpus"


def test_a_folder_in_and_a_folder_out(corpus, tmp_path, detector):
    output = tmp_path / "scores"
    command = ("score", corpus, "-o", f"{output}/", "--id-column", "id", "--format", "jsonl", *CPU)
    done, threshold = memedge(*command), f"threshold {detector.info.rule.threshold:.4g}"
    assert done.returncode == 0 and f"1 memorized ({threshold}), 0 truncated." in done.stderr
    rows = lines(output / "part-00001.jsonl")
    assert list(rows[0]) == ["id", "prompt", "norm", "alignment", "score", "memorized", "truncated", "lang", "w"]
    assert [row["id"] for row in rows] == list(range(40)) and {row["lang"] for row in rows} == {"de", "en"}
    assert [row["w"] for row in rows] == [i / 8 for i in range(40)]
    expected = detector.score([row["prompt"] for row in rows])
    np.testing.assert_allclose([row["norm"] for row in rows], expected.norm, rtol=1e-4)
    fails(memedge(*command), "scores is there already: replace it with --overwrite, or name another output.")
    again = memedge(*command, "--resume")
    assert again.returncode == 0 and "26 different prompts, finished before, nothing to do" in again.stderr
    (output / "part-00001.jsonl").unlink()
    report = tmp_path / "report.html"
    mended = memedge(*command, "--resume", "--json", "--report", report)
    assert "1 of 40 rows" in report.read_text()
    assert json.loads(mended.stdout)["scored_now"] == 26 and lines(output / "part-00001.jsonl") == rows
    fails(memedge(*command, "--resume", "--keep", "w"), "is the output of a job with another choice of columns")
    done = memedge(*command, "--overwrite", "--keep", "none")
    assert done.returncode == 0 and "w" not in lines(output / "part-00001.jsonl")[0]


def test_shards_by_workers_merge_to_one_file(corpus, tmp_path):
    whole, report = tmp_path / "whole.csv", tmp_path / "report.html"
    assert memedge("score", corpus, "-o", whole, "--report", report, *CPU).returncode == 0
    assert "the left luggage sign" in report.read_text()
    parts = [tmp_path / f"{i}.csv" for i in (1, 2)]
    for i, part in enumerate(parts, start=1):
        workers = ("--workers", "2") if i == 1 else ()
        done = memedge("score", f"{corpus}/**/*.parquet", "-o", part, "--shard", f"{i}/2", *workers, *CPU)
        assert done.returncode == 0, done.stderr
    merged, report = tmp_path / "merged.csv", tmp_path / "merged.html"
    done = memedge("merge", *parts, "-o", merged, "--report", report)
    assert done.returncode == 0 and "40 rows, " in done.stderr and "2 shards merged" in done.stderr
    assert "the left luggage sign" in report.read_text()
    with whole.open() as a, merged.open() as b:
        one, other = list(csv.DictReader(a)), list(csv.DictReader(b))
    for left, right in zip(one, other, strict=True):
        assert [left[name] for name in ("prompt", "id", "w", "memorized")] == [
            right[name] for name in ("prompt", "id", "w", "memorized")
        ]
        assert float(left["norm"]) == pytest.approx(float(right["norm"]), rel=1e-4, abs=1e-4)
    top = memedge_process("merge", *parts, "-o", "-", "--top", "1")
    assert json.loads(top.stdout)["prompt"] == "the left luggage sign"


@pytest.mark.slow
def test_the_commands_of_the_page(corpus):
    """docs/scale.md: each as it stands there, one after the other."""
    page = Path(__file__).parents[3] / "docs" / "scale.md"
    _, _, rest = page.read_text().partition("```sh\n")
    commands = [shlex.split(line, comments=True) for line in rest.partition("```")[0].splitlines()]
    assert [command[1] for command in commands] == ["score"] * 5 + ["merge"]
    for _, *arguments in commands:
        done = memedge(*arguments, cwd=corpus.parent)
        assert done.returncode == 0, f"{arguments}\n{done.stderr}"
    assert {path.name for path in corpus.parent.iterdir()} >= {"scores", "top.csv", "all.html", "whole.parquet"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--ray", "--ray local"),
        ("--ray p.txt -o x", "--ray local p.txt -o x"),
        ("p.txt --ray -o x", "p.txt --ray local -o x"),
        ("--ray auto p.txt", "--ray auto p.txt"),
        ("--ray head.cluster-1:6379 -o x", "--ray head.cluster-1:6379 -o x"),
        ("--ray [fe80::1]:6379", "--ray [fe80::1]:6379"),
        ("--ray ray://head:10001", "--ray ray://head:10001"),
        ("--ray=auto p.txt", "--ray=auto p.txt"),
    ],
)
def test_an_address_may_be_left_out(line, expected):
    assert list(_with_value(line.split())) == expected.split()


def test_streams():
    """From stdin to stdout, in a process: the streams are what is tested."""
    line = [sys.executable, "-m", "memedge", "score", "-", "-o", "-", "--sort", "score", "--format", "tsv", *CPU]
    done = subprocess.run(line, cwd="/", input=b"a star\nthe left luggage sign\n", capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.decode().splitlines(), delimiter="\t"))
    assert [row["prompt"] for row in rows] == ["the left luggage sign", "a star"]
    assert b"stdout: 2 rows, 2 different prompts" in done.stderr
    line[-4:] = ["--input-format", "jsonl", *CPU]
    done = subprocess.run(line[:7] + line[-4:], cwd="/", input=b'{"text": "a star", "n": 1}\n', capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 1


def test_mistakes(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "no-column.csv").write_text("words\na star\n")
    (tmp_path / "columns.csv").write_text("prompt,norm,note\na star,1,x\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "good.txt").write_text("a star\n")
    out = tmp_path / "out.csv"
    before = set(tmp_path.iterdir())
    for arguments, words in [
        ((tmp_path / "absent.txt", "-o", out), "absent.txt"),
        ((tmp_path / "empty.txt", "-o", out), "empty.txt"),
        ((tmp_path / "no-column.csv", "-o", out), "only 'words': name the one with the prompts by --column."),
        ((tmp_path / "no-column.csv", "-o", out, "--column", "text"), "no column 'text', only 'words': name the one"),
        ((tmp_path / "columns.csv", "-o", out), "has a column 'norm', which is the name of one of the output's"),
        (
            (tmp_path / "columns.csv", "-o", out, "--keep", "tone"),
            "has no column 'tone' to keep, but 'prompt', 'norm',",
        ),
        ((tmp_path / "columns.csv", "-o", out, "--keep", "prompt"), "is in the output anyway: leave it out of --keep."),
        ((tmp_path / "columns.csv", "-o", out, "--keep", "note", "--id-column", "id"), "has no column 'id' to keep"),
        ((tmp_path / "good.txt", "-o", out, "--keep", "note"), "is plain text, which has no columns: leave out"),
        ((tmp_path / "good.txt", tmp_path / "columns.csv", "-o", out), "are of different formats: score those of each"),
        ((tmp_path / "good.txt", "-", "-o", out), "Standard input and files cannot be scored together"),
        ((tmp_path / "good.txt", "-o", out, "--input-format", "csv"), "--input-format is of standard input: leave it"),
        (
            (tmp_path / "good.txt", "-o", out, "--format", "jsonl"),
            "out.csv is no name of a jsonl file: end it",
        ),
        ((tmp_path / "good.txt", "-o", tmp_path / "out", "--format", "csv"), "A folder's parts cannot be csv: use"),
        ((tmp_path / "good.txt", "-o", "-", "--resume"), "What goes to stdout cannot be gone on with: name a file"),
        ((tmp_path / "good.txt", "-o", "-", "--json"), "cannot both go to stdout: name a file, or leave out --json."),
        ((tmp_path / "good.txt", "-o", out, "--shard", "3/2"), "3/2 is no shard: give I/N with I from 1 to N"),
        (
            (tmp_path / "good.txt", "-o", out, "--shard", "1/2", "--top", "3"),
            "Shards keep the input's order for",
        ),
        ((tmp_path / "good.txt", "-o", tmp_path / "s.txt", "--shard", "1/2"), "A shard in .txt cannot be merged"),
        ((tmp_path / "good.txt", "-o", out, "--report", "r.pdf"), "name a file that ends in .html"),
        ((tmp_path / "*.none", "-o", out), "No file matches"),
        ((tmp_path / "good.txt", "-o", out, "--ray", "--workers", "2"), "--ray has its own: leave one of them out."),
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


@pytest.mark.slow
def test_the_lines_of_the_page_run(tmp_path):
    """As they stand in docs/commands.md, in a shell."""
    page = (Path(__file__).parents[3] / "docs/commands.md").read_text()
    lines = next(block for block in re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)).splitlines()
    assert len(lines) == 8
    (tmp_path / "captions.csv").write_text("id,caption,n\n7,a star,1\n8,a house,2\n")
    for number in range(12):
        folder = tmp_path / "corpus" / f"lang={number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        with gzip.open(folder / f"{number}.jsonl.gz", "wt") as file:
            file.write(f'{{"text": "a star {number}"}}\n')
    program = f'memedge() {{ "{sys.executable}" -P -m memedge.cli "$@" --provider cpu; }}\n'
    said = []
    for line in lines:
        done = subprocess.run(["bash", "-c", program + line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        said.append(done.stderr)
    assert "finished before, nothing to do" in said[4]
    names = ["prompt", "norm", "alignment", "score", "memorized", "truncated"]
    for name, back, rows in (("scores.csv", ["id", "n"], 2), ("worst.csv", ["lang"], 10)):
        with (tmp_path / name).open(newline="") as file:
            header, *found = csv.reader(file)
        assert (header, len(found)) == ([*names, *back], rows)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "scores.csv").read_bytes()
    first = json.loads((tmp_path / "ids.jsonl").read_text().splitlines()[0])
    assert list(first) == ["id", *names]
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"_job.json", "part-00001.jsonl"}
