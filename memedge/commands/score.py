"""`memedge score INPUT… -o OUTPUT`: files of prompts."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memedge.commands import terminal
from memedge.commands.optional_value import LOCAL, RayCommand
from memedge.commands.options import (
    EngineOption,
    JsonOption,
    OverwriteOption,
    PrecisionOption,
    ProviderOption,
    ResumeOption,
    TargetFprOption,
    ThreadsOption,
    ThresholdOption,
    app,
    load_detector,
)
from memedge.commands.score_output import (
    STREAM,
    FormatOption,
    OutputOption,
    ReportOption,
    SortOption,
    TopOption,
    check_stdout,
    opened_output,
    say_at_the_end,
)
from memedge.engine.errors import InputError

if TYPE_CHECKING:
    from memedge.commands.early_scorer import EarlyScorer
    from memedge.detector import Detector, EngineInfo
    from memedge.prompts.columns import Columns
    from memedge.prompts.inputs import InputFile
    from memedge.scoring.job import Job, JobSummary, Tokenize
    from memedge.scoring.mapper import Mapper
    from memedge.scoring.record import Judge
    from memedge.scoring.tally import Tally
    from memedge.scoring.workers import Scorer

Early = Literal["proven", "conformal", "screen"]
SourcesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="Prompts: .txt .csv .tsv .jsonl .parquet; files, patterns, folders, - for stdin.",
    ),
]


def _batch_size(value: str) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not value.isdecimal() or int(value) < 1:
        raise typer.BadParameter(f"{value!r} is neither a number of at least 1 nor auto.")
    return int(value)


@app.command(cls=RayCommand)
def score(
    sources: SourcesArgument,
    output: OutputOption,
    column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The column of the prompts.", show_default="prompt, or the only caption or text"
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(metavar="all|none|NAME,...", help="Other columns that the output has too.")
    ] = "all",
    id_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="A column that is kept, and stands in front.")
    ] = None,
    format: FormatOption = None,
    input_format: Annotated[
        Literal["txt", "csv", "tsv", "jsonl", "parquet"] | None,
        typer.Option(help="Of stdin.", show_default="txt"),
    ] = None,
    sort: SortOption = None,
    top: TopOption = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only part I, from 1, of N; `memedge merge` joins them.")
    ] = None,
    report: ReportOption = None,
    workers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Processes; each has a GPU to itself where there are GPUs.")
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Actors of a Ray cluster: host:port, auto, or nothing for one made here.",
        ),
    ] = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    early: Annotated[
        Early | None,
        typer.Option(
            help="Passes to leave out, as detect does: prompts may be decided without a score.", show_default="none"
        ),
    ] = None,
    batch_size: Annotated[
        Any,
        typer.Option(
            metavar="N|auto",
            parser=_batch_size,
            help="UNet rows (prompt × timestep × draw) per call; auto measures what is fastest here.",
            show_default="what memory surely allows",
        ),
    ] = None,
    threshold: ThresholdOption = None,
    target_fpr: TargetFprOption = None,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Score files of prompts, resumably.

    A run that was cut off loses nothing and is continued with --resume.

    The output has the columns prompt, norm, alignment, score, memorized and truncated, one row per input row, and the
    input's other columns behind them. Prompts that are equal to the model are scored once. With --early, behind
    truncated stand the columns passes and reason, and what was not computed is empty.
    """
    from memedge.prompts.corpus import Corpus
    from memedge.scoring.job import Job
    from memedge.scoring.ordering import Order
    from memedge.scoring.reading import Finished
    from memedge.scoring.report import check_report
    from memedge.scoring.shard import Shard
    from memedge.scoring.tally import Tally

    part = Shard.parse(shard) if shard else None
    order = Order(bool(sort), top)
    _check_combination(output, part is not None, order, resume, json)
    if ray and workers > 1:
        raise InputError("--workers are processes of this machine, and --ray has its own: leave one of them out.")
    if report:
        check_report(report)
    with ExitStack() as stack:
        files = stack.enter_context(_opened_input(sources, input_format))
        place = stack.enter_context(opened_output(output, format))
        read = [*(one.file.path for one in files), *(path for path in map(Path, sources) if path.is_dir())]
        place.check(read, overwrite=overwrite or resume)  # before an engine is loaded
        corpus = Corpus(files, _columns(column, keep, id_column))
        info, mapper, tokenize = stack.enter_context(
            _scoring(engine, provider, precision, threads, batch_size, threshold, target_fpr, early, workers, ray)
        )
        if (sort or top) and not info.rule.fitted:
            raise InputError(
                f"{info.path} gives no scores for {info.key}: calibrate it, or leave out --sort and --top."
            )
        job = Job(corpus, place, _judge(info, early), part, order, id_column)
        tally = Tally(job.judge.threshold, job.judge.kind)
        summary = _run(job, mapper, tokenize, tally, resume, overwrite)
        if report and not tally.rows:  # of a job that had finished before
            for row in Finished.at(place).rows():
                tally.add(row.scores, row.number)
        now = "finished before, nothing to do" if summary.finished else f"{summary.scored_now} scored in this run"
        names = [one.file.name for one in files]
        say_at_the_end(summary, job.judge, tally, names, now, report, json, output != STREAM)


