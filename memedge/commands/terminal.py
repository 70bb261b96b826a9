"""What the command line prints: tables for people, JSON for machines."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # these pull in numpy, which --help does not need
    from memedge.calibration.calibrate import Calibrated
    from memedge.detector import EngineInfo
    from memedge.doctor import Finding
    from memedge.engine.manifest import Calibration, Drift, Estimate, Manifest, PromptList
    from memedge.engine.plans import Plan
    from memedge.evaluation.figures import Evaluation, Figure
    from memedge.explain import Explanation
    from memedge.measure.latency import Bench
    from memedge.results import Verdict
    from memedge.scoring.job import JobSummary

LABELS = {True: "[bold red]MEMORIZED[/]", False: "[green]ok[/]", None: "no verdict"}

BAR = 20  # characters of the longest bar


def print_json(value: Any) -> None:
    """Print any of our results; files and folders become their path."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode() + "\n")


def say(text: str) -> None:
    """Tell the person at the terminal something that is not the result: on stderr."""
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


def print_verdicts(verdicts: Sequence["Verdict"], info: "EngineInfo") -> None:
    table = Table("prompt", "verdict", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for name in ("score", "norm", "alignment", "passes"):
        table.add_column(name, justify="right", no_wrap=True)
    for v in verdicts:
        prompt = escape(v.prompt) if v.prompt else "[dim](empty)[/]"
        note = " [yellow](truncated)[/]" if v.truncated else ""
        numbers = [_number(value) for value in (v.score, v.norm, v.alignment)]
        table.add_row(prompt + note, LABELS[v.memorized], *numbers, str(v.passes))
    Console().print(table)
    first = verdicts[0]
    if first.memorized is None:
        say(f"No verdicts: {first.reason}.")
    else:
        say(f"Memorized: a score of at least {first.threshold:.4g}, the threshold calibrated for {info.key}.")


def print_explanation(explanation: "Explanation", info: "EngineInfo") -> None:
    """Print the prompt with each word on its colour, and a table that says the same without colours."""
    from memedge import heat

    deepest, end, line = heat.scale(explanation), 0, Text()
    table = Table("word", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    table.add_column("significance", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for word in explanation.words:
        line.append(explanation.prompt[end : word.start])
        end = word.end
        if word.significance is None:
            line.append(word.text, "dim strike")
            table.add_row(escape(word.text), "not read")
            continue
        red, green, blue = heat.colour(word.significance, deepest)
        line.append(word.text, f"black on rgb({red},{green},{blue})")
        length = round(BAR * abs(word.significance) / deepest)
        table.add_row(escape(word.text), f"{word.significance:+.4f}", ("█" if word.significance > 0 else "░") * length)
    console = Console()
    if explanation.words:
        console.print(line, soft_wrap=True)
        console.print(table)
    title = heat.title(explanation)
    unit = "pass" if explanation.passes == 1 else "passes"
    backward = f", {explanation.passes} backward" if explanation.method == "gradient" else ""
    say(f"{title[0].upper()}{title[1:]}, on {info.key}; {explanation.passes} {unit}{backward}.")
    if explanation.method == "mask" and explanation.kind == "norm":
        say("It is the norm alone: this engine is not calibrated, and nobody published weights for it.")


def print_summary(summary: "JobSummary", info: "EngineInfo") -> None:
    verdict = "no verdicts (not calibrated)" if summary.memorized is None else f"{summary.memorized} memorized"
    say(
        f"{summary.output}: {summary.rows} rows, {summary.unique} different prompts, {summary.scored_now} scored in "
        f"this run on {info.key}, {verdict}, {summary.truncated} truncated."
    )


def print_info(info: "EngineInfo") -> None:
    manifest = info.manifest
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in (
        ("engine", f"{info.path} (verified)"),
        ("checkpoint", f"{manifest.source.id}, sha256 {manifest.source.sha256[:16]}…"),
        ("prediction", manifest.prediction_type),
        ("latents", " × ".join(map(str, manifest.latent_shape))),
        ("prompts", _prompts(manifest)),
        ("timesteps", f"norm at {manifest.timesteps[0]}, alignment at {manifest.timesteps[1]}"),
        *(("note", note) for note in manifest.notes),
        ("draws", f"{manifest.draws} (seed {manifest.seed})"),
        ("runs on", f"{info.provider}, {info.precision}, {info.threads} threads"),
        ("size", _size(manifest)),
        ("work", _work(manifest)),
        ("parity", _parity(manifest)),
        *([("int8 drift", _drift(manifest.drift))] if manifest.drift else []),
        ("exported by", ", ".join(f"{tool} {version}" for tool, version in manifest.tools.items())),
        *([("calibration", _uncalibrated(info))] if info.calibration is None else _calibration(info.calibration)),
    ):
        table.add_row(f"[bold]{name}[/]", escape(value))
    Console().print(table)


def print_calibrated(done: "Calibrated") -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _calibration(done.calibration):
        table.add_row(f"[bold]{name}[/]", escape(value))
    Console().print(table)
    say(f"{done.engine} is calibrated for {done.key}.")


def print_evaluation(evaluation: "Evaluation", output: Path, json: bool) -> None:
    """Print the figures, or all but the single prompts as JSON; then what to keep in mind, and where the report is."""
    if json:
        everything = msgspec.to_builtins(evaluation)
        del everything["prompts"]
        print_json(everything)
    else:
        table = Table("detector", box=None, pad_edge=False)
        table.columns[0].overflow = "fold"
        for name in ("n", "AUC", "TPR@1%FPR", "TPR@3%FPR", "passes", "s/prompt"):
            table.add_column(name, justify="right", no_wrap=True)
        for line in evaluation.findings.lines:
            figures = (_figure(figure) for figure in (line.auc, line.tpr_1, line.tpr_3))
            table.add_row(line.detector, str(line.draws), *figures, f"{line.passes:.4g}", f"{line.seconds:.3g}")
        Console().print(table)
    for caution in evaluation.cautions:
        say(f"Warning: {caution}")
    say(f"{output / 'report.html'}: the report; report.json and prompts.csv beside it.")


def print_findings(findings: Sequence["Finding"]) -> None:
    colours = {"active": "green", "missing": "yellow", "broken": "bold red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for f in findings:
        table.add_row(f"[bold]{f.part}[/]", f"[{colours[f.state]}]{f.state}[/]", escape(f.detail))
    Console().print(table)


def print_export(manifest: "Manifest", output: Path, seconds: float, peak: int) -> None:
    say(f"{output}: {manifest.precision}, {_size(manifest)}, made in {seconds:.0f} s with {peak / 1e9:.1f} GB at peak.")
    say(f"Largest differences from the original in fp32: {_parity(manifest)}.")
    for note in manifest.notes:
        say(f"Note: {note}")
    if manifest.drift:
        say(f"int8 against the same engine in fp32: {_drift(manifest.drift)}.")


def print_plans(plans: Sequence["Plan"]) -> None:
    table = Table("plan", "target", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for name in ("MB", "seconds", "peak MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for p in plans:
        numbers = (_short(value) for value in (p.size / 1e6, p.seconds, p.peak_memory / 1e6))
        table.add_row(p.name, p.target.upper(), *numbers)
    Console().print(table)
    gpus = ", ".join(sorted({p.gpu or p.target.upper() for p in plans}))
    say(f"For {gpus}, with TensorRT {plans[0].version}: calls of up to {plans[0].most} rows.")


def print_bench(bench: "Bench") -> None:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    heads = "batch draws calls first,ms p50,ms p95,ms p99,ms prompts,/s GFLOP of,peak host,µs host,share"
    for name in heads.split():
        table.add_column(name.replace(",", "\n"), justify="right", no_wrap=True)
    for c in bench.cases:
        table.add_row(
            *(str(count) for count in (c.batch, c.draws, c.calls)),
            *(_short(1e3 * seconds) for seconds in (c.first_call_s, c.p50_s, c.p95_s, c.p99_s)),
            _short(c.prompts_per_s),
            _short(c.flops_per_prompt / 1e9),
            "—" if c.gemm_fraction is None else f"{c.gemm_fraction:.0%}",
            f"{c.host_us:.0f}",
            f"{c.host_fraction:.1%}",
        )
    Console().print(table)
    say(
        f"{bench.checkpoint} on {bench.provider}, {bench.precision}, threads: {bench.threads}. Loaded in "
        f"{bench.load_s:.2f} s, {bench.peak_memory_bytes / 1e6:.0f} MB at peak. Times are per call, GFLOP per prompt, "
        "host is what a call spends outside the model."
    )
    if bench.gemm_gflops is not None:
        say(
            f"Peak: {bench.gemm_gflops:.0f} GFLOP/s, the fastest float32 matrix product in NumPy during this run, on "
            "as many threads."
        )


@contextmanager
def phases() -> Iterator[Callable[[str], None]]:
    """Yield a callback that begins a phase of the work: what is going on, and how long each took, on stderr."""
    console = Console(stderr=True)
    columns = SpinnerColumn(finished_text="·"), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        phase: tuple[str, float] | None = None

        def end() -> None:
            if phase and console.is_terminal:
                progress.update(progress.task_ids[-1], completed=1)
            elif phase:
                say(f"{phase[0]}: {time.perf_counter() - phase[1]:.1f} s")

        def begin(name: str) -> None:
            nonlocal phase
            end()
            phase = name, time.perf_counter()
            progress.add_task(name, total=1)

        yield begin
        end()


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) that draws a bar on stderr, where that is a terminal."""
    columns = TextColumn(description), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"


def _figure(figure: "Figure") -> str:
    return f"{figure.value:.3f}\n[dim]\\[{figure.low:.3f}, {figure.high:.3f}][/]"


def _short(value: float) -> str:
    """Return at least three digits, and no power of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _size(manifest: "Manifest") -> str:
    return f"{sum(entry.size for entry in manifest.files.values()) / 1e6:.1f} MB"


def _prompts(manifest: "Manifest") -> str:
    pooled = f", and a pooled state of width {manifest.pooled_width}" if manifest.pooled_width else ""
    return f"{manifest.tokens} tokens of width {manifest.state_width}{pooled}"


def _work(manifest: "Manifest") -> str:
    flops = manifest.flops
    return (
        f"{flops.remaining / 1e9:.4g} of {flops.unet / 1e9:.4g} GFLOP per UNet row ({flops.prefix / 1e9:.3g} cached), "
        f"{flops.text_encoder / 1e9:.3g} per prompt in the text encoder"
    )


def _parity(manifest: "Manifest") -> str:
    p = manifest.parity
    return (
        f"ε {p.epsilon_relative:.1e}, norm {p.norm_relative:.1e}, alignment {p.alignment_absolute:.1e} (absolute), "
        f"score with γ = (1, 1) {p.score_absolute:.1e} (absolute)"
    )


def _drift(drift: "Drift") -> str:
    auc = "unknown without labels" if drift.auc_change is None else f"{drift.auc_change:+.4f}"
    return (
        f"score with γ = (1, 1) {drift.score_absolute:.1e} (absolute, largest), Spearman {drift.spearman:.4f}, "
        f"ΔAUC {auc}, over {drift.prompts} prompts"
    )


def _uncalibrated(info: "EngineInfo") -> str:
    preset = info.manifest.preset
    if preset is None:
        return f"none for {info.key}: norm and alignment only, no verdicts; run `memedge calibrate`"
    return (
        f"none for {info.key}, so no verdicts: run `memedge calibrate`. score = {preset.gamma_norm:.4g} · norm + "
        f"{preset.gamma_alignment:.4g} · alignment, of {preset.family}: published, not fitted here"
    )


def _calibration(calibration: "Calibration") -> list[tuple[str, str]]:
    """Return the rows of a table: the rule, what it was fitted to, and how good it is."""
    c, found = calibration, calibration.cross_validation
    sign, size = "−" if c.gamma_alignment < 0 else "+", abs(c.gamma_alignment)
    return [
        (
            "calibration",
            f"memorized if {c.gamma_norm:.4g} · norm {sign} {size:.4g} · alignment ≥ {c.threshold:.4g} "
            f"({c.alignment}, {c.operands}), for a false-positive rate of {c.target_fpr:g}",
        ),
        (
            "fitted to",
            f"{_prompt_list(c.memorized, 'memorized')} and {_prompt_list(c.clean, 'clean')} by {c.fitted_by}, {c.date}",
        ),
        (
            f"{found.folds}-fold",
            f"AUC {_estimate(found.auc)}, memorized found {_estimate(found.tpr)}, clean called memorized "
            f"{_estimate(found.fpr)}: judged by what was fitted to the other folds, 95 % intervals",
        ),
    ]


def _prompt_list(prompts: "PromptList", kind: str) -> str:
    return f"{prompts.prompts} {kind} prompts ({prompts.name}, sha256 {prompts.sha256[:16]}…)"


def _estimate(estimate: "Estimate") -> str:
    return f"{estimate.value:.3f} [{estimate.lowest:.3f}, {estimate.highest:.3f}]"
