"""Columns that are kept, from every format to every format, against other readers: csv, json, gzip, pyarrow."""

import csv
import gzip
import io
import json
import re
import sys
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge.engine.errors import InputError
from memedge.prompts.columns import Columns
from memedge.prompts.corpus import Corpus
from memedge.prompts.inputs import find_files
from memedge.prompts.kinds import file_kind
from memedge.scoring.score_files import Layout, OutputRow, ScoreRow, write_scores

INPUTS = [".csv", ".tsv.gz", ".csv.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]
OUTPUTS = [".csv", ".csv.gz", ".tsv", ".tsv.zst", ".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]
relaxed = settings(deadline=None, max_examples=25)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)
OURS = {"norm": 1.5, "alignment": -0.5, "score": None, "memorized": None, "truncated": False}


def arrow() -> tuple[Any, Any]:
    reason = "parquet files need pyarrow, from the extra eval"
    return pytest.importorskip("pyarrow", reason=reason), pytest.importorskip("pyarrow.parquet", reason=reason)


def score(source: Path, output: Path, kept: tuple[str, ...] | None = None, **layout: Any) -> None:
    """Write the output that a job over a file or a folder would."""
    corpus = Corpus(find_files([str(source)]), Columns(kept=kept))
    columns = Layout(corpus.inspect(lambda _: None).columns, **layout)
    columns.check(file_kind(output), str(source))
    rows = (
        OutputRow(number, ScoreRow(row.prompt, *OURS.values()), row.kept)  # type: ignore[arg-type]
        for number, row in enumerate(corpus.rows(), start=1)
    )
    write_scores(output, file_kind(output), columns, rows)


def pack(path: Path, content: bytes) -> None:
    if path.suffix == ".zst":
        with arrow()[0].CompressedOutputStream(path, "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def unpack(path: Path) -> bytes:
    if path.suffix == ".zst":
        with arrow()[0].CompressedInputStream(path, "zstd") as file:
            return bytes(file.read())
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of one set of columns, as others would."""
    if ".parquet" in path.name:
        pyarrow, parquet = arrow()
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ".jsonl" in path.name:
        pack(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if ".tsv" in path.name else ",")
        writer.writeheader()
        writer.writerows(rows)
        pack(path, text.getvalue().encode())


def read(path: Path) -> list[dict[str, Any]]:
    """Read rows as others would; cells are strings."""
    if ".parquet" in path.name:
        rows: list[dict[str, Any]] = arrow()[1].read_table(path).to_pylist()
        return rows
    content = unpack(path).decode()
    if ".jsonl" in path.name:
        return [json.loads(line) for line in content.removesuffix("\n").split("\n")]
    if ".txt" in path.name:
        whole = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}
        header, *lines = [
            [re.sub(r"\\.", lambda escape: whole[escape[0]], cell) for cell in line.split("\t")]
            for line in content.removesuffix("\n").split("\n")
        ]
        return [dict(zip(header, cells, strict=True)) for cells in lines]
    return list(csv.DictReader(io.StringIO(content, newline=""), delimiter="\t" if ".tsv" in path.name else ","))


@relaxed
@given(st.data(), st.sampled_from(INPUTS), st.sampled_from(OUTPUTS))
def test_strings_travel_from_every_format_to_every_format(data: st.DataObject, source: str, output: str) -> None:
    arrow()
    names = data.draw(st.lists(texts.filter(lambda t: t.lower() not in ("text", "row")), unique=True, max_size=3))
    rows = data.draw(
        st.lists(st.fixed_dictionaries({"prompt": st.just("a"), **dict.fromkeys(names, texts)}), min_size=1, max_size=4)
    )
    names = [name for name in rows[0] if name != "prompt"]
    with TemporaryDirectory() as folder:
        files = Path(folder, f"in{source}"), Path(folder, f"out{output}")
        write(files[0], rows)
        score(*files)
        found = read(files[1])
        assert [list(row) for row in found] == [["prompt", *OURS, *names]] * len(rows)
        assert [{name: row[name] for name in names} for row in found] == [
            {name: row[name] for name in names} for row in rows
        ]


def test_ids_stand_in_front_and_rows_before_them(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", [{"x": 1, "prompt": "a", "id": 7}])
    for output in (".csv", ".tsv", ".txt", ".jsonl", ".parquet"):
        for numbered, names in ((False, ["id", "prompt", *OURS, "x"]), (True, ["row", "id", "prompt", *OURS, "x"])):
            path = tmp_path / f"{numbered}{output}"
            score(tmp_path / "in.jsonl", path, id="id", numbered=numbered)
            assert list(read(path)[0]) == names
    with pytest.raises(InputError, match=r"in\.jsonl has no column 'id' of ids: correct --id-column\."):
        score(tmp_path / "in.jsonl", tmp_path / "x.csv", kept=("x",), id="id")


@pytest.mark.parametrize("name", ["norm", "alignment", "score", "memorized", "truncated", "prompt"])
@pytest.mark.parametrize("source", [".csv", ".jsonl", ".parquet"])
def test_a_kept_column_named_like_one_of_ours_is_refused(name: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / f"in{source}"
    write(path, [{"caption" if name == "prompt" else "prompt": "a", name: "1", "x": "2"}])
    corpus = Corpus(find_files([str(path)]), Columns("caption" if name == "prompt" else None, None))
    layout = Layout(corpus.inspect(lambda _: None).columns)
    with pytest.raises(InputError, match=f"has a column '{name}', which is the name of one of the output's: rename it"):
        layout.check(file_kind(path), str(path))


def test_row_is_a_name_of_ours_in_a_shard_only(tmp_path: Path) -> None:
    write(tmp_path / "in.csv", [{"prompt": "a", "row": "1"}])
    score(tmp_path / "in.csv", tmp_path / "out.csv")
    with pytest.raises(InputError, match=r"has a column 'row', which is the name of one of the output's"):
        score(tmp_path / "in.csv", tmp_path / "shard.csv", numbered=True)


def test_what_a_row_lacks(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "x": null}\n{"prompt": "b", "y": 1}\n"c"\n')
    for output, expected in (
        (".csv", [("", ""), ("", "1"), ("", "")]),
        (".txt", [("", ""), ("", "1"), ("", "")]),
        (".parquet", [(None, None), (None, 1), (None, None)]),
    ):
        score(tmp_path / "in.jsonl", tmp_path / f"out{output}")
        assert [(row["x"], row["y"]) for row in read(tmp_path / f"out{output}")] == expected
    score(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    kept = [{name: row[name] for name in ("x", "y") if name in row} for row in read(tmp_path / "out.jsonl")]
    assert kept == [{"x": None}, {"y": 1}, {}]


JSON_VALUES: list[tuple[list[Any], str, list[Any]]] = [
    ([True, None, False], "bool", [True, None, False]),
    ([1, -(2**63), 2**63 - 1], "int64", [1, -(2**63), 2**63 - 1]),
    ([0.1, -0.0, 1e300], "double", [0.1, -0.0, 1e300]),
    ([1, 0.5, 2**53 + 1], "double", [1.0, 0.5, 2.0**53]),
    (["a", "", None], "string", ["a", "", None]),
    ([None, None], "string", [None, None]),
    ([1, "a", True], "string", ["1", '"a"', "true"]),
    ([[1, [None]], []], "string", ["[1, [null]]", "[]"]),
    ([{"é": {"b": 1}}, None], "string", ['{"é": {"b": 1}}', None]),
    ([2**63, 1], "string", ["9223372036854775808", "1"]),
    ([10**30], "string", [str(10**30)]),
    ([2**63, 0.5], "string", ["9223372036854775808", "0.5"]),
]


@pytest.mark.parametrize(("values", "kind", "expected"), JSON_VALUES)
def test_json_values(values: list[Any], kind: str, expected: list[Any], tmp_path: Path) -> None:
    """The very same in JSON; in parquet of one type, a string that holds JSON where there is none."""
    write(tmp_path / "in.jsonl", [{"prompt": "a", "x": value} for value in values])
    score(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert repr([row["x"] for row in read(tmp_path / "out.jsonl")]) == repr(values)
    _, parquet = arrow()
    score(tmp_path / "in.jsonl", tmp_path / "out.parquet")
    column = parquet.read_table(tmp_path / "out.parquet")["x"]
    assert (str(column.type), repr(column.to_pylist())) == (kind, repr(expected))


def test_json_values_in_cells(tmp_path: Path) -> None:
    values = [True, None, 1, 0.1, "a", [1, None], {"b": "é"}, 10**30]
    write(tmp_path / "in.jsonl", [{"prompt": "a", "x": value} for value in values])
    for output in (".csv", ".tsv", ".txt"):
        score(tmp_path / "in.jsonl", tmp_path / f"out{output}")
        found = [row["x"] for row in read(tmp_path / f"out{output}")]
        assert found == ["true", "", "1", "0.1", "a", "[1, null]", '{"b": "é"}', str(10**30)]


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "x": NaN, "y": [1e999, {"z": -Infinity}]}\n')
    score(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    (row,) = read(tmp_path / "out.jsonl")
    assert (row["x"], row["y"]) == (None, [None, {"z": None}])
    score(tmp_path / "in.jsonl", tmp_path / "out.csv")
    assert read(tmp_path / "out.csv")[0]["x"] == "nan"


def kinds(pyarrow: Any) -> dict[str, tuple[Any, list[Any], list[str] | None, list[Any] | None]]:
    """Return for each type: the type, values, and what stands in cells and in JSON; None: refused."""
    ns = 1_600_000_000_123_456_789
    units = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
    ends = {"s": "", "ms": ".123", "us": ".123456", "ns": ".123456789"}
    found: dict[str, tuple[Any, list[Any], list[str] | None, list[Any] | None]] = {}
    for bits in (8, 16, 32, 64):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        found[f"int{bits}"] = (getattr(pyarrow, f"int{bits}")(), [low, high], [str(low), str(high)], [low, high])
        top = 2**bits - 1
        found[f"uint{bits}"] = (getattr(pyarrow, f"uint{bits}")(), [0, top], ["0", str(top)], [0, top])
    nan, inf = float("nan"), float("inf")
    found["float64"] = (
        pyarrow.float64(),
        [0.1, nan, -inf, -0.0],
        ["0.1", "nan", "-inf", "-0.0"],
        [0.1, None, None, -0.0],
    )
    found["float32"] = (pyarrow.float32(), [0.5, nan], ["0.5", "nan"], [0.5, None])
    found["float16"] = (pyarrow.float16(), [0.5, nan], ["0.5", "nan"], [0.5, None])
    found["bool"] = (pyarrow.bool_(), [True, False], ["true", "false"], [True, False])
    for name in ("string", "large_string", "string_view"):
        found[name] = (getattr(pyarrow, name)(), ["a,\n", ""], ["a,\n", ""], ["a,\n", ""])
    found["dictionary"] = (
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        ["b", "a", "b"],
        ["b", "a", "b"],
        ["b", "a", "b"],
    )
    decimals = [Decimal("1.50"), Decimal("-0.01")]
    for name, kind in (("decimal128", pyarrow.decimal128(5, 2)), ("decimal256", pyarrow.decimal256(50, 2))):
        found[name] = (kind, decimals, ["1.50", "-0.01"], ["1.50", "-0.01"])
    days = ["1970-01-01", "2020-09-13", "10000-01-01"]
    found["date32"] = (pyarrow.date32(), [0, 18518, 2_932_897], days, days)
    for unit, size in units.items():
        end = ends[unit]
        lasting = [f"PT1600000000{end}S", f"-PT1{end}S"]
        found[f"duration {unit}"] = (pyarrow.duration(unit), [ns // size, -(1_123_456_789 // size)], lasting, lasting)
        if unit == "s":  # parquet has no such times
            continue
        found[f"timestamp {unit}"] = (pyarrow.timestamp(unit), [ns // size], *[[f"2020-09-13T12:26:40{end}"]] * 2)
        for zone in ("UTC", "Europe/Berlin", "+05:30", "Nowhere/Land"):
            zoned = [f"2020-09-13T12:26:40{end}Z"]
            found[f"timestamp {unit} {zone}"] = (pyarrow.timestamp(unit, zone), [ns // size], zoned, zoned)
        clock = [f"12:26:40{end}", "00:00:00." + "0" * (len(end) - 1)]
        kind = pyarrow.time32("ms") if unit == "ms" else pyarrow.time64(unit)
        found[f"time {unit}"] = (kind, [44_800_123_456_789 // size, 0], clock, clock)
    found["far timestamp"] = (
        pyarrow.timestamp("us"),
        [10**18],
        ["33658-09-27T01:46:40.000000"],
        ["33658-09-27T01:46:40.000000"],
    )
    found["list"] = (pyarrow.list_(pyarrow.int8()), [[1, None], []], ["[1, null]", "[]"], [[1, None], []])
    found["large_list"] = (pyarrow.large_list(pyarrow.string()), [["a"]], ['["a"]'], [["a"]])
    found["fixed list"] = (pyarrow.list_(pyarrow.float64(), 2), [[0.5, nan]], ["[0.5, null]"], [[0.5, None]])
    moments, words = [[ns, None]], ["2020-09-13T12:26:40.123456789", None]
    for name, make in (("list", pyarrow.list_), ("large_list", pyarrow.large_list)):
        found[f"{name} of times"] = (make(pyarrow.timestamp("ns")), moments, [json.dumps(words)], [words])
    found["fixed list of times"] = (pyarrow.list_(pyarrow.timestamp("ns"), 2), moments, [json.dumps(words)], [words])
    struct = pyarrow.struct([("a", pyarrow.int64()), ("binary", pyarrow.list_(pyarrow.date32()))])
    value, text = {"a": None, "binary": [0]}, {"a": None, "binary": ["1970-01-01"]}
    found["struct"] = (struct, [value], [json.dumps(text)], [text])
    mapping = pyarrow.map_(pyarrow.string(), pyarrow.duration("s"))
    found["map"] = (
        mapping,
        [[("k", 1), ("l", None)]],
        ['[["k", "PT1S"], ["l", null]]'],
        [[["k", "PT1S"], ["l", None]]],
    )
    found["map of times"] = (
        pyarrow.map_(pyarrow.date32(), pyarrow.int8()),
        [[(0, 1)]],
        ['[["1970-01-01", 1]]'],
        [[["1970-01-01", 1]]],
    )
    found["null"] = (pyarrow.null(), [None], [""], [None])
    found["binary"] = (pyarrow.binary(), [b"\xff\0"], None, None)
    found["large_binary"] = (pyarrow.large_binary(), [b"\xff\0"], None, None)
    found["fixed binary"] = (pyarrow.binary(2), [b"\xff\0"], None, None)
    found["list of bytes"] = (pyarrow.list_(pyarrow.binary()), [[b"\xff"]], None, None)
    found["bytes in a map"] = (pyarrow.map_(pyarrow.string(), pyarrow.binary()), [[("a", b"\xff")]], None, None)
    return found


def test_parquet_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very same type and values in parquet; text as the docstring of score_files promises; pandas is not needed."""
    pyarrow, parquet = arrow()
    monkeypatch.setitem(sys.modules, "pandas", None)
    for name, (kind, values, cells, plain) in kinds(pyarrow).items():
        source = tmp_path / "in.parquet"
        column = pyarrow.array([*values, None], kind)
        table = pyarrow.table({"prompt": ["a"] * len(column), "x": column})
        parquet.write_table(table, source)
        before = parquet.read_table(source)["x"]
        (tmp_path / "out.parquet").unlink(missing_ok=True)
        score(source, tmp_path / "out.parquet")
        after = parquet.read_table(tmp_path / "out.parquet")["x"]
        assert after.type == before.type, name
        assert after.combine_chunks().to_string() == before.combine_chunks().to_string(), name  # NaN too
        for output in (".csv", ".jsonl"):
            (tmp_path / f"out{output}").unlink(missing_ok=True)
            if cells is None or plain is None:
                with pytest.raises(
                    InputError, match=r"in\.parquet has bytes in its column 'x', which text cannot hold"
                ):
                    score(source, tmp_path / f"out{output}")
                continue
            score(source, tmp_path / f"out{output}")
            expected = [*cells, ""] if output == ".csv" else [*plain, None]
            assert repr([row["x"] for row in read(tmp_path / f"out{output}")]) == repr(expected), name


def test_extension_types_of_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = arrow()
    if not hasattr(pyarrow, "uuid") or not hasattr(pyarrow, "json_"):
        pytest.skip("this pyarrow has no such types")
    raw = pyarrow.array([b"0123456789abcdef", None])
    uuids = raw.cast(pyarrow.binary(16)).cast(pyarrow.uuid())
    lists = pyarrow.array([[b"0123456789abcdef"], None], pyarrow.list_(pyarrow.binary(16)))
    columns = {
        "u": uuids,
        "l": lists.cast(pyarrow.list_(pyarrow.uuid())),
        "j": pyarrow.array(["{}", None], pyarrow.json_()),
    }
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], **columns}), tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / "out.parquet")
    before, after = (
        parquet.read_table(tmp_path / name).select(["u", "l", "j"]) for name in ("in.parquet", "out.parquet")
    )
    assert after.equals(before)
    score(tmp_path / "in.parquet", tmp_path / "out.csv", kept=("j",))
    assert [row["j"] for row in read(tmp_path / "out.csv")] == ["{}", ""]


