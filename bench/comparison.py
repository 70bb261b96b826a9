"""From each prompt's statistics to figures with intervals, beside the published ones: a report, and its tables."""

from dataclasses import dataclass

import numpy as np
from published import FAMILIES, Published

from memedge.decision.rule import DEFAULT_ALIGNMENT, DEFAULT_OPERANDS, Rule
from memedge.detector import EngineInfo
from memedge.engine.manifest import Calibration, Preset
from memedge.evaluation.figures import TPRS, auc_and_tprs
from memedge.metrics import RESAMPLES, interval

FIGURES = ("auc", *(f"tpr_{percent}_{convention}" for percent, convention in TPRS))


@dataclass(frozen=True)
class Prompt:
    """One row of the files, with the norm and the alignment on each draw."""

    prompt: str
    memorized: bool
    truncated: bool
    norm: list[float]
    alignment: list[float]


@dataclass(frozen=True)
class Statistic:
    """γ_norm · norm + γ_alignment · alignment, the higher the more memorized.

    `kind` is norm, alignment, score, or calibrated: a score with weights that no published figure is of.
    """

    kind: str
    name: str
    gamma: tuple[float, float]

    def rows(self, draws: int) -> int:
        """Return the UNet rows that it needs per prompt."""
        return draws * sum(weight != 0 for weight in self.gamma)


@dataclass(frozen=True)
class Figure:
    """A figure and its 95 % interval; what is published, and whether it is inside, to three digits."""

    value: float
    low: float
    high: float
    published: float | None
    inside: bool | None

    @staticmethod
    def of(value: float, low: float, high: float, published: float | None) -> "Figure":
        inside = None if published is None else round(float(low), 3) <= published <= round(float(high), 3)
        return Figure(float(value), float(low), float(high), published, inside)


@dataclass(frozen=True)
class Line:
    """All figures of one statistic with n draws, and the seconds it takes per 10 prompts."""

    statistic: Statistic
    draws: int
    figures: dict[str, Figure]
    seconds_per_10: float
    published: Published | None


@dataclass(frozen=True)
class Report:
    """All that was found, and what it holds for."""

    model: str
    checkpoint_sha256: str
    family: str | None
    provider: str
    precision: str
    threads: int
    seed: int
    timesteps: tuple[int, int]
    resamples: int
    memorized_prompts: int
    clean_prompts: int
    truncated_prompts: int
    seconds_per_row: float
    peak_memory_bytes: int
    lines: list[Line]
    not_measured: list[Published]
    prompts: list[Prompt]


def statistics(preset: Preset | None, calibration: Calibration | None) -> list[Statistic]:
    """Return what to compare: the terms alone, and the scores that there are weights for."""
    gamma = (preset.gamma_norm, preset.gamma_alignment) if preset else (1.0, 1.0)
    scores = [_score("score", gamma, "published" if preset else "not fitted")]
    falls = False
    if calibration and (calibration.alignment, calibration.operands) == (DEFAULT_ALIGNMENT, DEFAULT_OPERANDS):
        scores.append(_score("calibrated", (calibration.gamma_norm, calibration.gamma_alignment), "calibrated"))
        falls = not preset and calibration.gamma_alignment < 0
    return [
        Statistic("norm", "norm", (1.0, 0.0)),
        Statistic("alignment", "−alignment" if falls else "alignment", (0.0, -1.0 if falls else 1.0)),
        *scores,
    ]


def _score(kind: str, gamma: tuple[float, float], name: str) -> Statistic:
    return Statistic(kind, f"{Rule(*gamma).formula} (γ {name})", gamma)


def compare(
    statistic: Statistic, draws: int, prompts: list[Prompt], seconds_per_row: float, published: Published | None
) -> Line:
    """Return the figures of one statistic over the first `draws` draws."""
    terms = np.array([[p.norm[:draws], p.alignment[:draws]] for p in prompts]).mean(axis=2)
    values, memorized = terms @ statistic.gamma, np.array([p.memorized for p in prompts])
    pair = values[memorized], values[~memorized]
    known = (
        {"auc": published.auc, "tpr_1_strict": published.tpr_1, "tpr_1_nearest": published.tpr_1} if published else {}
    )
    found = zip(FIGURES, auc_and_tprs(*pair), *interval(auc_and_tprs, *pair), strict=True)
    figures = {name: Figure.of(value, low, high, known.get(name)) for name, value, low, high in found}
    return Line(statistic, draws, figures, 10 * statistic.rows(draws) * seconds_per_row, published)


