"""Which kind of file a name stands for: a format and, for text, a compression."""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

from memedge.engine.errors import InputError, not_installed

FORMATS = ("txt", "csv", "tsv", "jsonl", "parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NAMES = "a name that ends in .txt, .csv, .tsv, .jsonl or .parquet; text may also be .gz or .zst, such as .jsonl.gz"


@dataclass(frozen=True)
class FileKind:
    """What is in a file.

    Attributes:
        format: one of FORMATS.
        compression: "gzip", "zstd" or none.
    """

    format: str
    compression: str = ""

    @property
    def suffix(self) -> str:
        """What names of this kind end in."""
        endings = {compression: ending for ending, compression in COMPRESSIONS.items()}
        return f".{self.format}{endings.get(self.compression, '')}"


def known_kind(path: PurePath) -> FileKind | None:
    """Return the kind that a name stands for, or None if it is none of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = COMPRESSIONS.get(suffixes[-1], "") if suffixes else ""
    rest = suffixes[:-1] if compression else suffixes
    name = rest[-1][1:] if rest else ""
    if name not in FORMATS or (compression and name == "parquet"):
        return None
    return FileKind(name, compression)


def file_kind(path: PurePath) -> FileKind:
    """Return the kind that a name stands for. The file need not exist.

    Raises:
        InputError: it is none of ours, or needs pyarrow, which is not installed.
    """
    kind = known_kind(path)
    if kind is None:
        raise InputError(f"{path} has an unknown file type: use {NAMES}.")
    if kind.format == "parquet" or kind.compression == "zstd":
        import_pyarrow(f"A {kind.suffix} file")
    return kind


def import_pyarrow(purpose: str = "A .parquet file") -> tuple[Any, Any]:
    """Return the modules `pyarrow` and `pyarrow.parquet`; raise InputError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(not_installed(purpose, "pyarrow", "eval")) from error
    return pyarrow, pyarrow.parquet


@contextmanager
def open_bytes(path: Path, compression: str) -> Iterator[BinaryIO]:
    """Open a file of text for reading, and read what is compressed in it.

    Raises:
        OSError: it cannot be read; zlib.error, EOFError, or OSError of a library: it is not what its name says.
    """
    with path.open("rb") as file:
        if compression == "gzip":
            with gzip.open(file) as unpacked:
                yield cast(BinaryIO, unpacked)
        elif compression:
            stream = import_pyarrow()[0].CompressedInputStream(file, compression)
            with io.BufferedReader(stream) as unpacked:
                yield unpacked
        else:
            yield file


@contextmanager
def create_bytes(path: Path, compression: str) -> Iterator[BinaryIO]:
    """Open a new file of text for writing, and compress what is written.

    Raises:
        OSError: the file exists or cannot be written.
    """
    with path.open("xb") as file:
        if compression == "gzip":
            # Without the time and the name, so that equal results are equal files.
            with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed:
                yield cast(BinaryIO, packed)
        elif compression:
            with import_pyarrow()[0].CompressedOutputStream(file, compression) as packed:
                yield packed
        else:
            yield file
