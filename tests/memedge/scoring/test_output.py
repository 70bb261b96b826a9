"""Where scores go: files and folders of parts, what is there already, the record of how it was made."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from memedge.engine.errors import InputError
from memedge.scoring.output import Output
from memedge.scoring.reading import Finished
from memedge.scoring.record import Judge, Part, Record
from memedge.scoring.score_files import Layout, OutputRow, ScoreRow

RECORD = Record("sha", ["in.txt"], Judge("engine"), ["prompt"], 7, 7, 0, 0, [], None, "input", "1")


def rows(count: int) -> Iterator[OutputRow]:
    for number in range(1, count + 1):
        yield OutputRow(number, ScoreRow(f"prompt {number}", 1.0, 0.5, None, None, False), {})


def write(output: Output, count: int, part_rows: int = 3) -> list[Part]:
    """Write rows as a job does."""
    output.check([], overwrite=True)
    parts = output.write(Layout(), rows(count), part_rows)
    record = Record(**{name: getattr(RECORD, name) for name in RECORD.__struct_fields__} | {"parts": parts})
    output.complete(record)
    output.finish(record)
    return parts


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("count", "sizes"), [(7, [3, 3, 1]), (6, [3, 3]), (2, [2]), (1, [1]), (0, [])])
def test_a_folder_has_parts_of_a_size(count: int, sizes: list[int], tmp_path: Path) -> None:
    output = Output.at(tmp_path / "out", "jsonl")
    parts = write(output, count)
    files = [f"part-{number:05}.jsonl" for number in range(1, len(sizes) + 1)]
    assert [(part.name, part.rows) for part in parts] == list(zip(files, sizes, strict=True))
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["_job.json", *files]
    assert [part.bytes for part in parts] == [(tmp_path / "out" / name).stat().st_size for name in files]
    finished = Finished.at(output)
    assert (finished.record.rows, output.missing(finished.record)) == (count, [])
    assert list(finished.rows()) == list(rows(count))


@pytest.mark.parametrize("name", ["out.csv", "out.tsv.gz", "out.jsonl"])
def test_a_file_has_its_record_beside_it(name: str, tmp_path: Path) -> None:
    output = Output.at(tmp_path / name)
    (part,) = write(output, 7)
    assert (part.name, part.rows) == (name, 7)
    assert names(tmp_path) == [name, f"{name}.job.json"]
    assert list(Finished.at(output).rows()) == list(rows(7))


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("out", None, (".parquet", True)),
        ("out", "jsonl", (".jsonl", True)),
        ("out/", None, (".parquet", True)),
        ("out.csv/", "jsonl", (".jsonl", True)),
        ("v1.5/", "jsonl", (".jsonl", True)),
        ("OUT.CSV.GZ", None, (".csv.gz", False)),
        ("out.jsonl", "jsonl", (".jsonl", False)),
    ],
)
def test_what_a_name_stands_for(name: str, format: str | None, expected: tuple[str, bool], tmp_path: Path) -> None:
    if ".parquet" in expected:
        pytest.importorskip("pyarrow", reason="parquet files need pyarrow, from the extra eval")
    output = Output.at(tmp_path / name, format, slash=name.endswith("/"))
    assert (output.kind.suffix, output.folder) == expected


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("v1.5", None, "v1.5 has an unknown file type: use a name that ends in .txt, .csv,"),
        ("v1.5", None, "or end the name of a folder in a slash."),
        ("out.parquet.gz", None, "out.parquet.gz has an unknown file type"),
        ("out.csv", "jsonl", "out.csv is no name of a jsonl file: end it in .jsonl, or leave out --format."),
        ("out", "csv", "A folder's parts cannot be csv: use --format parquet or jsonl, or name one file."),
    ],
)
def test_names_that_are_refused(name: str, format: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Output.at(tmp_path / name, format)


@pytest.mark.parametrize("name", [".", "", "/", "..", "x/.."])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InputError, match="is no name of an output: name a file, or a folder to make"):
        Output.at(Path(name))


def test_only_a_folder_of_ours_is_replaced(tmp_path: Path) -> None:
    output = Output.at(tmp_path / "out", "jsonl")
    output.place.mkdir()
    write(output, 7)  # an empty folder is nothing
    with pytest.raises(InputError, match=r"out is there already: replace it with --overwrite, or name another output"):
        output.check([], overwrite=False)
    write(output, 2)
    assert names(output.place) == ["_job.json", "part-00001.jsonl"]
    (output.place / "notes.md").write_text("mine")
    with pytest.raises(InputError, match=r"out holds notes\.md, which memedge did not write: move it away, or name"):
        output.check([], overwrite=True)
    (output.place / "notes.md").unlink()
    output.check([], overwrite=True)
    output.record_path.unlink()
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"out is a folder that memedge did not write: name another, or empty it"):
            output.check([], overwrite=overwrite)
    assert names(output.place) == ["part-00001.jsonl"]


def test_a_file_is_replaced_if_asked(tmp_path: Path) -> None:
    output = Output.at(tmp_path / "out.csv")
    output.place.write_text("mine")
    with pytest.raises(InputError, match=r"out\.csv is there already: replace it with --overwrite"):
        output.check([], overwrite=False)
    write(output, 2)
    assert Finished.at(output).record.rows == 2


def test_inputs_and_outputs_are_apart(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "x").mkdir(parents=True)
    (data / "x" / "p.csv").touch()
    cases = [
        (data / "x" / "p.csv", data / "x" / "p.csv", "p.csv is the input file too: name another file for the output."),
        (data / "x" / "p.csv", data, "data holds the input"),
        (data, data / "out", "out lies in the input folder"),
        (data, data / "x" / "out.csv", "out.csv lies in the input folder"),
    ]
    for source, place, message in cases:
        with pytest.raises(InputError, match=re.escape(message)):
            Output.at(place, "jsonl" if not place.suffix else None).check([source], overwrite=True)
    Output.at(tmp_path / "out.csv").check([data, data / "x" / "p.csv"], overwrite=False)
    Output.at(data / "out.csv").check([data / "x" / "p.csv"], overwrite=False)


def test_a_linked_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(InputError, match=r"out is a link: name the folder that it leads to, or another output\."):
        Output.at(tmp_path / "out", "jsonl").check([], overwrite=True)


def test_what_is_neither_file_nor_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out.csv")
    with pytest.raises(InputError, match=r"out\.csv is neither a file nor a folder: name another output"):
        Output.at(tmp_path / "out.csv").check([], overwrite=True)


def test_nothing_is_left_of_what_failed(tmp_path: Path) -> None:
    def broken() -> Iterator[OutputRow]:
        yield from rows(4)
        raise KeyboardInterrupt

    for name in ("out", "out.csv"):
        output = Output.at(tmp_path / name, None if "." in name else "jsonl")
        with pytest.raises(KeyboardInterrupt):
            output.write(Layout(), broken(), 3)
        assert names(tmp_path) == []


def test_parts_that_are_gone_or_changed(tmp_path: Path) -> None:
    output = Output.at(tmp_path / "out", "jsonl")
    write(output, 9)
    record = output.record()
    assert record is not None
    (output.place / "part-00001.jsonl").unlink()
    with (output.place / "part-00003.jsonl").open("a") as file:
        file.write("\n")
    assert output.missing(record) == [1, 3]
    with pytest.raises(
        InputError, match=r"out lacks part-00001\.jsonl as it was written: score it again with --resume"
    ):
        Finished.at(output)
