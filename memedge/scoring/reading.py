"""Finished outputs read back: the rows that were scored, as they were written."""

from collections.abc import Iterator
from dataclasses import dataclass

from memedge.engine.errors import InputError
from memedge.prompts.cells import EARLY_COLUMNS, SCORE_COLUMNS
from memedge.prompts.columns import Columns
from memedge.prompts.corpus import Corpus
from memedge.prompts.files import PromptFile, PromptRow
from memedge.prompts.inputs import InputFile
from memedge.scoring.output import Output
from memedge.scoring.record import Record
from memedge.scoring.score_files import NUMBER, OutputRow, ScoreRow

_TRUTHS = {"true": True, "false": False, "": None}


@dataclass(frozen=True)
class Finished:
    """An output, and how it was made. `corpus` is its files as prompts with all that stands beside them."""

    output: Output
    record: Record

    @staticmethod
    def at(output: Output) -> "Finished":
        """Return what is there.

        Raises:
            InputError: nothing; its record or a part is missing; it is .txt, which cannot be read back.
        """
        place = output.place
        if not output.exists:
            raise InputError(f"{place} does not exist: name what memedge score wrote.")
        record = output.record()
        if record is None:
            raise InputError(f"{output.record_path}, which says how {place} was made, is missing: put it back.")
        if missing := output.missing(record):
            name = record.parts[missing[0] - 1].name
            raise InputError(f"{place} lacks {name} as it was written: score it again with --resume.")
        if output.folder and record.parts:
            output = Output(place, PromptFile.at(place / record.parts[0].name).kind, True)
        if output.kind.format == "txt":
            raise InputError(f"{place} is .txt, which cannot be read back: score again to another format.")
        return Finished(output, record)

    @property
    def corpus(self) -> Corpus:
        """Its files."""
        place = self.output.place
        paths = [place / part.name for part in self.record.parts] if self.output.folder else [place]
        files = tuple(InputFile(PromptFile(path, self.output.kind, str(path))) for path in paths)
        return Corpus(files, Columns("prompt", None))

    def rows(self) -> Iterator[OutputRow]:
        """Yield its rows, with the numbers that they have in it, or in the whole input if it is a shard.

        Raises:
            InputError: there are more or fewer than were written, or no such columns.
        """
        count = 0
        for count, row in enumerate(self.corpus.rows() if self.record.rows else (), start=1):
            yield self._scored(row, count)
        if count != self.record.rows:
            raise InputError(f"{self.output.place} has {count} rows, and had {self.record.rows}: score it again.")

    def _scored(self, row: PromptRow, place: int) -> OutputRow:
        kept = dict(row.kept)
        try:
            number = kept.pop(NUMBER) if self.record.shard else place
            values = [kept.pop(name) for name in SCORE_COLUMNS[1:]]
            early = [kept.pop(name) for name in EARLY_COLUMNS] if self.record.early else []
            if self.output.kind.format in ("csv", "tsv"):
                number = int(number)
                floats = [float(value) if value else None for value in values[:3]]
                values = [*floats, *(_TRUTHS[value] for value in values[3:])]
                early = [float(early[0]), early[1]] if early else []
        except (KeyError, ValueError) as error:
            raise InputError(f"{self.output.place} has other columns than it had ({error}): score it again.") from None
        return OutputRow(number, ScoreRow(row.prompt, *values, *early), kept)
