"""`memedge calibrate`: γ and a threshold for one engine, provider and precision, from prompts whose answer is known."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

import memedge
from memedge.calibration.conformal import conformal_interval
from memedge.calibration.history import check_writable, replace_calibration
from memedge.calibration.statistics import CHOICES, StatisticsJournal
from memedge.decision.rule import DEFAULT_ALIGNMENT, NO_SCREEN_PLANS
from memedge.detector import PROMPTS_PER_BATCH
from memedge.engine.arrays import Floats
from memedge.engine.directory import EngineDirectory
from memedge.engine.engine import Engine
from memedge.engine.errors import InputError, ManifestError, MemedgeError, ProviderError, not_installed, shown
from memedge.engine.manifest import (
    MOST_CLEAN_SCORES,
    Calibration,
    Manifest,
    Operands,
    PromptList,
    Tap,
    key_of,
    read_manifest,
)
from memedge.engine.opening import runnable
from memedge.prompts.labelled import Prompts, Sample, select
from memedge.scoring.journal import ids_key

if TYPE_CHECKING:
    from memedge.calibration.fitting import Fit

FEW = 20  # memorized prompts: as few as the paper calibrates on
_NO_TAPS = "The engine has no taps that a screen could read here: export the model again."
OPEN_VERDICTS = 0.01  # the share δ of verdicts that `early="conformal"` may change


@dataclass(frozen=True)
class Calibrated:
    """A calibration, the engine and the key that it was written under, and warnings about it in sentences.

    `uncalibrated` are the keys of what can run the engine here too, and still gives no verdicts.
    """

    engine: Path
    key: str
    calibration: Calibration
    warnings: tuple[str, ...]
    uncalibrated: tuple[str, ...] = ()


def calibrate(
    path: str | PathLike[str],
    memorized: str | PathLike[str] | Iterable[str] | Prompts,
    clean: str | PathLike[str] | Iterable[str] | Prompts,
    target_fpr: float = 0.01,
    *,
    provider: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    resume: bool = False,
    screen_alpha: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibrated:
    """Fit γ, a threshold (fitting.py) and a screen (screening.py), and write them into the engine's manifest.

    Nothing else in it changes. Where no screen can be had, the calibration says why.

    The statistics of prompts are kept in a journal in the engine directory until then. A calibration that is replaced
    is kept beside the manifest (history.py).

    Args:
        path: the engine directory.
        memorized: a file of prompts, or prompts, that are known to make this very model replicate training images.
        clean: likewise, prompts that are known not to.
        target_fpr: the largest share of these clean prompts that may reach the threshold, in (0, 1).
        provider: as in `Detector.load`. What others run is not calibrated by this. "auto": the first that can run here,
            calibrated or not, so that `Detector.load` will take it.
        precision: as in `Detector.load`. What runs in another is not calibrated by this.
        threads: as in `Detector.load`.
        resume: go on from the journal of a run that was cut off, if there is one. The lists may have changed.
        screen_alpha: the largest share of the memorized prompts which the full rule finds that the screen may pass, in
            (0, 1). Default: 1 / (m + 1) with m such prompts in the list, the least that these can promise.
        progress: called with (prompts scored, prompts in all).

    Raises:
        InputError: a list cannot be used, holds fewer than 5 prompts, or is not told apart from the other by the norm;
            the directory cannot be written to; there is a journal, and not `resume`.
        EngineError: the directory is no engine, or cannot run here as asked.
        MemedgeError: scikit-learn is not installed.

    Examples:
        >>> from memedge import calibrate
        >>> done = calibrate("engine", "memorized.txt", "clean.txt", target_fpr=0.05, provider="cpu")
        >>> done.key, done.calibration.memorized.prompts, done.calibration.clean.prompts
        ('cpu-fp32', 20, 40)
        >>> round(done.calibration.cross_validation.auc.value, 1), done.warnings
        (0.9, ())
    """
    try:
        from memedge.calibration.fitting import fit_best
        from memedge.calibration.screening import fit_screen
    except ImportError as error:
        raise MemedgeError(not_installed("Calibrating", error, "eval")) from None
    if not 0 < target_fpr < 1:
        raise InputError(f"A false-positive rate of {target_fpr:g} is none to aim at: give one between 0 and 1.")
    if screen_alpha is not None and not 0 < screen_alpha < 1:
        raise InputError(f"A share of {screen_alpha:g} is none that a screen can pass: give one between 0 and 1.")
    folder, lists = Path(path), (Prompts.of(memorized), Prompts.of(clean))
    read_manifest(folder)  # a folder that is no engine is called that, writable or not
    check_writable(folder)
    if provider == "auto":
        here = [one for one in runnable(EngineDirectory.open(folder)) if precision in (None, one[1])]
        provider, precision = here[0] if here else ("cpu", precision)
    engine = Engine.open(folder, provider, precision, threads)
    sample = select(engine, *lists)
    manifest, key = engine.directory.manifest, engine.backend.key
    what = f"{key}, {'with' if engine.backend.screens else 'without'} changes at taps"
    identity = hashlib.sha256(msgspec.json.encode(_bare(manifest)) + what.encode()).hexdigest()
    with closing(StatisticsJournal(_journal(folder, key), identity, resume)) as journal:
        taps = manifest.taps if engine.backend.screens else ()
        statistics = _score(engine, sample, journal, len(taps), progress)
        chosen, fitted = fit_best(statistics[:, : 1 + len(CHOICES)], sample.memorized, target_fpr)
        features = statistics[:, [0, 1 + chosen]]
        calibration = _describe(fitted, CHOICES[chosen], features, sample, lists, target_fpr)
        scores = features @ (calibration.gamma_norm, calibration.gamma_alignment)
        changes = _by_tap(statistics[:, 1 + len(CHOICES) :], taps)
        found = fit_screen(changes, scores, sample.memorized, calibration.threshold, screen_alpha) if changes else ""
        if isinstance(found, str):
            why = found or (NO_SCREEN_PLANS if manifest.taps else _NO_TAPS)
            calibration = msgspec.structs.replace(calibration, no_screen=why)
        else:
            calibration = msgspec.structs.replace(calibration, screen=found)
        now = read_manifest(folder)  # other providers may have been calibrated meanwhile
        if _bare(now) != _bare(manifest):
            raise ManifestError(f"{folder} was changed while its prompts were scored: calibrate it again.")
        replace_calibration(folder, now, key, calibration)
        journal.delete()
    warnings = (*sample.warnings, *_doubts(fitted, sample, target_fpr))
    others = (key_of(*one) for one in runnable(engine.directory))
    open_ = tuple(one for one in others if one != key and one not in now.calibrations)
    return Calibrated(folder, key, calibration, warnings, open_)


def calibrate_all(
    path: str | PathLike[str],
    memorized: str | PathLike[str] | Iterable[str] | Prompts,
    clean: str | PathLike[str] | Iterable[str] | Prompts,
    target_fpr: float = 0.01,
    *,
    precision: str | None = None,
    threads: int | None = None,
    resume: bool = False,
    screen_alpha: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Calibrated]:
    """Calibrate an engine for every provider that can run it here, in each of its precisions; as `calibrate`.

    Args:
        path: the engine directory.
        memorized: as in `calibrate`.
        clean: as in `calibrate`.
        target_fpr: as in `calibrate`.
        precision: only those that run in this one.
        threads: as in `Detector.load`.
        resume: go on where a run was cut off: what it had calibrated stays as it is.
        screen_alpha: as in `calibrate`.
        progress: called with (prompts scored, prompts in all) of each in turn.

    Raises:
        ProviderError: nothing can run the engine here, or not in this precision.
        Exception: as `calibrate`.
    """
    folder, lists = Path(path), (Prompts.of(memorized), Prompts.of(clean))
    directory = EngineDirectory.open(folder)
    here = [one for one in runnable(directory) if precision in (None, one[1])]
    if not here:
        raise ProviderError(
            f"No provider can run {folder} here in {precision or 'any precision'}: see `memedge doctor`."
        )
    cut_off = [place for place, one in enumerate(here) if resume and _journal(folder, key_of(*one)).exists()]
    return [
        calibrate(
            folder,
            *lists,
            target_fpr,
            provider=provider,
            precision=own,
            threads=threads,
            resume=resume,
            screen_alpha=screen_alpha,
            progress=progress,
        )
        for provider, own in here[min(cut_off, default=0) :]
    ]


def _journal(folder: Path, key: str) -> Path:
    return folder / f"calibration-{key}.partial"


def _bare(manifest: Manifest) -> Manifest:
    """Return the manifest without calibrations: everything that norm and alignment depend on."""
    return msgspec.structs.replace(manifest, calibrations={})


def _score(
    engine: Engine,
    sample: Sample,
    journal: StatisticsJournal,
    taps: int,
    progress: Callable[[int, int], None] | None,
) -> Floats:
    """Return norm, alignments and changes of each prompt, float64 [B, 1 + len(CHOICES) + C], C channels of the taps.

    What the journal lacks is computed.
    """
    keys = [ids_key(row) for row in sample.ids]
    missing = [row for row, key in enumerate(keys) if journal.get(key) is None]
    batch = max(PROMPTS_PER_BATCH, engine.rows_per_call)
    for start in range(0, len(missing), batch):
        if progress:
            progress(len(keys) - len(missing) + start, len(keys))
        rows = missing[start : start + batch]
        states, late = engine.encode(sample.ids[rows]), range(engine.draws)
        alignments = [
            np.mean([engine.alignments(states, states.all, draw, DEFAULT_ALIGNMENT, pair) for draw in late], axis=0)
            for pair in CHOICES
        ]
        changes = [engine.changes(states, tap) for tap in range(1, taps + 1)]
        own = np.stack([engine.norm(states), *alignments], axis=1)
        journal.put([keys[row] for row in rows], np.concatenate([own, *changes], axis=1))
    if progress:
        progress(len(keys), len(keys))
    return np.array([journal.get(key) for key in keys])


def _by_tap(changes: Floats, taps: Sequence[Tap]) -> list[Floats]:
    """Return the changes of each tap's channels, [B, C]."""
    ends = np.cumsum([tap.channels for tap in taps])[:-1]
    return np.split(changes, ends, axis=1) if taps else []


