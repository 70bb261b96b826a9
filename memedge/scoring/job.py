"""The resumable scoring job: prompt files in, scores out, and nothing scored twice.

Results are kept beside the output in a journal, `OUTPUT.partial` (journal.py), by the prompts' token ids: prompts that
the model cannot tell apart are scored once. The output appears at the end and at once; then the journal goes, and a
record stays that says how the output was made (record.py). A job that ends before that leaves the journal, and the same
job with `resume=True` goes on from it. A job that has finished does nothing when it is resumed; if a part of its output
was deleted, that part is scored again. Files that cannot be read are refused before the journal is made.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import msgspec

import memedge
from memedge.engine.arrays import Bools, Indices
from memedge.engine.errors import InputError
from memedge.prompts.corpus import Contents, Corpus, Digest
from memedge.prompts.files import PromptRow
from memedge.scoring.counts import Counts
from memedge.scoring.journal import Journal, ids_key
from memedge.scoring.mapper import Mapper
from memedge.scoring.ordering import INPUT, Order
from memedge.scoring.output import PART_ROWS, Output, no_room, remove
from memedge.scoring.record import FILES, Judge, Part, Record
from memedge.scoring.row_keys import RowKeys
from memedge.scoring.score_files import Layout, OutputRow, ScoreRow
from memedge.scoring.shard import Shard

BLOCK = 1024  # rows that are tokenized, and looked up in the journal, together

Tokenize = Callable[[Sequence[str]], tuple[Indices, Bools]]
Progress = Callable[[str, int, int | None], None]
Numbered = tuple[int, PromptRow]  # the row's number in the input, from 1


@dataclass(frozen=True)
class Job:
    """What is to be scored, and what is to come out.

    Attributes:
        corpus: the prompts, and which columns are kept.
        output: where the scores go.
        judge: what scores. A journal or an output of another one is refused.
        shard: the part of the rows that this job scores, or None for all.
        order: of the output's rows.
        id_column: the kept column that stands in front.
    """

    corpus: Corpus
    output: Output
    judge: Judge
    shard: Shard | None = None
    order: Order = INPUT
    id_column: str | None = None


@dataclass(frozen=True)
class JobSummary:
    """What a job did. `memorized` and `truncated` count rows that were scored, so a prompt given twice counts twice.

    Attributes:
        rows: rows of the output, one per prompt of the input unless it was asked for fewer.
        unique: distinct prompts among those scored, by token ids.
        scored_now: distinct prompts scored by this run; the rest were in the journal.
        memorized: rows judged memorized; None if the engine is not calibrated.
        truncated: rows whose prompt was longer than the text encoder reads.
        output: the file or folder written.
        parts: its files.
        finished: whether it was all there before this run.
    """

    rows: int
    unique: int
    scored_now: int
    memorized: int | None
    truncated: int
    output: Path
    parts: int
    finished: bool = False

    @staticmethod
    def of(record: Record, output: Path, scored_now: int, *, finished: bool = False) -> "JobSummary":
        """Return the summary of an output from its record."""
        counts = record.unique, scored_now, record.memorized, record.truncated
        return JobSummary(record.rows, *counts, output, len(record.parts), finished)


def ignore(*_: object) -> None:
    """Do nothing: a callback for those who want to know nothing."""


def run(
    job: Job,
    mapper: Mapper,
    tokenize: Tokenize,
    *,
    resume: bool = False,
    overwrite: bool = False,
    batch_size: int = 32,
    part_rows: int = PART_ROWS,
    progress: Progress = ignore,
    each: Callable[[OutputRow], None] = ignore,
) -> JobSummary:
    """Score every distinct prompt of a job once, and write a row per prompt of its input.

    Args:
        job: what to do.
        mapper: scores batches of distinct prompts.
        tokenize: returns ids, int64 [B, T · L], and whether each prompt was cut, bool [B].
        resume: go on from the journal if there is one. Without it a journal is refused, not discarded.
        overwrite: replace an output that is there.
        batch_size: prompts per batch.
        part_rows: rows of each file of a folder.
        progress: called with what is going on, rows done, and rows in all or None.
        each: called with every row, in the input's order, before the output is there; with none of a job that had
            finished before, even if a part of its output is scored again.

    Raises:
        InputError: a file, the output folder or the journal cannot be used.
        Exception: `mapper` or `progress` raised it; the journal stays.
    """
    if batch_size < 1:
        raise InputError(f"A batch of {batch_size} prompts is impossible: use 1 or more.")
    output, corpus = job.output, job.corpus
    output.check([one.file.path for one in corpus.files], overwrite=overwrite or resume)
    contents = corpus.inspect(lambda rows: progress("reading", rows, None))
    layout = Layout(contents.columns, job.id_column, job.shard is not None, job.judge.early is not None)
    layout.check(output.kind, corpus.name)
    running = _Run(job, contents, layout, mapper, tokenize, batch_size, part_rows, progress, each)
    if resume and not overwrite and output.exists and (record := running.finished()):
        return running.complete(record)
    return running.whole(resume, overwrite)


@dataclass(frozen=True)
class _Run:
    job: Job
    contents: Contents
    layout: Layout
    mapper: Mapper
    tokenize: Tokenize
    batch_size: int
    part_rows: int
    progress: Progress
    each: Callable[[OutputRow], None]

    def whole(self, resume: bool, overwrite: bool) -> JobSummary:
        """Score what the journal lacks, and write everything."""
        output = self.job.output
        with closing(self._journal(resume)) as journal:
            if overwrite:
                journal.note("overwrite", "yes")
            if output.exists and journal.noted("overwrite") is None and journal.noted("written") != _mark(output.place):
                raise InputError(f"{output.place} is there already: replace it with --overwrite and --resume.")
            counts = Counts()
            with self._room(), RowKeys(output.place.parent) as keys:
                scored_now = self._score(journal, keys, None)
                rows = self._results(journal, keys, counts, None)
                parts = output.write(self.layout, self.job.order.arrange(rows), self.part_rows)
                record = self._record(parts, counts, len(journal))
                output.complete(record)
                journal.note("written", _mark(output.unfinished))
                output.finish(record)
            journal.delete()
        return JobSummary.of(record, output.place, scored_now)

    def finished(self) -> Record | None:
        """Return the record of what is there if this job made it, or None if a journal says that it goes on.

        Raises:
            InputError: there is no journal, and what is there is another job's, or nothing says whose.
        """
        output = self.job.output
        record = output.record()
        differing = record.differing(self._record([], Counts(), 0)) if record else []
        if output.journal.exists():
            with closing(self._journal(resume=True)) as journal:
                # Else it is of a job that is to replace this output, or that was killed when it had moved it there.
                restoring = record and not differing and journal.noted("overwrite") is None
            return record if restoring else None
        if record and not differing:
            return record
        if record is None:
            raise InputError(
                f"{output.place} is there, and {output.record_path.name}, which says how it was made, is not: replace "
                "it with --overwrite, or name another output."
            )
        raise InputError(
            f"{output.place} is the output of a job with another {' and another '.join(differing)}: replace it with "
            "--overwrite, or name another output."
        )

    def complete(self, record: Record) -> JobSummary:
        """Return the summary of this job, which has finished, after scoring those parts again that are gone."""
        output = self.job.output
        missing = output.missing(record)
        if not missing:
            if output.journal.exists():  # the last that goes
                with closing(self._journal(resume=True)) as journal:
                    journal.delete()
            return JobSummary.of(record, output.place, 0, finished=True)
        if self.job.order.by_score or self.job.order.top is not None:
            raise InputError(
                f"{output.place} is sorted, and lacks {record.parts[missing[0] - 1].name}: replace it with --overwrite."
            )
        return self._restore(record, missing)

    def _restore(self, record: Record, missing: list[int]) -> JobSummary:
        output = self.job.output
        starts = [sum(part.rows for part in record.parts[: number - 1]) for number in missing]
        spans = [range(start, start + record.parts[n - 1].rows) for start, n in zip(starts, missing, strict=True)]
        parts = list(record.parts)
        with closing(self._journal(resume=True)) as journal:
            with self._room(), RowKeys(output.place.parent) as keys:
                scored_now = self._score(journal, keys, spans)
                rows = self._results(journal, keys, Counts(), spans)
                output.unfinished.unlink(missing_ok=True)
                for number, span in zip(missing, spans, strict=True):
                    part = output.write_part(output.unfinished, number, self.layout, islice(rows, len(span)))
                    output.unfinished.replace(output.place / part.name)
                    parts[number - 1] = part
                for _ in rows:  # the end of the input, where it is seen whether it changed
                    pass
                msgspec.structs.replace(record, parts=parts).write(output.record_path)
            journal.delete()
        return JobSummary.of(record, output.place, scored_now)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Turn what the disk refuses into a sentence, and leave no file that is not whole."""
        output = self.job.output
        try:
            yield
        except OSError as error:
            raise no_room(output.place, error, "run again with --resume") from error
        finally:
            remove(output.unfinished)

    def _journal(self, resume: bool) -> Journal:
        job = self.job
        header = {"input": self.contents.sha256, "engine": job.judge.fingerprint, "shard": str(job.shard or "all")}
        if job.judge.early:
            header["early"] = job.judge.early
        return Journal(job.output.journal, header, resume)

    def _record(self, parts: list[Part], counts: Counts, unique: int) -> Record:
        job = self.job
        return Record(
            input=self.contents.sha256,
            files=[one.file.name for one in job.corpus.files[:FILES]],
            judge=job.judge,
            columns=self.layout.names,
            input_rows=self.contents.rows,
            unique=unique,
            memorized=counts.memorized,
            truncated=counts.truncated,
            parts=parts,
            shard=str(job.shard) if job.shard else None,
            order=str(job.order),
            memedge=memedge.__version__,
        )

    def _score(self, journal: Journal, keys: RowKeys, spans: list[range] | None) -> int:
        """Score what the journal lacks, and note all rows' keys; return how many prompts were scored."""
        total, scored = self.contents.rows, 0
        waiting = _Waiting()
        self.progress("scoring", 0, total)
        for batch, results in self.mapper(self._unscored(journal, keys, waiting, spans)):
            journal.put([waiting.keys.pop(prompt)[0] for prompt in batch], results)
            scored += len(batch)
            self.progress("scoring", waiting.done, total)
        self.progress("scoring", total, total)
        return scored

    def _unscored(
        self, journal: Journal, keys: RowKeys, waiting: "_Waiting", spans: list[range] | None
    ) -> Iterator[list[str]]:
        """Yield batches of prompts that the journal lacks."""
        batch: list[str] = []
        for block in _blocks(self._selected(self.job.corpus.bare().rows(), spans)):
            numbers: dict[str, int] = {}  # of the first row of each prompt
            for number, row in block:
                numbers.setdefault(row.prompt, number)
            prompts = list(numbers)
            ids, truncated = self.tokenize(prompts)
            known = {prompt: (ids_key(one), cut) for prompt, one, cut in zip(prompts, ids, truncated, strict=True)}
            for _, row in block:
                keys.add(*known[row.prompt])
            found = journal.find_all([key for key, _ in known.values()])
            seen = found.keys() | {key for key, _ in waiting.keys.values()}
            for prompt, (key, _) in known.items():
                if key in seen:
                    continue
                seen.add(key)
                waiting.keys[prompt] = key, numbers[prompt]
                batch.append(prompt)
                if len(batch) == self.batch_size:
                    waiting.read = numbers[prompt]
                    yield batch
                    batch = []
            waiting.read = block[-1][0]
            self.progress("scoring", waiting.done, self.contents.rows)
        if batch:
            yield batch

    def _results(
        self, journal: Journal, keys: RowKeys, counts: Counts, spans: list[range] | None
    ) -> Iterator[OutputRow]:
        """Yield the rows that the journal has the results of, and count them."""
        changed = f"{self.job.corpus.name} changed while it was scored: delete {journal.path} and score it again."
        digest, total, of_rows = Digest(), self.contents.rows, keys.read()
        for block in _blocks(self._selected(self.job.corpus.rows(), spans, digest)):
            some = list(islice(of_rows, len(block)))
            if len(some) < len(block):
                raise InputError(changed)
            found = journal.find_all(list({key for key, _ in some}))
            for (number, row), (key, cut) in zip(block, some, strict=True):
                norm, alignment, score, memorized, *early = found[key]
                scores = ScoreRow(row.prompt, norm, alignment, score, memorized, cut, *early)
                counts.add(scores)
                out = OutputRow(number, scores, row.kept)
                if spans is None:
                    self.each(out)
                yield out
            self.progress("writing", block[-1][0], total)
        if digest.hexdigest() != self.contents.sha256:
            raise InputError(changed)

    def _selected(
        self, rows: Iterable[PromptRow], spans: list[range] | None, digest: Digest | None = None
    ) -> Iterator[Numbered]:
        """Yield the shard's rows, or those whose places among them are in `spans`; `digest` gets all rows' prompts."""
        shard, place = self.job.shard, 0
        for number, row in enumerate(rows, start=1):
            if digest:
                digest.add(row.prompt)
            if shard is None or shard.holds(row.prompt):
                if spans is None or any(place in span for span in spans):
                    yield number, row
                place += 1


@dataclass
class _Waiting:
    """Prompts that are being scored, in the input's order: their keys, and the rows they come from."""

    keys: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    read: int = 0  # rows read so far

    @property
    def done(self) -> int:
        """How many rows have all that they need."""
        return next((number - 1 for _, number in self.keys.values()), self.read)


def _blocks(rows: Iterator[Numbered]) -> Iterator[list[Numbered]]:
    while block := list(islice(rows, BLOCK)):
        yield block


def _mark(path: Path) -> str:
    """Return what a file or folder keeps when it is moved."""
    state = path.stat()
    return f"{state.st_ino} {state.st_mtime_ns}"
