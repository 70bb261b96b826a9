"""The rows' keys in a temporary file: tokenizing takes longer than all else but scoring, and is done once for a run."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

SIZE = 17  # bytes of a row: its key, and whether its prompt was cut


class RowKeys:
    """Written in the order of the rows, and read in that order; the file goes when it is closed."""

    def __init__(self, folder: Path):
        """Make the file in a folder; raises OSError."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> "RowKeys":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, key: bytes, cut: bool) -> None:
        """Add a row; raises OSError if there is no room."""
        self._file.write(key + (b"\1" if cut else b"\0"))

    def read(self) -> Iterator[tuple[bytes, bool]]:
        """Yield all rows' keys, and whether their prompts were cut."""
        self._file.seek(0)
        while row := self._file.read(SIZE):
            yield row[:-1], row[-1] == 1