def test_python_reads_the_times_of_text_back(tmp_path: Path) -> None:
    moment, span = datetime(2021, 2, 3, 4, 5, 6, 789_012), timedelta(days=400, microseconds=5)
    write(tmp_path / "in.parquet", [{"prompt": "a", "m": moment, "d": date(2021, 2, 3), "t": time(4, 5), "s": span}])
    score(tmp_path / "in.parquet", tmp_path / "out.csv")
    (row,) = read(tmp_path / "out.csv")
    assert datetime.fromisoformat(row["m"]) == moment
    assert date.fromisoformat(row["d"]) == date(2021, 2, 3)
    assert time.fromisoformat(row["t"]) == time(4, 5)
    assert float(row["s"][2:-1]) == span.total_seconds()


def test_folders_give_columns_of_strings(tmp_path: Path) -> None:
    for name, rows in (("lang=de", [{"prompt": "a"}]), ("lang=__HIVE_DEFAULT_PARTITION__", [{"prompt": "b"}])):
        (tmp_path / "in" / name).mkdir(parents=True)
        for source in (".csv", ".jsonl", ".parquet"):
            (tmp_path / source / name).mkdir(parents=True)
            write(tmp_path / source / name / f"p{source}", rows)
    for source in (".csv", ".jsonl", ".parquet"):
        score(tmp_path / source, tmp_path / f"{source}-out.parquet")
        assert [row["lang"] for row in read(tmp_path / f"{source}-out.parquet")] == [None, "de"]


def test_kept_values_are_no_formulas_of_ours(tmp_path: Path) -> None:
    """An apostrophe is put before prompts alone; what is kept stays as it was."""
    write(tmp_path / "in.csv", [{"prompt": "=1", "x": "=2"}])
    score(tmp_path / "in.csv", tmp_path / "out.csv")
    assert [(row["prompt"], row["x"]) for row in read(tmp_path / "out.csv")] == [("'=1", "=2")]
