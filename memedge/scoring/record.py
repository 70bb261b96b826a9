"""How a finished output was made: what `--resume` and `memedge merge` compare, and what a reader may want to know."""

from pathlib import Path
from typing import Literal

import msgspec

from memedge.engine import atomic
from memedge.engine.errors import InputError

FILES = 100  # names of input files that a record keeps
_NAMES = {
    "format": "version of memedge",
    "input": "input",
    "engine": "engine, calibration, threshold, provider or precision",
    "shard": "shard",
    "early": "choice of --early",
    "columns": "choice of columns",
    "order": "order or number of rows",
}


class Part(msgspec.Struct, frozen=True):
    """A file of an output: its name, how many rows it has, and its size in bytes."""

    name: str
    rows: int
    bytes: int


class Judge(msgspec.Struct, frozen=True):
    """What scored and judged.

    Attributes:
        fingerprint: of all that scores and verdicts depend on: engine, calibration, what runs it, and the threshold.
        engine: the engine's path.
        checkpoint: what it was exported from.
        key: what ran: "<provider>-<precision>".
        rule: how norm and alignment make a score and a verdict, in words.
        threshold: of the score, or None.
        point: the threshold in words, with where it comes from if that is not the calibration.
        kind: "score", or "norm" where nothing makes a score of norm and alignment.
        early: which passes may be left out, as `Detector.detect` has it; None: none, and all statistics are there.
    """

    fingerprint: str
    engine: str = ""
    checkpoint: str = ""
    key: str = ""
    rule: str = ""
    threshold: float | None = None
    point: str = ""
    kind: Literal["score", "norm"] = "score"
    early: str | None = None


class Record(msgspec.Struct, frozen=True):
    """How an output was made.

    Attributes:
        input: SHA-256 of all the input's prompts, each behind its length.
        files: names of the input's files, the first of them.
        judge: what scored and judged.
        columns: of the output, in their order.
        input_rows: rows of the whole input, of all shards.
        unique: distinct prompts among the rows scored here, by token ids.
        memorized: rows judged memorized, or None if the engine is not calibrated.
        truncated: rows whose prompt was longer than the text encoder reads.
        parts: the files.
        shard: "I/N", if the input was divided.
        order: "input", "score", or "score, top K".
        memedge: the version that wrote it.
        format: of this record.
    """

    input: str
    files: list[str]
    judge: Judge
    columns: list[str]
    input_rows: int
    unique: int
    memorized: int | None
    truncated: int
    parts: list[Part]
    shard: str | None
    order: str
    memedge: str
    format: Literal[1] = 1

    @property
    def rows(self) -> int:
        """The output's rows."""
        return sum(part.rows for part in self.parts)

    @staticmethod
    def read(path: Path) -> "Record | None":
        """Return the record in a file, or None if there is none.

        Raises:
            InputError: the file is something else.
        """
        try:
            return msgspec.json.decode(path.read_bytes(), type=Record)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} does not say how an output was made: delete it, and score again with --overwrite."
            ) from error

    def write(self, path: Path) -> None:
        """Write the record to a file, whole or not at all; raises OSError."""
        atomic.write(path, msgspec.json.format(msgspec.json.encode(self)))

    def differing(self, other: "Record", *, but: tuple[str, ...] = ()) -> list[str]:
        """Return what differs between two records that makes their jobs different ones, in words."""
        return [
            words for name, words in _NAMES.items() if name not in but and getattr(self, name) != getattr(other, name)
        ]

    @property
    def engine(self) -> str:
        """The fingerprint of what scored."""
        return self.judge.fingerprint

    @property
    def early(self) -> str | None:
        """Which passes may have been left out."""
        return self.judge.early