def _describe(
    fitted: "Fit",
    operands: Operands,
    features: Floats,
    sample: Sample,
    lists: tuple[Prompts, Prompts],
    target_fpr: float,
) -> Calibration:
    counts = int(sample.memorized.sum()), int((~sample.memorized).sum())
    memorized, clean = (PromptList(shown(p.name), p.sha256, n) for p, n in zip(lists, counts, strict=True))
    gamma = fitted.gamma_alignment
    scores = np.sort((features @ (1.0, gamma))[~sample.memorized])[::-1]
    enough = len(features) >= round(1 / OPEN_VERDICTS) - 1
    return Calibration(
        gamma_norm=1.0,
        gamma_alignment=gamma,
        threshold=fitted.threshold,
        alignment=DEFAULT_ALIGNMENT,
        operands=operands,
        target_fpr=target_fpr,
        memorized=memorized,
        clean=clean,
        strength=fitted.strength,
        scale=fitted.scale,
        gain=fitted.gain,
        cross_validation=fitted.cross_validation,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        fitted_by=f"memedge {memedge.__version__}",
        conformal=conformal_interval(features[:, 1], gamma, OPEN_VERDICTS) if enough else None,
        clean_score=float(np.median(scores)),
        clean_scores=tuple(scores[:MOST_CLEAN_SCORES].tolist()),
    )


