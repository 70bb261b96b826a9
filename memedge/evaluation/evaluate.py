"""`memedge evaluate`: how well detectors tell memorized prompts from clean ones on one engine; a folder with a report.

What is measured is kept beside the folder in a journal, `DIR.partial`, until the folder is written, at once.
"""

import csv
import io
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path

import msgspec
import numpy as np

import memedge
from memedge.decision.rule import Rule
from memedge.detector import Detector, EngineInfo
from memedge.detectors import NAMES, Statistic, make
from memedge.detectors.anisotropy import rule_of, terms
from memedge.engine import atomic, probe
from memedge.engine.engine import Engine
from memedge.engine.errors import InputError
from memedge.engine.places import check_new_folder
from memedge.engine.providers import PROVIDERS
from memedge.evaluation.figures import (
    ANISOTROPY,
    EvaluatedDetector,
    Evaluation,
    EvaluationRun,
    Measured,
    PromptFile,
    ScoredPrompt,
    ScreenFigures,
    find,
)
from memedge.evaluation.measurements import Measurements
from memedge.evaluation.page import page
from memedge.evaluation.screening import screen_figures
from memedge.prompts.audited import AuditLabels
from memedge.prompts.cells import guarded
from memedge.prompts.labelled import Prompts, Sample, select
from memedge.scoring.journal import beside, refuse_unfinished

MOST_DRAWS = 1000
PAGE, DATA, TABLE = "report.html", "report.json", "prompts.csv"

Progress = Callable[[int, int], None]


