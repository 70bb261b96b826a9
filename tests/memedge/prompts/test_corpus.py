"""Files read as one table: which column is the prompts', which are kept, and of what type they are."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge.engine.errors import InputError
from memedge.prompts.columns import Columns
from memedge.prompts.corpus import Contents, Corpus
from memedge.prompts.inputs import find_files

FORMATS = ["csv", "tsv", "jsonl", "parquet"]
Rows = Sequence[dict[str, Any]]


def write(path: Path, rows: Rows) -> None:
    """Write rows as others would; the first names the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow, from the extra eval")
        parquet = pytest.importorskip("pyarrow.parquet", reason="parquet files need pyarrow, from the extra eval")
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


def corpus(*sources: Path, column: str | None = None, kept: tuple[str, ...] | None = None) -> Corpus:
    return Corpus(find_files([str(source) for source in sources]), Columns(column, kept))


def inspected(read: Corpus) -> Contents:
    return read.inspect(lambda _: None)


def prompts(read: Corpus) -> list[str]:
    return [row.prompt for row in read.rows()]


def beside(read: Corpus) -> list[dict[str, Any]]:
    return [row.kept for row in read.rows()]


def refused(read: Callable[[], object], *words: str) -> None:
    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert message.endswith(".") and message.isprintable()
    assert all(word in message for word in words), message


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["prompt", "Prompt", "PROMPT", "caption", "Caption", "text", "TEXT"])
def test_the_column_of_the_prompts_is_found(name: str, format: str, tmp_path: Path) -> None:
    write(tmp_path / f"p.{format}", [{"id": "1", name: "a star"}])
    read = corpus(tmp_path / f"p.{format}")
    assert prompts(read) == ["a star"]
    assert beside(read) == [{"id": "1"}]
    assert inspected(read).rows == 1


@pytest.mark.parametrize("format", FORMATS)
def test_which_column_of_several(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"p.{format}"
    write(path, [{"text": "t", "prompt": "p", "Caption": "c"}])
    assert prompts(corpus(path)) == ["p"]
    assert prompts(corpus(path, column="Caption")) == ["c"]
    refused(lambda: inspected(corpus(path, column="caption")), str(path), "no column 'caption', only 'text', 'prompt'")
    write(path, [{"TEXT": "t", "id": "1", "Caption": "c"}])
    refused(lambda: inspected(corpus(path)), str(path), "has 2 columns of such names, 'TEXT', 'Caption': call one of")
    write(path, [{"words": "w", "id": "1"}])
    refused(
        lambda: inspected(corpus(path)), str(path), "has no column 'prompt', 'caption' or 'text', only 'words', 'id'"
    )
    assert prompts(corpus(path, column="words")) == ["w"]


def test_one_name_holds_for_all_rows_of_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write(path, [{"text": "a"}, {"caption": "b"}])
    refused(lambda: inspected(corpus(path)), "line 2, has no column 'text', only 'caption'")


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_kept(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"p.{format}"
    write(path, [{"id": "1", "prompt": "a", "x": "2"}])
    for kept, expected in ((None, {"id": "1", "x": "2"}), ((), {}), (("x",), {"x": "2"}), (("x", "id"), None)):
        read = corpus(path, kept=kept)
        assert beside(read) == [{"id": "1", "x": "2"} if expected is None else expected]
        assert list(inspected(read).columns) == list(expected if expected is not None else ("x", "id"))
    assert beside(corpus(path).bare()) == [{}]
    words = ("has no column 'y' to keep, but 'id', 'prompt', 'x'", "correct --keep")
    if format == "jsonl":
        words = (f"No row of {path} has a key 'y' to keep: correct --keep.",)
    refused(lambda: inspected(corpus(path, kept=("x", "y"))), *words)


def test_a_kept_column_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("x,prompt,x\n1,a,2\n")
    refused(lambda: inspected(corpus(tmp_path / "p.csv")), "more than one column 'x' to keep", "correct --keep")
    assert beside(corpus(tmp_path / "p.csv", kept=())) == [{}]


@pytest.mark.parametrize("format", FORMATS)
def test_columns_of_several_files_are_united(format: str, tmp_path: Path) -> None:
    write(tmp_path / f"1.{format}", [{"prompt": "a", "x": "1"}])
    write(tmp_path / f"2.{format}", [{"y": "2", "caption": "b"}])
    read = corpus(tmp_path)
    assert prompts(read) == ["a", "b"]
    assert beside(read) == [{"x": "1"}, {"y": "2"}]
    assert list(inspected(read).columns) == ["x", "y"]


@pytest.mark.parametrize("format", FORMATS)
def test_empty_files_among_others(format: str, tmp_path: Path) -> None:
    for name in ("0", "2"):
        if format == "parquet":
            pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow, from the extra eval")
            parquet = pytest.importorskip("pyarrow.parquet", reason="parquet files need pyarrow, from the extra eval")
            parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], "string")}), tmp_path / f"{name}.{format}")
        else:
            (tmp_path / f"{name}.{format}").touch()
    refused(lambda: inspected(corpus(tmp_path)), f"0.{format} and 1 more holds no prompts: put at least one in it.")
    write(tmp_path / f"1.{format}", [{"prompt": "a", "x": "1"}])
    contents = inspected(corpus(tmp_path))
    assert (contents.rows, list(contents.columns)) == (1, ["x"])