def _doubts(fitted: "Fit", sample: Sample, target_fpr: float) -> list[str]:
    """Return what makes the calibration less trustworthy than it looks, in sentences."""
    from memedge.calibration.fitting import share

    found, doubts = fitted.cross_validation, []
    memorized, clean = int(sample.memorized.sum()), int((~sample.memorized).sum())
    if clean * target_fpr < 1:
        doubts.append(
            f"With {clean} clean prompts a false-positive rate of {target_fpr:g} cannot be told from one of up to "
            f"{share(0, clean).highest:.2g}: give at least {math.ceil(1 / target_fpr)}."
        )
    if memorized < FEW:
        doubts.append(
            f"With {memorized} memorized prompts the share of them that is found is known only to be between "
            f"{found.tpr.lowest:.2g} and {found.tpr.highest:.2g}: give at least {FEW}."
        )
    if found.auc.lowest <= 0.5:
        doubts.append(
            f"Do not rely on these verdicts: an AUC of {found.auc.value:.3f} (95 % interval {found.auc.lowest:.3f} to "
            f"{found.auc.highest:.3f}) may as well be chance, so memorized prompts are not told from clean ones."
        )
    elif found.tpr.value == 0:
        doubts.append(
            "In cross-validation no memorized prompt reached the threshold: allow more false positives, or see whether "
            "the clean prompts with the highest scores are memorized."
        )
    return doubts
