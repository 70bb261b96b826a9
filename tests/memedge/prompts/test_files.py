"""Prompt files in and score files out: round trips of arbitrary prompts, and every error a file can cause."""

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge.engine.errors import InputError
from memedge.prompts.cells import unguarded
from memedge.prompts.files import LONGEST_LINE, LONGEST_PROMPT, PARQUET_BATCH, read_prompts
from memedge.prompts.kinds import file_kind
from memedge.scoring.score_files import ROW_GROUP, Layout, OutputRow, ScoreRow, write_scores

COLUMNS = ["prompt", "norm", "alignment", "score", "memorized", "truncated"]
NASTY = [
    "",
    " ",
    ",",
    '"',
    '""',
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\\",
    "\\n",
    "\u2028",
    "\x85",
    "猫",
    "🐈",
    "=1+1",
    "'=1+1",
    "''",
    " \t@x",
    "-x",
    "null",
]

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0")) | st.sampled_from(NASTY)
relaxed = settings(deadline=None)  # a busy machine is no failure
prompts = st.lists(texts, min_size=1, max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)
calibrated_rows = st.lists(
    st.builds(ScoreRow, texts, finite, finite, finite, st.booleans(), st.booleans(), st.none(), st.none()),
    min_size=1,
    max_size=8,
)
lacking = finite | st.none()
reasons = st.sampled_from(["score -11.44 ≥ threshold -16.22", 'screened: a "read-out", and a cut'])
early_rows = st.lists(
    st.builds(ScoreRow, texts, lacking, lacking, lacking, st.booleans(), st.booleans(), finite, reasons),
    min_size=1,
    max_size=8,
)
uncalibrated_rows = calibrated_rows.map(lambda rows: [row._replace(score=None, memorized=None) for row in rows])


def pyarrow_modules() -> tuple[Any, Any]:
    reason = "parquet files need pyarrow, from the extra eval"
    return pytest.importorskip("pyarrow", reason=reason), pytest.importorskip("pyarrow.parquet", reason=reason)