def evaluate(
    path: str | PathLike[str],
    memorized: str | PathLike[str] | None,
    clean: str | PathLike[str] | None,
    output: str | PathLike[str],
    *,
    audit: str | PathLike[str] | None = None,
    detectors: Sequence[str] | None = None,
    draws: Sequence[int] | None = None,
    seed: int | None = None,
    checkpoint: str | None = None,
    provider: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    resume: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> Evaluation:
    """Measure detectors on two lists of prompts; write a folder with report.html, report.json and prompts.csv.

    Args:
        path: the engine directory.
        memorized: a file of prompts (memedge/prompts/files.py) that the model is known to have memorized.
        clean: a file of prompts that it is known not to have memorized. Prompts in both files are left out.
        output: the folder to make; what is there must be an empty one.
        audit: in place of both files: a folder that `memedge audit` made of the engine's checkpoint. Captions are
            memorized whose pictures were printed.
        detectors: names (memedge/detectors); the others are compared with the first. Default: the score and its terms.
        draws: numbers of noise draws to give figures for; default: the engine's own. Fewer are the first of the most.
        seed: of the noise; default: the engine's own draws, then more from its seed.
        checkpoint: what the engine was exported from, for detectors that differentiate the model.
        provider: as in `Detector.load`.
        precision: as in `Detector.load`.
        threads: as in `Detector.load`.
        resume: go on from the journal of a run that was cut off, if there is one.
        command: how this was asked for: shown in the report.
        progress: called with the UNet evaluations that are done, and those there are in all.

    Raises:
        InputError: a detector, number of draws, list or place that cannot be used; a journal of another job, or one
            and not `resume`.
        EngineError: the directory is no engine, cannot run here as asked, or cannot run such a detector.
        ExportError: the checkpoint cannot be read.

    Examples:
        >>> from memedge import evaluate
        >>> evaluation = evaluate("engine", "memorized.txt", "clean.txt", "report", provider="cpu")
        >>> for line in evaluation.findings.lines:
        ...     print(line.detector, round(line.auc.value, 2))
        anisotropy 0.97
        norm 0.95
        alignment-cond-uncond 0.96
    """
    folder = Path(output)
    _check(detectors, draws, folder, resume)
    labels, lists = _labels(memorized, clean, audit)
    engine = Engine.open(Path(path), provider, precision, threads)
    info = Detector(engine).info
    if labels is not None and labels.checkpoint_sha256 != info.manifest.source.sha256:
        raise InputError(
            f"{audit} is an audit of other weights than {path} was made of: audit {info.manifest.source.id}, or "
            "evaluate an engine of what was audited."
        )
    sample = select(engine, *lists)
    rule = rule_of(engine)
    names = list(dict.fromkeys(detectors or (ANISOTROPY, *terms(rule))))
    counts = sorted(set(draws or (engine.draws,)))
    main = engine.draws if engine.draws in counts else counts[-1]
    statistics = [make(name, engine, counts[-1], seed=seed, checkpoint=checkpoint) for name in _needed(names, rule)]
    header = {
        "format": "1",
        "engine": info.fingerprint,
        "memorized": lists[0].sha256,
        "clean": lists[1].sha256,
        "draws": str(counts[-1]),
        "seed": str(seed),
    }
    with closing(Measurements(beside(folder), header, resume)) as journal:
        size = max(1, engine.rows_per_call // counts[-1])
        measured = _measure(statistics, sample.texts, counts[-1], size, journal, progress)
        if ANISOTROPY in names:
            measured[ANISOTROPY] = _anisotropy(measured, rule)
        lower = tuple(one.name for one in statistics if getattr(one, "sign", 1) < 0)
        chosen = [measured[name] for name in names]
        evaluation = Evaluation(
            run=_run(info, seed, command),
            memorized=_file(lists[0], int(sample.memorized.sum())),
            clean=_file(lists[1], int((~sample.memorized).sum())),
            cautions=[
                *sample.warnings,
                *([labels.caution] if labels else []),
                *_cautions(info, lists, sample, seed, main, ANISOTROPY in measured),
            ],
            rule=rule,
            terms=terms(rule),
            detectors=[EvaluatedDetector(one.name, one.formula, one.passes, one.seconds) for one in chosen],
            findings=find(chosen, sample.memorized, counts, main, rule),
            prompts=_prompts(sample, measured, lower),
            lower=lower,
            screen=_screen(engine, rule, sample, measured, main if seed is None else None),
        )
        _write(evaluation, folder)
        journal.delete()
    return evaluation


def _labels(
    memorized: str | PathLike[str] | None, clean: str | PathLike[str] | None, audit: str | PathLike[str] | None
) -> tuple[AuditLabels | None, tuple[Prompts, Prompts]]:
    """Return the audit, if labels come from one, and memorized and clean prompts."""
    if audit is not None and memorized is None and clean is None:
        labels = AuditLabels.read(audit)
        return labels, labels.prompts()
    if audit is not None or memorized is None or clean is None:
        raise InputError("Labels are needed: give files of memorized and of clean prompts, or an audit, and not both.")
    return None, (Prompts.read(Path(memorized)), Prompts.read(Path(clean)))


def _check(detectors: Sequence[str] | None, draws: Sequence[int] | None, output: Path, resume: bool) -> None:
    """Refuse what cannot end well, before anything is computed."""
    if detectors is not None and not detectors:
        raise InputError("There is no detector to evaluate: name at least one.")
    for name in detectors or ():
        if name not in NAMES:
            raise InputError(f"There is no detector {name!r}: use {', '.join(NAMES)}.")
    if draws is not None and not (draws and all(1 <= n <= MOST_DRAWS for n in draws)):
        raise InputError(f"{list(draws)} are no numbers of draws: give whole numbers from 1 to {MOST_DRAWS}.")
    check_new_folder(output, "name another folder for the report")
    refuse_unfinished(beside(output), resume)


def _needed(detectors: Sequence[str], rule: Rule) -> list[str]:
    """Return what to measure. The anisotropy is made of its two terms, so that these are measured once for all."""
    parts = [terms(rule) if name == ANISOTROPY else (name,) for name in detectors]
    return list(dict.fromkeys(name for part in parts for name in part))


def _anisotropy(measured: dict[str, Measured], rule: Rule) -> Measured:
    """Return what the detector ANISOTROPY gives, from its terms."""
    norm, alignment = (measured[name] for name in terms(rule))
    # A detector is higher for memorized prompts, so this alignment has the sign of its weight already.
    return Measured(
        ANISOTROPY,
        f"{rule.formula}, γ {rule.source} (Asthana & Belagiannis 2026)",
        norm.passes + alignment.passes,
        rule.gamma_norm * norm.values + abs(rule.gamma_alignment) * alignment.values,
        norm.seconds + alignment.seconds,
    )


def _screen(
    engine: Engine, rule: Rule, sample: Sample, measured: dict[str, Measured], draws: int | None
) -> ScreenFigures | None:
    """Return what the screen does, if the engine has one and was evaluated on its own noise: `draws` of it, or None."""
    if rule.screen is None or rule.threshold is None or ANISOTROPY not in measured or draws != engine.draws:
        return None
    called = measured[ANISOTROPY].score(draws) >= rule.threshold
    return screen_figures(engine, rule, sample, called)


def _measure(
    statistics: Sequence[Statistic],
    prompts: Sequence[str],
    draws: int,
    size: int,
    journal: Measurements,
    progress: Progress | None,
) -> dict[str, Measured]:
    """Return the scores of all prompts by each statistic; what the journal lacks is computed, `size` prompts at a time.

    The journal goes if there is nothing in it yet when this fails.
    """
    total, done, measured = round(sum(one.passes for one in statistics) * draws * len(prompts)), 0.0, {}
    try:
        for one in statistics:
            for start in range(0, len(prompts), size):
                if progress:
                    progress(round(done), total)
                some = prompts[start : start + size]
                if journal.get(one.name, some[0]) is None:
                    began = time.perf_counter()
                    scores = one(some)
                    journal.put(one.name, some, scores, (time.perf_counter() - began) / len(some))
                done += one.passes * draws * len(some)
            rows = [row for prompt in prompts if (row := journal.get(one.name, prompt))]
            values, seconds = zip(*rows, strict=True)
            # The median: the first calls find caches cold.
            cost = float(np.median(seconds)) / draws
            measured[one.name] = Measured(one.name, one.formula, one.passes, np.stack(values), cost)
    except BaseException:
        if not len(journal):
            journal.delete()
        raise
    if progress:
        progress(total, total)
    return measured


def _prompts(sample: Sample, measured: dict[str, Measured], lower: tuple[str, ...]) -> list[ScoredPrompt]:
    columns = {name: (-one.values if name in lower else one.values).tolist() for name, one in measured.items()}
    return [
        ScoredPrompt(text, bool(label), bool(cut), {name: rows[place] for name, rows in columns.items()})
        for place, (text, label, cut) in enumerate(zip(sample.texts, sample.memorized, sample.truncated, strict=True))
    ]


def _cautions(
    info: EngineInfo, lists: tuple[Prompts, Prompts], sample: Sample, seed: int | None, draws: int, judged: bool
) -> list[str]:
    """Return what makes the figures mean less than they seem to, in sentences; `judged`: verdicts might be given."""
    found, clean, manifest, calibration = [], int((~sample.memorized).sum()), info.manifest, info.calibration
    for percent in (1, 3):
        if not clean * percent // 100:
            found.append(
                f"With {clean} clean prompts, an FPR of at most {percent} % means no false positive at all: give at "
                f"least {-(-100 // percent)} clean prompts to measure it."
            )
    if not judged:
        return found
    if calibration is None:
        found.append(f"The engine is not calibrated for {info.key}: there is no threshold, so there are no verdicts.")
        return found
    fitted = {calibration.memorized.sha256, calibration.clean.sha256}
    if same := [prompts.name for prompts in lists if prompts.sha256 in fitted]:
        found.append(
            f"The engine was calibrated on {' and '.join(same)}, so these verdicts look better than others will: fit "
            "on one split, report on another."
        )
    if draws != manifest.draws or seed is not None:
        found.append(
            f"The threshold was calibrated for n = {manifest.draws} and the engine's own noise, not for the noise "
            "evaluated here."
        )
    return found


def _run(info: EngineInfo, seed: int | None, command: str) -> EvaluationRun:
    manifest = info.manifest
    return EvaluationRun(
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        engine=str(info.path),
        checkpoint=manifest.source.id,
        checkpoint_sha256=manifest.source.sha256,
        engine_fingerprint=info.fingerprint,
        provider=info.provider,
        precision=info.precision,
        threads=info.threads,
        timesteps=manifest.timesteps,
        draws=manifest.draws,
        noise_seed=manifest.seed,
        seed=seed,
        versions={"memedge": memedge.__version__, "Python": platform.python_version(), **_versions()},
    )


def _versions() -> dict[str, str]:
    names = ("numpy", *(row.distribution for row in reversed(PROVIDERS.values())), "scipy")
    return {name: found for name in names if (found := probe.installed(name))}


def _file(prompts: Prompts, evaluated: int) -> PromptFile:
    return PromptFile(prompts.name, prompts.sha256, len(prompts.texts), evaluated)


def _write(evaluation: Evaluation, output: Path) -> None:
    with atomic.folder(output) as folder:
        (folder / PAGE).write_text(page(evaluation), encoding="utf-8")
        (folder / DATA).write_bytes(msgspec.json.format(msgspec.json.encode(evaluation)) + b"\n")
        (folder / TABLE).write_text(_table(evaluation), encoding="utf-8", newline="")


def _table(evaluation: Evaluation) -> str:
    """Return the prompts as CSV, with the score of each detector at the main number of draws; cosines as measured."""
    names, text = [one.name for one in evaluation.detectors], io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["prompt", "label", "truncated", *names])
    for one in evaluation.prompts:
        label = "memorized" if one.memorized else "clean"
        scores = [one.score(name, evaluation.findings.draws) for name in names]
        writer.writerow([guarded(one.prompt), label, str(one.truncated).lower(), *scores])
    return text.getvalue()
