"""The resumable scoring job: a prompt file in, a score file out, and nothing scored twice.

Results are kept beside the output in a journal, `OUTPUT.partial`, committed batch by batch (journal.py). The output
appears at the end and at once, in the place of a file of that name; then the journal goes. A job that ends before that
leaves the journal. The same job with `resume=True` goes on from it and gives the same bytes. Files that cannot be read
are refused before the journal is made.

`resume=True` without a journal starts from the beginning, so a command with `--resume` can be repeated blindly. After a
job that finished it scores everything again.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from memedge.engine.directory import sha256
from memedge.engine.errors import InputError
from memedge.engine.places import check_folder_of
from memedge.prompts.files import check_format, read_prompts
from memedge.results import Scores
from memedge.scoring.journal import Journal, prompt_key
from memedge.scoring.score_files import ScoreRow, write_scores

BESIDE = ".partial"  # the journal's suffix


@dataclass(frozen=True)
class JobSummary:
    """What a job did. `memorized` and `truncated` count rows of the output, so a prompt given twice counts twice.

    Attributes:
        rows: rows of the output, one per prompt of the input.
        unique: distinct prompts among them.
        scored_now: distinct prompts scored by this run; the rest were in the journal.
        memorized: rows judged memorized; None if the engine is not calibrated.
        truncated: rows whose prompt was longer than the text encoder reads.
        output: the file written.
    """

    rows: int
    unique: int
    scored_now: int
    memorized: int | None
    truncated: int
    output: Path


def score_file(
    score: Callable[[list[str]], Scores],
    source: Path,
    output: Path,
    *,
    engine_key: str,
    resume: bool,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> JobSummary:
    """Score every distinct prompt of `source` once and write a row per prompt to `output`, in input order.

    Args:
        score: scores a list of at most `batch_size` distinct prompts, in order.
        source: prompts, in a format of `memedge.prompts.files`. Read several times; must not change meanwhile.
        output: written in the format of its suffix (`memedge.scoring.score_files`); replaced if it exists.
        engine_key: identifies all that scores depend on: engine, calibration, provider, precision. A journal of
            another key is refused.
        resume: go on from the journal if there is one. Without it a journal is refused, not discarded.
        batch_size: prompts per call of `score` and per commit: what a kill can lose.
        progress: called with (rows done, rows in all) at the start, after each commit, and at the end.

    Raises:
        InputError: a file, the output folder or the journal cannot be used.
        Exception: `score` or `progress` raised it; the journal stays.
    """
    if batch_size < 1:
        raise InputError(f"A batch of {batch_size} prompts is impossible: use 1 or more.")
    suffix = check_format(output)
    check_places(source, output)
    total = sum(1 for _ in read_prompts(source))  # also finds a bad row now, not after hours of scoring
    digest = sha256(source)
    journal_path = output.with_name(f"{output.name}{BESIDE}")
    scored_now = 0
    with closing(Journal(journal_path, digest, engine_key, resume)) as journal:
        if progress:
            progress(0, total)
        for row, batch in _unscored(source, journal, batch_size):
            journal.put(list(batch), score(list(batch.values())))
            scored_now += len(batch)
            if progress:
                progress(row, total)
        if progress:
            progress(total, total)
        tally = _write_output(source, digest, output, suffix, journal)
        journal.delete()
    return JobSummary(
        rows=total,
        unique=tally["unique"],
        scored_now=scored_now,
        memorized=tally["memorized"] if tally["judged"] else None,
        truncated=tally["truncated"],
        output=output,
    )


def check_places(source: Path, output: Path) -> None:
    """Raise InputError if `output` cannot be written where it is, or is the input; `score_file` checks this too."""
    check_folder_of(output, "write the output elsewhere")
    longest = os.pathconf(output.resolve().parent, "PC_NAME_MAX") - len(f"{BESIDE}-journal")
    if len(os.fsencode(output.name)) > longest:
        raise InputError(f"The name of {output} is too long for the files kept beside it: use {longest} bytes at most.")
    if output.is_dir():
        raise InputError(f"{output} is a directory: name a file for the output.")
    if output.exists() and source.exists() and output.samefile(source):
        raise InputError(f"{output} is the input file too: name another file for the output.")


def _unscored(source: Path, journal: Journal, batch_size: int) -> Iterator[tuple[int, dict[bytes, str]]]:
    """Yield batches of distinct prompts that the journal lacks, and the row that each ends at.

    A batch must be in the journal before the next one is asked for.
    """
    batch: dict[bytes, str] = {}
    row = 0
    for row, prompt in enumerate(read_prompts(source), start=1):
        key = prompt_key(prompt)
        if key not in batch and journal.get(key) is None:
            batch[key] = prompt
            if len(batch) == batch_size:
                yield row, batch
                batch = {}
    if batch:
        yield row, batch


def _write_output(source: Path, digest: str, output: Path, suffix: str, journal: Journal) -> Counter[str]:
    """Write all rows beside the output and move them there; return the counts of `JobSummary`."""
    tally = Counter(unique=len(journal))
    changed = f"{source} changed while it was scored: delete {journal.path} and score it again."

    def rows() -> Iterator[ScoreRow]:
        for prompt in read_prompts(source):
            result = journal.get(prompt_key(prompt))
            if result is None:
                raise InputError(changed)
            row = ScoreRow(prompt, *result)
            tally.update(judged=row.memorized is not None, memorized=bool(row.memorized), truncated=row.truncated)
            yield row

    unfinished = output.with_name(f"{output.name}.partial-output")
    try:
        unfinished.unlink(missing_ok=True)  # of a job that was killed here; the journal's lock says it is not alive
        write_scores(unfinished, suffix, rows())
        if sha256(source) != digest:
            raise InputError(changed)
        _sync(unfinished)
        unfinished.replace(output)
        _sync(output.parent)
    except OSError as error:
        raise InputError(
            f"{output} cannot be written ({error.strerror or error}): make room, then run again with --resume."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return tally


def _sync(path: Path) -> None:
    """Return when the file's content, or the folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
