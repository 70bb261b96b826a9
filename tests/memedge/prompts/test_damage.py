"""Files that are packed or of parquet and damaged: read, or refused in one sentence that names the file."""

import gzip
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge.engine.errors import InputError
from memedge.prompts.columns import Columns
from memedge.prompts.files import PromptFile, parquet_types, read_rows

ROWS = [{"prompt": f"prompt {number} {number * 7919 % 1000}", "id": str(number)} for number in range(300)]
TEXT = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
PACKED = ["p.jsonl.gz", "p.jsonl.zst", "p.parquet"]


def arrow() -> tuple[Any, Any]:
    reason = "zstd and parquet files need pyarrow, from the extra eval"
    return pytest.importorskip("pyarrow", reason=reason), pytest.importorskip("pyarrow.parquet", reason=reason)


def write(path: Path) -> bytes:
    pyarrow, parquet = arrow()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(TEXT))
    elif path.suffix == ".zst":
        with pyarrow.CompressedOutputStream(path, "zstd") as file:
            file.write(TEXT)
    else:
        table = pyarrow.Table.from_pylist([{**row, "n": [1, None]} for row in ROWS])
        parquet.write_table(table, path, row_group_size=100)
    return path.read_bytes()


def read(path: Path) -> list[dict[str, Any]]:
    file = PromptFile.at(path)
    columns = Columns(kept=None)
    if path.suffix == ".parquet":
        parquet_types(file, columns)
    return [{"prompt": row.prompt, "id": row.kept.get("id")} for row in read_rows(file, columns)]


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert message == f"{path} is not a {''.join(path.suffixes)} file or is damaged: write it again."


@pytest.mark.parametrize("name", PACKED)
def test_what_is_cut_off_or_something_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content = write(path)
    assert read(path) == ROWS
    for end in (1, 3, len(content) // 2, len(content) - 1):
        refused(path, content[:end])
    for garbage in (b"garbage", b"a star\n" * 1000, content[::-1], content[9:]):
        refused(path, garbage)


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl.zst"])
def test_streams_behind_each_other(name: str, tmp_path: Path) -> None:
    """As several processes at once, or `cat`, write them."""
    path = tmp_path / name
    content = write(path)
    path.write_bytes(content * 3)
    assert read(path) == ROWS * 3
    refused(path, content + b"garbage")
    refused(path, content + content[:-5])
    path.write_bytes(b"")
    assert read(path) == []


@pytest.mark.parametrize("name", PACKED)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_damage(name: str, data: st.DataObject) -> None:
    """gzip's checksum finds it; zstd and parquet, mostly written without one, may give other text."""
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        content = bytearray(write(path))
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
        try:
            found = read(path)
        except InputError as error:
            message = str(error)
            assert message.startswith(str(path)) and message.endswith(".") and message.isprintable(), message
        else:
            assert name != "p.jsonl.gz" or found in (ROWS, [])


@pytest.mark.parametrize("name", [*PACKED, "p.csv"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    _, parquet = arrow()

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path.touch()
    monkeypatch.setattr(Path, "open", deny)  # not by file mode: root may read anything
    monkeypatch.setattr(parquet, "ParquetFile", deny)
    monkeypatch.setattr(parquet, "read_schema", deny)
    with pytest.raises(InputError, match=rf"{name} cannot be read \(Permission denied\): check the file\."):
        read(path)
