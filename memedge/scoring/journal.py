"""Journals of long jobs: what is computed so far, in an SQLite database that survives a kill at any moment.

Each holds two tables. `header` says which job it belongs to: a scoring job's has the journal's format, the SHA-256 of
the input's prompts, the engine's key, the shard and which passes may be left out. `results` has, for a scoring job, a
row per distinct prompt, known by its token ids. Looking prompts up on disk keeps memory flat.
"""

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memedge.engine.arrays import Indices
from memedge.engine.errors import InputError
from memedge.prompts.cells import EARLY_COLUMNS, SCORE_COLUMNS
from memedge.scoring.mapper import Results

Result = tuple[Any, ...]  # norm, alignment, score and memorized; where passes may be left out, passes and reason too

FORMAT = "2"
COMMIT_SECONDS = 1.0  # each commit waits for the disk, some 10 ms; a kill loses what came after the last one
AT_ONCE = 1024  # keys that are looked up by one statement
CACHE = 65_536  # KiB of the journal in memory, at most
_HEADER = {
    "format": "version of memedge",
    "input": "input",
    "engine": "engine, calibration, threshold, provider or precision",
    "shard": "shard",
    "early": "choice of --early",
}
_COLUMNS = SCORE_COLUMNS[1:5]
# No column types: a REAL column would turn -0.0 into 0.0. SQLite stores NaN as NULL, so NOT NULL keeps it out.
_TABLE = "CREATE TABLE results (prompt PRIMARY KEY, norm NOT NULL, alignment NOT NULL, score, memorized) WITHOUT ROWID"
# REAL: two passes are 2.0, as they are read back from score files.
_EARLY_TABLE = (
    "CREATE TABLE results (prompt PRIMARY KEY, norm {known}, alignment, score, memorized, passes REAL NOT NULL, "
    "reason NOT NULL) WITHOUT ROWID"
)
_DAMAGED = "is not a journal of this program or is damaged: delete it and score again"
_UNUSABLE = "cannot be written: make room and check permissions, then run again with --resume"
_SQLITE_TROUBLE = {
    sqlite3.SQLITE_BUSY: "is in use by another process that writes the same output: wait for it to end",
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_ERROR: _DAMAGED,  # a database without our tables
    sqlite3.SQLITE_CANTOPEN: _UNUSABLE,
    sqlite3.SQLITE_FULL: _UNUSABLE,
    sqlite3.SQLITE_IOERR: _UNUSABLE,
    sqlite3.SQLITE_READONLY: _UNUSABLE,
}


def beside(output: Path) -> Path:
    """Return where the journal of an output is kept."""
    place = output.resolve()
    return place.with_name(f"{place.name}.partial")


def refuse_unfinished(path: Path, resume: bool) -> None:
    """Raise InputError if there is a journal at `path`, and not `resume`."""
    if path.exists() and not resume:
        raise InputError(f"{path} holds the results of an unfinished job: go on from it with --resume, or delete it.")