def _run(
    job: "Job", mapper: "Mapper", tokenize: "Tokenize", tally: "Tally", resume: bool, overwrite: bool
) -> "JobSummary":
    from memedge.scoring.job import run

    with terminal.progress_of_rows() as progress:
        try:
            return run(
                job,
                mapper,
                tokenize,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
                each=lambda row: tally.add(row.scores, row.number),
            )
        except (KeyboardInterrupt, SystemExit) as ended:
            so_far = f"{progress.phase} came to {progress.so_far}: " if progress.phase else ""
            kept = f"{so_far}what is scored is kept, go on with --resume"
            if isinstance(ended, KeyboardInterrupt):
                raise KeyboardInterrupt(kept) from None
            terminal.say(f"memedge: terminated: {kept}")  # by SIGTERM
            raise


def _check_combination(output: str, sharded: bool, order: Any, resume: bool, json: bool) -> None:
    """Raise InputError for options that exclude each other."""
    sorted_ = order.by_score or order.top is not None
    if sharded and sorted_:
        raise InputError("Shards keep the input's order for `memedge merge`: give --sort and --top there.")
    if output == STREAM and resume:
        raise InputError("What goes to stdout cannot be gone on with: name a file, or leave out --resume.")
    check_stdout(output, json)
    if sharded and Path(output).suffix == ".txt":
        raise InputError("A shard in .txt cannot be merged: name another format, such as .csv.")


def _columns(column: str | None, keep: str, id_column: str | None) -> "Columns":
    from memedge.prompts.columns import Columns

    kept: tuple[str, ...] | None = None if keep == "all" else () if keep == "none" else tuple(keep.split(","))
    if kept is not None and id_column is not None and id_column not in kept:
        kept = (id_column, *kept)
    if kept is not None and (column or "prompt") in kept:
        raise InputError(f"The prompts' column {column or 'prompt'!r} is in the output anyway: leave it out of --keep.")
    return Columns(column, kept, "name the one with the prompts by --column")


@contextmanager
def _opened_input(sources: list[str], input_format: str | None) -> Iterator[tuple["InputFile", ...]]:
    """Yield the files that the arguments stand for."""
    from memedge.prompts.inputs import STDIN, find_files, standard_input
    from memedge.prompts.kinds import file_kind

    if sources == [STDIN]:
        with standard_input(file_kind(Path(f"stdin.{input_format or 'txt'}"))) as files:
            yield files
    elif STDIN in sources:
        raise InputError("Standard input and files cannot be scored together: give one of them.")
    elif input_format:
        raise InputError("--input-format is of standard input: leave it out, files are known by their names.")
    else:
        yield find_files(sources)


@contextmanager
def _scoring(
    engine: Path | None,
    provider: str,
    precision: str | None,
    threads: int | None,
    batch_size: int | Literal["auto"] | None,
    threshold: float | None,
    target_fpr: float | None,
    early: Early | None,
    workers: int,
    ray: str | None,
) -> Iterator[tuple["EngineInfo", "Mapper", "Tokenize"]]:
    """Yield what runs, what scores batches of prompts, and the tokenizer."""
    from memedge.engine.directory import EngineDirectory
    from memedge.engine.machine import usable_processors
    from memedge.engine.tokenizer import PromptTokenizer
    from memedge.scoring.mapper import here
    from memedge.scoring.workers import processes

    if workers > 1 and threads is None:
        threads = max(1, usable_processors() // workers)
    loading = partial(
        load_detector, engine, provider, precision, threads, batch_size, threshold=threshold, target_fpr=target_fpr
    )
    opening = partial(_opened_scorer, loading, early)
    if workers == 1:
        scorer = opening()
        with _on_ray(scorer, ray) if ray else nullcontext(here(scorer.score)) as mapper:
            yield scorer.info, mapper, scorer.engine.tokenize
        return
    with processes(opening, workers, provider) as team:
        directory = EngineDirectory.open(team.info.path)
        yield team.info, team.mapper, PromptTokenizer(directory.tokenizers, directory.token_lengths)


def _opened_scorer(loading: Callable[[], "Detector"], early: Early | None) -> "Detector | EarlyScorer":
    """Return what scores, on an engine that is opened; raises InputError if it cannot leave out passes in this way."""
    from memedge.commands.early_scorer import EarlyScorer

    return EarlyScorer(loading(), early) if early else loading()


def _on_ray(scorer: "Scorer[EngineInfo]", address: str) -> AbstractContextManager["Mapper"]:
    from memedge.integrations.ray_cluster import on_ray

    return on_ray(scorer, None if address == LOCAL else address)


def _judge(info: "EngineInfo", early: Early | None) -> "Judge":
    from memedge.decision.reasons import rule_in_words, threshold_in_words
    from memedge.scoring.record import Judge

    rule = info.rule
    return Judge(
        fingerprint=info.fingerprint,
        engine=str(info.path),
        checkpoint=info.manifest.source.id,
        key=info.key,
        rule=rule_in_words(rule) + (f"; passes left out: {early}" if early else ""),
        threshold=rule.threshold,
        point="" if rule.threshold is None else threshold_in_words(rule),
        kind="score" if rule.fitted else "norm",
        early=early,
    )
