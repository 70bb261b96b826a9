"""What arguments of an input stand for: files, patterns, folders, hive-style folders, standard input."""

import io
import os
import re
import sys
from pathlib import Path

import pytest

from memedge.engine.errors import InputError
from memedge.prompts.inputs import find_files, standard_input
from memedge.prompts.kinds import FileKind


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("prompt\na star\n")


def found(*sources: object) -> list[str]:
    return [one.file.name for one in find_files([str(source) for source in sources])]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_keep_their_order_and_patterns_are_sorted(root: Path) -> None:
    make(root, "b.csv", "a.csv", "d/10.csv", "d/9.csv", "d/e/f/1.csv", "d/x.txt", "d/.hidden.csv")
    assert found("b.csv", "a.csv") == ["b.csv", "a.csv"]
    assert found("d/*.csv", "a.csv") == ["d/10.csv", "d/9.csv", "a.csv"]
    assert found("**/*.csv") == ["a.csv", "b.csv", "d/10.csv", "d/9.csv", "d/e/f/1.csv"]
    assert found(root / "**" / "?.csv") == [str(root / name) for name in ("a.csv", "b.csv", "d/9.csv", "d/e/f/1.csv")]
    assert found("d/[0-9].csv") == ["d/9.csv"]


def test_a_folder_and_its_pattern_give_one_order(root: Path) -> None:
    make(root, "d/x/2.csv", "d/x-1/1.csv", "d/x.csv", "d/x/y/0.csv")
    assert found("d") == found("d/") == found("d/**/*.csv") == ["d/x/2.csv", "d/x/y/0.csv", "d/x-1/1.csv", "d/x.csv"]


def test_a_name_with_the_signs_of_patterns_is_a_name_first(root: Path) -> None:
    make(root, "a[1].csv", "a1.csv", "d*/p.csv")
    assert found("a[1].csv") == ["a[1].csv"]
    assert found("d*") == ["d*/p.csv"]


def test_marks_of_writers_are_left_out_of_a_folder(root: Path) -> None:
    make(root, "d/_SUCCESS", "d/.part.crc", "d/_temporary/0/p.csv", "d/.git/p.csv", "d/x/p.csv", "d/_job.json")
    assert found("d") == ["d/x/p.csv"]


def test_linked_folders_count_and_circles_end(root: Path) -> None:
    make(root, "far/p.csv", "d/q.csv")
    (root / "d" / "link").symlink_to(root / "far")
    assert found("d") == ["d/link/p.csv", "d/q.csv"]
    (root / "far" / "back").symlink_to(root / "d")
    with pytest.raises(InputError, match=r"and another folder in d are the same by a link: remove the link\."):
        found("d")


def test_the_remedy_for_a_strange_file_works(root: Path) -> None:
    make(root, "d [1]/x/a.csv.gz", "d [1]/notes.xlsx")
    with pytest.raises(InputError, match=re.escape("d [1]/notes.xlsx is of an unknown file type: take it")) as caught:
        found("d [1]")
    pattern = re.search(r"'(.*)'", str(caught.value))
    assert pattern and found(pattern[1]) == ["d [1]/x/a.csv.gz"]


@pytest.mark.parametrize(
    ("names", "sources", "message"),
    [
        ([], [""], "A name of an input is empty: name a file"),
        ([], ["gone.csv"], "gone.csv does not exist: check the name"),
        ([], ["*.csv"], "No file matches *.csv: check the pattern."),
        (["d/e/p.csv"], ["d/*"], "No file matches d/*: check the pattern."),
        (["d/_x.csv"], ["d"], "d holds no prompt files: put some in it, or name another folder."),
        (["d/a.json"], ["d"], "d/a.json has an unknown file type: use a name that ends in .txt, .csv,"),
        (["a.parquet.gz"], ["a.parquet.gz"], "a.parquet.gz has an unknown file type"),
        (["a.gz"], ["a.gz"], "a.gz has an unknown file type"),
        (["a.csv", "b.txt"], ["a.csv", "b.txt"], "a.csv and b.txt are of different formats: score those of each"),
        (["d/a.tsv", "d/b.csv"], ["d"], "d/a.tsv and d/b.csv are of different formats"),
        (["a.csv"], ["a.csv", "./a.csv"], "a.csv is named twice: name each file once."),
        (["d/a.csv"], ["d", "d/*.csv"], "d/a.csv is named twice"),
        (["x=1/a.csv", "b.csv"], ["x=1/a.csv", "b.csv"], "lie in folders of different columns (x; none): score them"),
        (["d/x=1/a.csv", "d/y=1/a.csv"], ["d"], "lie in folders of different columns (x; y)"),
    ],
)
def test_inputs_that_are_refused(names: list[str], sources: list[str], message: str, root: Path) -> None:
    make(root, *names)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        found(*sources)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_links(root: Path) -> None:
    make(root, "a.csv")
    (root / "b.csv").symlink_to("a.csv")
    assert found("b.csv") == ["b.csv"]
    with pytest.raises(InputError, match=r"b\.csv is named twice"):
        found("a.csv", "b.csv")
    (root / "loop.csv").symlink_to("loop.csv")
    with pytest.raises(InputError, match=r"loop\.csv cannot be read \(Too many levels of symbolic links\)"):
        found("loop.csv")
    (root / "dead.csv").symlink_to("gone.csv")
    with pytest.raises(InputError, match=r"dead\.csv does not exist"):
        found("dead.csv")