class JobFile:
    """The file of one job. Locked from opening to closing, so that an output has one job at a time."""

    def __init__(self, path: Path, header: dict[str, str], names: dict[str, str], table: str, resume: bool):
        """Open the file at `path`, or make it where there is none.

        Args:
            path: where.
            header: what makes a job this one.
            names: what each key that the header can have is called in an error.
            table: SQL that makes the table of results.
            resume: whether there may be one.

        Raises:
            InputError: there is one and not `resume`; or it is another job's, damaged, in use, or cannot be written.
        """
        self.path = path
        for file in (path, path.with_name(f"{path.name}-journal")):
            # SQLite would write through a link, to wherever it leads, and wait for a pipe.
            if file.is_symlink() or (file.exists() and not file.is_file()):
                raise InputError(f"{file} is no plain file, which a journal has to be: delete it or move it away.")
        existed = path.exists()
        with self._explained():
            self._db = sqlite3.connect(path, timeout=0)
        try:
            with self._explained(), self._db:
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")  # transactions end without giving the lock back
                self._db.execute("BEGIN EXCLUSIVE")
                if existed:
                    refuse_unfinished(path, resume)
                if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                    self._create(header, table)
                found = dict(self._db.execute("SELECT key, value FROM header"))
                if differing := [names[key] for key in names if found.get(key) != header.get(key)]:
                    raise InputError(
                        f"{path} is from a job with another {' and another '.join(differing)}: "
                        "run that job again with --resume, or delete the file."
                    )
        except BaseException:
            self._db.close()
            raise

    def _create(self, header: dict[str, str], table: str) -> None:
        self._db.execute("CREATE TABLE header (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        self._db.executemany("INSERT INTO header VALUES (?, ?)", header.items())
        self._db.execute(table)

    def close(self) -> None:
        """Give the lock back and leave the results for another run."""
        self._db.close()

    def delete(self) -> None:
        """Close and remove the journal."""
        # SQLite's own file, which SQLite deletes only if it wrote to it since a kill; safe while the lock is ours.
        self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
        self.close()
        # After closing: a job that slips in between finds all results and needs to write none.
        self.path.unlink(missing_ok=True)

    def find(self, query: str, *parameters: object) -> tuple[Any, ...] | None:
        """Return the first row of a query, or None."""
        with self._explained():
            row: tuple[Any, ...] | None = self._db.execute(query, parameters).fetchone()
        return row

    def insert(self, statement: str, rows: Iterable[tuple[object, ...]]) -> None:
        """Commit rows, all or none."""
        with self._explained(), self._db:
            self._db.executemany(statement, rows)

    def __len__(self) -> int:
        """Return how many results there are."""
        found = self.find("SELECT count(*) FROM results")
        return int(found[0]) if found else 0

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what SQLite can meet on a disk into a sentence; its other errors are bugs and pass."""
        try:
            yield
        except sqlite3.Error as error:
            trouble = _SQLITE_TROUBLE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
            if trouble is None:
                raise
            raise InputError(f"{self.path} {trouble}.") from error


class Journal(JobFile):
    """The results of a scoring job. They are on the disk a second later, with the next ones, or when it is closed."""

    def __init__(self, path: Path, header: dict[str, str], resume: bool):
        """Open the journal at `path`, or make it where there is none; raises as JobFile.

        Args:
            path: where.
            header: the SHA-256 of the input's prompts ("input"), the engine's key ("engine"), the part of the input
                that the job scores ("shard"), and which passes may be left out, if any may ("early").
            resume: as JobFile.
        """
        early = header.get("early")
        super().__init__(path, {"format": FORMAT} | header, _HEADER, _table(early), resume)
        self._columns = (*_COLUMNS, *EARLY_COLUMNS) if early else _COLUMNS
        with self._explained():
            self._db.execute(f"PRAGMA cache_size = -{CACHE}")
        self._committed = time.monotonic()
        self._closed = False

    def find_all(self, keys: Sequence[bytes]) -> dict[bytes, Result]:
        """Return the results of those of the keys that have one."""
        found: dict[bytes, Result] = {}
        for start in range(0, len(keys), AT_ONCE):
            some = keys[start : start + AT_ONCE]
            marks = ",".join("?" * len(some))
            with self._explained():
                rows = self._db.execute(f"SELECT * FROM results WHERE prompt IN ({marks})", some).fetchall()
            for key, norm, alignment, score, memorized, *early in rows:
                found[key] = norm, alignment, score, None if memorized is None else bool(memorized), *early
        return found

    def put(self, keys: Sequence[bytes], results: Results) -> None:
        """Keep the results of the B prompts with these keys; none of them may have one yet."""
        found = results.to_dict()
        rows = list(zip(keys, *(found[name] for name in self._columns), strict=True))
        marks = ", ".join("?" * (1 + len(self._columns)))
        with self._explained():
            self._db.executemany(f"INSERT INTO results VALUES ({marks})", rows)
            if time.monotonic() - self._committed > COMMIT_SECONDS:
                self._db.commit()
                self._committed = time.monotonic()

    def note(self, key: str, value: str) -> None:
        """Keep a fact about the job, at once."""
        self.insert("INSERT OR REPLACE INTO header VALUES (?, ?)", [(key, value)])

    def noted(self, key: str) -> str | None:
        """Return a fact that was kept."""
        row = self.find("SELECT value FROM header WHERE key = ?", key)
        return row[0] if row else None

    def close(self) -> None:
        """Put everything on the disk and give the lock back; once more does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            with self._explained():
                self._db.commit()
        finally:
            super().close()


def _table(early: str | None) -> str:
    """Return the SQL that makes the table of results where these passes may be left out."""
    if early is None:
        return _TABLE
    # What the screen passed has no norm, and is clean.
    return _EARLY_TABLE.format(known="CHECK (norm NOT NULL OR memorized IS 0)" if early == "screen" else "NOT NULL")


def prompt_key(prompt: str) -> bytes:
    """Return the SHA-256 of a prompt's text."""
    return hashlib.sha256(prompt.encode()).digest()


def ids_key(ids: Indices) -> bytes:
    """Return what a journal knows prompts by that are equal to the model: a digest of their token ids [T · L]."""
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