def read_back(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return list(read_prompts(path))


@relaxed
@given(prompts, st.sampled_from(["utf-8", "utf-8-sig"]), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_txt_gives_the_lines_back(values: list[str], encoding: str, end: str, last_end: bool) -> None:
    lines = [value.replace("\n", "").replace("\r", "").lstrip("\ufeff") for value in values]
    text = end.join(lines) + end * last_end
    with TemporaryDirectory() as folder:
        path = Path(folder, "p.txt")
        if any(lines):
            assert read_back(path, text.encode(encoding)) == [line for line in lines if line]
        else:
            with pytest.raises(InputError, match="holds no prompts"):
                read_back(path, text.encode(encoding))


@relaxed
@given(prompts, st.sampled_from(["utf-8", "utf-8-sig"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_csv_gives_the_cells_back(values: list[str], encoding: str, quoting: Any) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "p.csv")
        for header in (["prompt"], ["id", "prompt", "note"]):
            with path.open("w", encoding=encoding, newline="") as file:
                writer = csv.writer(file, quoting=quoting)
                writer.writerow(header)
                writer.writerows([[{"prompt": value}.get(name, "x") for name in header] for value in values])
            assert list(read_prompts(path)) == values


@relaxed
@given(prompts, st.sampled_from(["utf-8", "utf-8-sig"]), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_jsonl_gives_objects_and_bare_strings_back(values: list[str], encoding: str, ascii: bool, end: str) -> None:
    items = [value if number % 2 else {"id": number, "prompt": value} for number, value in enumerate(values)]
    text = end.join(json.dumps(item, ensure_ascii=ascii) for item in items)
    with TemporaryDirectory() as folder:
        assert read_back(Path(folder, "p.jsonl"), text.encode(encoding)) == values


@relaxed
@given(prompts, st.sampled_from(["string", "large_string", "string_view", "dictionary"]))
def test_parquet_gives_strings_of_every_kind_back(values: list[str], kind: str) -> None:
    pyarrow, parquet = pyarrow_modules()
    column = pyarrow.array(values, pyarrow.string())
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    with TemporaryDirectory() as folder:
        path = Path(folder, "p.parquet")
        parquet.write_table(pyarrow.table({"id": list(range(len(values))), "prompt": column}), path)
        assert list(read_prompts(path)) == values


def test_parquet_batches_follow_each_other(tmp_path: Path) -> None:
    pyarrow, parquet = pyarrow_modules()
    values = [f"prompt {number}" for number in range(2 * PARQUET_BATCH + 7)]
    parquet.write_table(pyarrow.table({"prompt": values}), tmp_path / "p.parquet", row_group_size=999)
    assert list(read_prompts(tmp_path / "p.parquet")) == values


def test_multiline_cells_and_empty_lines_of_csv(tmp_path: Path) -> None:
    content = b'\nprompt,n\r\n"a\r\nb",1\r\n\r\n,2\r\n"say ""cheese""",3'
    assert read_back(tmp_path / "P.CSV", content) == ["a\r\nb", "", 'say "cheese"']


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "unknown suffix": (
        "p.xls",
        b"a",
        "p.xls has an unknown file type: use a name that ends in .txt, .csv, .tsv, .jsonl or .parquet; text may",
    ),
    "empty txt": ("p.txt", b"", "p.txt holds no prompts"),
    "empty lines": ("p.txt", b"\xef\xbb\xbf\n\r\n", "p.txt holds no prompts"),
    "empty csv": ("p.csv", b"", "p.csv holds no prompts"),
    "header only": ("p.csv", b"prompt\n", "p.csv holds no prompts"),
    "empty jsonl": ("p.jsonl", b"\n", "p.jsonl holds no prompts"),
    "latin-1": ("p.txt", b"ok\ncaf\xe9\n", "p.txt, line 2, is not valid UTF-8: save the file as UTF-8."),
    "utf-16": ("p.csv", "prompt".encode("utf-16"), "p.csv, line 1, holds a NUL character, as text in UTF-16 does"),
    "bad byte in a cell": ("p.csv", b'prompt\n"a\n\xff"\n', "p.csv, line 3, is not valid UTF-8"),
    "encoded surrogate": ("p.jsonl", b'"\xed\xa0\x80"', "p.jsonl, line 1, is not valid UTF-8"),
    "endless line": ("p.jsonl", b" " * (LONGEST_LINE + 1), f"p.jsonl, line 1, is longer than {LONGEST_LINE} bytes"),
    "no column": (
        "p.csv",
        b"text;prompt,x\n",
        "p.csv has no column 'prompt', 'caption' or 'text', only 'text;prompt', 'x'",
    ),
    "column twice": (
        "p.csv",
        b"prompt,prompt\na,b\n",
        "p.csv has 2 columns of the same name, 'prompt', 'prompt': call one of them",
    ),
    "many columns": ("p.csv", b"a," * 999 + b"z\n", ", 'a', 'a', ...: call one of them 'prompt'."),
    "bare comma": (
        "p.csv",
        b'prompt\n"a\nb"\na cat, a dog\n',
        "p.csv, line 4, has 2 cells where the header has 1",
    ),
    "missing cell": ("p.csv", b"id,prompt\n1\n", "p.csv, line 2, has 1 cells where the header has 2"),
    "open quote": ("p.csv", b'prompt\na\n"b\nc\n', "p.csv, line 3, is broken CSV (unexpected end of data)"),
    "text after quote": ("p.csv", b'prompt\n"a"b\n', "p.csv, line 2, is broken CSV ("),
    "text after quote, tabs": ("p.tsv", b'prompt\n"a"b\n', "p.tsv, line 2, is broken TSV ('tab' expected after "),
    "broken header": ("p.csv", b'"prompt"x\n', "p.csv, line 1, is broken CSV ("),
    "huge cell": (
        "p.csv",
        b"prompt,id\n" + b"a" * (LONGEST_PROMPT + 1) + b",1\n",
        f"p.csv, line 2, has a cell of more than {LONGEST_PROMPT} characters: shorten it.",
    ),
    "huge cell by an open quote": (
        "p.csv",
        b'prompt\na\n"' + b"a\n" * LONGEST_PROMPT,
        "p.csv, line 3, is broken CSV (field larger than field limit (131072)): check the double quotes.",
    ),
    "CR in txt": ("p.txt", b"a\rb\r", "p.txt, line 1, has a carriage return that ends no line here: end lines in LF"),
    "CR twice": ("p.txt", b"a\r\r\nb\r\r\n", "p.txt, line 1, has a carriage return that ends no line here"),
    "CR in csv": ("p.csv", b"prompt\ra\rb\r", "p.csv, line 1, has a carriage return that ends no line here"),
    "CR in jsonl": ("p.jsonl", b'"a"\r"b"\r', "p.jsonl, line 1, has a carriage return that ends no line here"),
    "utf-16 without a mark": ("p.txt", "a cat\n".encode("utf-16-le"), "p.txt, line 1, holds a NUL character, as text"),
    "utf-16, big end first": ("p.csv", "prompt\na\n".encode("utf-16-be"), "p.csv, line 1, holds a NUL character"),
    "utf-32 without a mark": ("p.jsonl", '"a"\n'.encode("utf-32-le"), "p.jsonl, line 1, holds a NUL character"),
    "utf-16, no Latin letter": ("p.txt", "\u4e3a\n\u4e3a".encode("utf-16-be"), "p.txt, line 1, "),
    "NUL in a cell": ("p.csv", b'prompt\n"a\0"\n', "p.csv, line 2, holds a NUL character"),
    "NUL in JSON": ("p.jsonl", b'"a\\u0000"', "p.jsonl, line 1, has a prompt with a NUL character, which is no text"),
    "joined files": ("p.txt", b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", "p.txt, line 2, begins with a byte order mark"),
    "huge prompt": (
        "p.txt",
        b"a" * (LONGEST_PROMPT + 1),
        f"line 1, has a prompt of more than {LONGEST_PROMPT} characters",
    ),
    "broken JSON": ("p.jsonl", b'"a"\n\n{"prompt": "b"\n', "p.jsonl, line 3, is broken JSON (Expecting ',' delimiter)"),
    "deep JSON": ("p.jsonl", b"[" * 100_000, "p.jsonl, line 1, is broken JSON (nested too deeply"),
    "endless number": ("p.jsonl", b"1" * 9999, "p.jsonl, line 1, is broken JSON (nested too deeply or a number too"),
    "no key": (
        "p.jsonl",
        b'{"words": "a", "id": 1}',
        "p.jsonl, line 1, has no column 'prompt', 'caption' or 'text', only 'words', 'id': call one of them 'prompt'.",
    ),
    "no key at all": ("p.jsonl", b"{}", "p.jsonl, line 1, has no column 'prompt', 'caption' or 'text', only none"),
    "null": ("p.jsonl", b'{"prompt": null}', "p.jsonl, line 1, has a prompt that is null: make every prompt a string."),
    "number": ("p.jsonl", b'"a"\n7', "p.jsonl, line 2, has a prompt that is of type int: make every prompt a string."),
    "list": ("p.jsonl", b'{"prompt": ["a"]}', "p.jsonl, line 1, has a prompt that is of type list"),
    "lone surrogate": ("p.jsonl", b'"\\ud83d"', "p.jsonl, line 1, has half a surrogate pair"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    file, content, message = BROKEN[name]
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_back(tmp_path / file, content)
    assert str(tmp_path / file) in str(caught.value)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_places_that_are_no_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.csv does not exist"):
        list(read_prompts(tmp_path / "gone.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match=r"folder\.csv is a directory"):
        list(read_prompts(tmp_path / "folder.csv"))
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    with pytest.raises(InputError, match=r"loop\.csv cannot be read \(Too many levels of symbolic links\): check"):
        list(read_prompts(tmp_path / "loop.csv"))
    with pytest.raises(InputError, match=r"cannot be read \(File name too long\): check the name"):
        list(read_prompts(tmp_path / f"{'n' * 300}.csv"))
    with pytest.raises(InputError, match=r"cannot be read \(embedded null byte\): check the name"):
        list(read_prompts(tmp_path / "a\0b.csv"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"p\.csv does not exist"):
        list(read_prompts(tmp_path / "file" / "p.csv"))
    (tmp_path / "device.csv").symlink_to("/dev/null")
    with pytest.raises(InputError, match=r"device\.csv is a pipe or device"):
        list(read_prompts(tmp_path / "device.csv"))


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_text("a")

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)  # not by file mode: root may read anything
    with pytest.raises(InputError, match=r"p\.txt cannot be read \(Permission denied\)"):
        list(read_prompts(tmp_path / "p.txt"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda pa: pa.table({"words": ["a"], "id": [1]}),
            "'caption' or 'text', only 'words', 'id': call one",
        ),
        (lambda pa: pa.table({"prompt": [1, 2]}), "has int64 in its column 'prompt': make every prompt a string."),
        (lambda pa: pa.table({"prompt": [["a"]]}), "has list<"),
        (lambda pa: pa.table({"prompt": [None]}), "has null in its column 'prompt'"),
        (lambda pa: pa.table({"prompt": [b"a"]}), "has binary in its column 'prompt'"),
        (lambda pa: pa.table({"prompt": [{"a": "b"}]}), "has struct<"),
        (lambda pa: pa.table({"prompt": pa.array(["1"]).cast(pa.int32()).dictionary_encode()}), "has int32"),
        (lambda pa: pa.table({"prompt": pa.array([None, None], pa.timestamp("s"))}), "has timestamp["),
        (lambda pa: pa.table({"prompt": ["a\0b"]}), "row 1, has a prompt with a NUL character"),
        (lambda pa: pa.table([["a"], ["b"]], names=["prompt", "prompt"]), "has 2 columns of the same name"),
        (lambda pa: pa.table({"prompt": ["a", "b", None]}), "row 3, has a prompt that is null"),
        (lambda pa: pa.table({"prompt": pa.array([], pa.string())}), "holds no prompts"),
        (
            lambda pa: pa.table({"prompt": pa.array([b"\xff"]).view(pa.string())}),
            "has text after row 0 that is not valid UTF-8",
        ),
    ],
)
def test_a_parquet_file_without_prompts_is_refused(make: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    pyarrow, parquet = pyarrow_modules()
    parquet.write_table(make(pyarrow), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        list(read_prompts(tmp_path / "p.parquet"))
    assert str(tmp_path / "p.parquet") in str(caught.value)


@relaxed
@given(st.data())
def test_a_damaged_parquet_file_never_surprises(data: st.DataObject) -> None:
    pyarrow, parquet = pyarrow_modules()
    with TemporaryDirectory() as folder:
        path = Path(folder, "p.parquet")
        parquet.write_table(pyarrow.table({"prompt": ["a cat", "a dog"] * 9}), path)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            assert all(isinstance(prompt, str) for prompt in read_prompts(path))
        except InputError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("content", [b"", b"prompt\na\n"])
def test_something_else_is_no_parquet_file(content: bytes, tmp_path: Path) -> None:
    pyarrow_modules()
    with pytest.raises(InputError, match=r"p\.parquet is not a \.parquet file or is damaged"):
        read_back(tmp_path / "p.parquet", content)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=re.escape("pip install 'memedge[eval]'")):
        file_kind(tmp_path / "p.parquet")


def write(path: Path, rows: list[ScoreRow]) -> None:
    numbered = (OutputRow(number, row, {}) for number, row in enumerate(rows, start=1))
    assert write_scores(path, file_kind(path), Layout(early=any(row.reason for row in rows)), numbered) == len(rows)


def parse(path: Path) -> list[ScoreRow]:
    """Reads a score file as its users would: with the standard library's readers."""
    kind = file_kind(path)
    content = path.read_bytes()
    if kind.compression == "gzip":
        content = gzip.decompress(content)
    elif kind.compression:
        content = pyarrow_modules()[0].CompressedInputStream(path, "zstd").read()
    match kind.format:
        case "parquet":
            _, parquet = pyarrow_modules()
            table = parquet.read_table(path)
            kinds = ["string", *["double"] * 3, *["bool"] * 2, "double", "string"]
            assert [str(kind) for kind in table.schema.types] == kinds[: len(table.schema.types)]
            records = table.to_pylist()
        case "jsonl":
            records = [json.loads(line) for line in content.splitlines()]
        case "csv" | "tsv":
            text = io.StringIO(content.decode(), newline="")
            records = list(csv.DictReader(text, delimiter="\t" if kind.format == "tsv" else ",", strict=True))
            for record in records:
                record["prompt"] = unguarded(record["prompt"])
        case _:
            header, *lines = [line.split("\t") for line in content.decode().removesuffix("\n").split("\n")]
            records = [dict(zip(header, cells, strict=True)) for cells in lines]
            whole = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}
            for record in records:
                record["prompt"] = re.sub(r"\\.", lambda escape: whole[escape[0]], record["prompt"])
    assert all(list(record) in (COLUMNS, [*COLUMNS, "passes", "reason"]) for record in records)
    if kind.format in ("csv", "tsv", "txt"):
        truths = {"true": True, "false": False, "": None}
        for record in records:
            for name in ("norm", "alignment", "score", "passes"):
                if name in record:
                    record[name] = float(record[name]) if record[name] else None
            for name in ("memorized", "truncated"):
                record[name] = truths[record[name]]
    return [ScoreRow(**record) for record in records]


SUFFIXES = [".txt", ".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".jsonl.gz", ".jsonl.zst", ".tsv.zst", ".txt.gz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@relaxed
@given(rows=calibrated_rows | uncalibrated_rows | early_rows)
def test_a_score_file_reads_back_exactly(suffix: str, rows: list[ScoreRow]) -> None:
    if suffix == ".parquet":
        pyarrow_modules()
    with TemporaryDirectory() as folder:
        path = Path(folder, f"scores{suffix}")
        write(path, rows)
        assert [repr(row) for row in parse(path)] == [repr(row) for row in rows]  # repr: -0.0 is not 0.0
        if not suffix.startswith(".txt"):
            assert list(read_prompts(path)) == [row.prompt for row in rows]


def test_score_files_as_text(tmp_path: Path) -> None:
    rows = [ScoreRow("a, b\tc", 0.1, -1.0, 1e-9, True, False), ScoreRow("", 0.0, 0.0, None, None, True)]
    for suffix, text in {
        ".txt": "prompt\tnorm\talignment\tscore\tmemorized\ttruncated\n"
        "a, b\\tc\t0.1\t-1.0\t1e-09\ttrue\tfalse\n\t0.0\t0.0\t\t\ttrue\n",
        ".csv": "prompt,norm,alignment,score,memorized,truncated\r\n"
        '"a, b\tc",0.1,-1.0,1e-09,true,false\r\n,0.0,0.0,,,true\r\n',
        ".jsonl": '{"prompt": "a, b\\tc", "norm": 0.1, "alignment": -1.0, "score": 1e-09, "memorized": true, '
        '"truncated": false}\n{"prompt": "", "norm": 0.0, "alignment": 0.0, "score": null, "memorized": null, '
        '"truncated": true}\n',
    }.items():
        write(tmp_path / f"s{suffix}", rows)
        assert (tmp_path / f"s{suffix}").read_bytes() == text.encode()


def test_parquet_row_groups_follow_each_other(tmp_path: Path) -> None:
    pyarrow_modules()
    rows = [ScoreRow(str(number), float(number), 0.5, None, None, False) for number in range(ROW_GROUP + 3)]
    write(tmp_path / "s.parquet", rows)
    assert parse(tmp_path / "s.parquet") == rows


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl"])
def test_an_apostrophe_of_other_files_is_kept(name: str, tmp_path: Path) -> None:
    content = b"prompt\n'=1\n" if name == "p.csv" else b'{"prompt": "\'=1"}\n'
    assert read_back(tmp_path / name, content) == ["'=1"]


def test_an_existing_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("mine")
    with pytest.raises(FileExistsError):
        write(tmp_path / "s.csv", [])
    assert (tmp_path / "s.csv").read_text() == "mine"