def test_types_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow, from the extra eval")
    write(tmp_path / "1.parquet", [{"prompt": "a", "n": None}])
    write(tmp_path / "2.parquet", [{"prompt": "b", "n": 1}])
    write(tmp_path / "3.parquet", [{"prompt": "c", "n": None}])
    assert inspected(corpus(tmp_path)).columns == {"n": pyarrow.int64()}
    write(tmp_path / "4.parquet", [{"prompt": "d", "n": 0.5}])
    words = ("4.parquet has double in its column 'n', and files before it int64", "or leave it out with --keep.")
    refused(lambda: inspected(corpus(tmp_path)), *words)
    assert inspected(corpus(tmp_path, kept=())).rows == 4


def test_types_of_cells(tmp_path: Path) -> None:
    write(tmp_path / "p.csv", [{"prompt": "a", "n": 1}])
    assert inspected(corpus(tmp_path)).columns == {"n": str}


@pytest.mark.parametrize(
    ("values", "types"),
    [
        ([True, False], {bool}),
        ([1, -(2**63), 2**63 - 1], {int}),
        ([0.5, 1e300], {float}),
        ([1, 0.5], {int, float}),
        (["a", ""], {str}),
        ([1, "a", True], {int, str, bool}),
        ([[1], []], {list}),
        ([{"a": 1}], {dict}),
        ([None, None], {type(None)}),
        ([None, 1], {type(None), int}),
        ([2**63, 1], {object, int}),
        ([-(2**63) - 1], {object}),
    ],
)
def test_types_of_json(values: list[Any], types: set[type], tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", [{"prompt": "a"}, *({"prompt": "a", "x": value} for value in values)])
    read = corpus(tmp_path)
    assert inspected(read).columns == {"x": types}
    assert beside(read) == [{}, *({"x": value} for value in values)]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)


@settings(deadline=None, max_examples=60)
@given(st.lists(texts, min_size=1, max_size=4), st.lists(texts, min_size=1, max_size=4))
def test_the_digest_tells_lists_of_prompts_apart(one: list[str], other: list[str]) -> None:
    from tempfile import TemporaryDirectory

    digests = []
    for values in (one, other, one):
        with TemporaryDirectory() as folder:
            write(Path(folder, "p.jsonl"), [{"prompt": value, "x": len(digests)} for value in values])
            digests.append(inspected(corpus(Path(folder))).sha256)
    assert digests[0] == digests[2]
    assert (digests[0] == digests[1]) == (one == other)


def test_the_digest_is_of_prompts_alone(tmp_path: Path) -> None:
    """Not of how they lie in files, of their format, or of what stands beside them; the order counts."""
    write(tmp_path / "one" / "p.jsonl", [{"prompt": "a"}, {"prompt": "bc"}])
    write(tmp_path / "two" / "1.csv", [{"text": "a", "n": 1}])
    write(tmp_path / "two" / "2.csv", [{"text": "bc", "n": 2}])
    write(tmp_path / "moved" / "p.csv", [{"text": "ab"}, {"text": "c"}])
    write(tmp_path / "turned" / "p.csv", [{"text": "bc"}, {"text": "a"}])
    found = [inspected(corpus(tmp_path / name)).sha256 for name in ("one", "two", "moved", "turned")]
    assert found[0] == found[1]
    assert len(set(found)) == 3


@pytest.mark.parametrize("format", FORMATS)
def test_columns_of_folders(format: str, tmp_path: Path) -> None:
    write(tmp_path / "lang=de" / f"p.{format}", [{"prompt": "a", "x": "1"}])
    write(tmp_path / "lang=__HIVE_DEFAULT_PARTITION__" / f"p.{format}", [{"prompt": "b", "x": "2"}])
    read = corpus(tmp_path)
    assert beside(read) == [{"lang": None, "x": "2"}, {"lang": "de", "x": "1"}]
    assert list(inspected(read).columns) == ["lang", "x"]
    assert beside(corpus(tmp_path, kept=("lang",))) == [{"lang": None}, {"lang": "de"}]
    assert beside(corpus(tmp_path, kept=("x",))) == [{"x": "2"}, {"x": "1"}]
    assert list(inspected(corpus(tmp_path, kept=("x", "lang"))).columns) == ["lang", "x"]
    assert beside(corpus(tmp_path, kept=())) == [{}, {}]


@pytest.mark.parametrize("format", FORMATS)
def test_a_column_of_folders_and_files_is_refused(format: str, tmp_path: Path) -> None:
    write(tmp_path / "lang=de" / f"p.{format}", [{"prompt": "a", "lang": "en", "x": "1"}])
    words = (
        "has a column 'lang', and lies in a folder lang=...: rename one of them, or leave it out with --keep none",
    )
    refused(lambda: inspected(corpus(tmp_path)), *words)
    refused(lambda: inspected(corpus(tmp_path, kept=("lang",))), *words)
    refused(lambda: inspected(corpus(tmp_path, kept=("x", "lang"))), *words)
    for kept in ((), ("x",)):
        assert inspected(corpus(tmp_path, kept=kept)).rows == 1


@pytest.mark.parametrize(("options", "word"), [({"column": "x"}, "--column"), ({"kept": ("x",)}, "--keep")])
def test_plain_text_has_no_columns(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a star\n")
    assert inspected(corpus(tmp_path / "p.txt")) == Contents(1, inspected(corpus(tmp_path)).sha256, {})
    refused(lambda: inspected(corpus(tmp_path / "p.txt", **options)), "plain text, which has no columns", word)


def test_progress_is_said_now_and_then(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n" * 10_000)
    seen: list[int] = []
    corpus(tmp_path).inspect(seen.append)
    assert seen == [4096, 8192]


def test_names_of_columns_are_shown_in_one_line(tmp_path: Path) -> None:
    write(tmp_path / "p.csv", [{"a\nb\x1b": "1", "x" * 500: "2"}])
    refused(lambda: inspected(corpus(tmp_path)), "only 'a", "x...: call one of them 'prompt'.")