def test_formats_may_be_packed_differently(root: Path) -> None:
    make(root, "d/a.csv", "d/b.CSV.gz")
    assert found("d") == ["d/a.csv", "d/b.CSV.gz"]


def test_names_with_odd_characters(root: Path) -> None:
    odd = ["new\nline.csv", "q'uote \".csv", "猫 🐈.csv", "-dash.csv", "a%20b.csv", " .csv"]
    make(root, *odd)
    assert found(*odd) == odd
    assert sorted(found("*.csv")) == sorted(odd)


def test_a_name_that_is_not_utf_8_is_refused(root: Path) -> None:
    name = os.fsdecode(b"caf\xe9.csv")
    try:
        make(root, name)
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system has no such names")
    with pytest.raises(InputError, match=r"caf\?\.csv has a name that is not UTF-8: rename the file"):
        found(name)


def partitions(*sources: str) -> list[dict[str, str | None]]:
    return [dict(one.partition) for one in find_files(sources)]


def test_hive_folders_give_columns_whoever_finds_the_files(root: Path) -> None:
    make(root, "d/lang=de/day=1/a.csv", "d/lang=en/day=__HIVE_DEFAULT_PARTITION__/b.csv")
    expected: list[dict[str, str | None]] = [{"lang": "de", "day": "1"}, {"lang": "en", "day": None}]
    assert partitions("d") == expected
    assert partitions("d/**/*.csv") == expected
    assert partitions("d/lang=de", "d/lang=en") == expected
    assert partitions(*found("d")) == expected


def test_values_of_hive_folders_are_decoded(root: Path) -> None:
    make(root, "a b%2Fc%3D%C3%A9=1%25=2/p.csv", "plain/=3/q.csv", "k=/r.csv")
    assert partitions("a b%2Fc%3D%C3%A9=1%25=2") == [{"a b/c=é": "1%=2"}]
    assert partitions("plain") == [{}]
    assert partitions("k=") == [{"k": ""}]


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("format", ["txt", "csv", "parquet"])
def test_standard_input_is_kept_while_it_is_read(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\x00\xff\r\n" * 1_000_000
    stdin(monkeypatch, content)
    with standard_input(FileKind(format)) as (one,):
        path = one.file.path
        assert path.read_bytes() == content
        assert (one.file.name, one.file.kind.format, one.partition) == ("Standard input", format, {})
    assert not path.parent.exists()


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.TextIOWrapper(io.BytesIO())
    closed.close()
    for one in (None, closed):
        monkeypatch.setattr(sys, "stdin", one)
        with (
            pytest.raises(InputError, match=r"Standard input is closed: name a file"),
            standard_input(FileKind("txt")),
        ):
            pass


def test_standard_input_that_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)

    class Folder(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, _: object) -> int:
            return len(os.read(descriptor, 9))

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Folder())))
    with (
        pytest.raises(InputError, match=r"Standard input cannot be read \(Is a directory\): name a file"),
        standard_input(FileKind("txt")),
    ):
        pass
    os.close(descriptor)


def test_standard_input_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"Standard input cannot be kept in a file \(.*\): make room for temporary files, or name another folder"
    stdin(monkeypatch, b"a star\n")
    full = Path("/dev/full")
    if full.exists():
        whole = Path.open
        monkeypatch.setattr(Path, "open", lambda path, *mode: whole(full if path.name == "stdin.txt" else path, *mode))
        with pytest.raises(InputError, match=message), standard_input(FileKind("txt")):
            pass
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(InputError, match=message), standard_input(FileKind("txt")):
        pass