def evaluate(
    model: str,
    info: EngineInfo,
    prompts: list[Prompt],
    draws: list[int],
    seconds_per_row: float,
    peak_memory_bytes: int,
) -> Report:
    """Return the report on every statistic with each number of draws."""
    manifest = info.manifest
    preset = manifest.preset
    family = FAMILIES[preset.family] if preset else None
    published = family.figures if family else {}
    memorized = sum(p.memorized for p in prompts)
    return Report(
        model=model,
        checkpoint_sha256=manifest.source.sha256,
        family=preset.family if preset else None,
        provider=info.provider,
        precision=info.precision,
        threads=info.threads,
        seed=manifest.seed,
        timesteps=manifest.timesteps,
        resamples=RESAMPLES,
        memorized_prompts=memorized,
        clean_prompts=len(prompts) - memorized,
        truncated_prompts=sum(p.truncated for p in prompts),
        seconds_per_row=seconds_per_row,
        peak_memory_bytes=peak_memory_bytes,
        lines=[
            compare(statistic, n, prompts, seconds_per_row, published.get((statistic.kind, n)))
            for n in draws
            for statistic in statistics(preset, info.calibration)
        ],
        not_measured=list(family.not_measured) if family else [],
        prompts=prompts,
    )


def markdown(report: Report) -> str:
    """Return the tables, and what they hold for."""
    about = (
        f"{report.memorized_prompts} memorized and {report.clean_prompts} clean prompts, {report.truncated_prompts} of "
        f"all truncated; {report.provider}, {report.precision}, threads: {report.threads}; seed {report.seed}, "
        f"timesteps {report.timesteps[0]} and {report.timesteps[1]}; {report.seconds_per_row:.3g} s per UNet row, "
        f"{report.peak_memory_bytes / 1e6:.0f} MB at peak."
    )
    head = ("statistic", "n", "AUC [95 %]", "published", "TPR@1%FPR strict", "nearest", "published")
    head += ("TPR@3%FPR strict", "nearest", "s / 10 prompts", "published, GPU")
    found = _table(head, [_row(line) for line in report.lines])
    whose = "none for this model"
    if report.family:
        whose = f"of {FAMILIES[report.family].model} (family: {report.family})"
    notes = (
        f"Published figures: {whose}; inside or outside of our 95 % interval, the percentiles of {report.resamples} "
        "resamples, positives and negatives apart. TPR strict: at an FPR of at most 1 (3) %; nearest: at the FPR "
        "nearest to it; the papers do not say which is theirs. Seconds are this machine's and the authors' GPU's."
    )
    head = ("published only, not measured here", "AUC", "TPR@1%FPR", "s / 10 prompts, GPU")
    others = [(p.method, f"{p.auc:.3f}", f"{p.tpr_1:.3f}", f"{p.seconds_per_10:.2f}") for p in report.not_measured]
    parts = [f"# {report.model}", about, found, notes, *([_table(head, others)] if others else [])]
    return "\n\n".join(parts) + "\n"


def _row(line: Line) -> tuple[str, ...]:
    figures = line.figures
    cells = {name: f"{f.value:.3f} [{f.low:.3f}, {f.high:.3f}]" for name, f in figures.items()}
    seconds = line.published.seconds_per_10 if line.published else None
    return (
        line.statistic.name,
        str(line.draws),
        cells["auc"],
        _published(figures["auc"]),
        cells["tpr_1_strict"],
        cells["tpr_1_nearest"],
        _published(figures["tpr_1_strict"], figures["tpr_1_nearest"]),
        cells["tpr_3_strict"],
        cells["tpr_3_nearest"],
        f"{line.seconds_per_10:.3g}",
        "none published" if seconds is None else f"{seconds:.2f}",
    )


def _published(*figures: Figure) -> str:
    """Return the published figure, and where it is; both places if they differ."""
    if figures[0].published is None:
        return "none published"
    places = dict.fromkeys("inside" if figure.inside else "outside" for figure in figures)
    return f"{figures[0].published:.3f} ({', '.join(places)})"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))
