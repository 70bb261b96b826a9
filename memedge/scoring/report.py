"""The report of a scoring run: one HTML page that needs nothing else, no network and no script.

Prompts and file names are not ours. All of them are escaped; what would be invisible or show text in another order is
written out; and the page's own policy lets nothing run or load.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import memedge
from memedge.engine import atomic
from memedge.engine.errors import InputError
from memedge.engine.places import check_folder_of
from memedge.plain import plain
from memedge.reports.document import document, provenance, section, source_hash, style, table
from memedge.scoring.bars import bars, number
from memedge.scoring.distribution import Bins
from memedge.scoring.tally import LISTED, ListedPrompt, Tally
from memedge.wording import counted

BINS = 40
BESIDE = ".00000000.partial"  # as long as what a file's name gets while it is written (engine/atomic.py)
LONGEST = 600  # characters of a prompt that are shown
INPUTS = 20  # names that are shown


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class About:
    """What was run, as plain text.

    Attributes:
        engine: the engine's path.
        checkpoint: what it was exported from.
        fingerprint: of all that verdicts depend on.
        key: what ran: "<provider>-<precision>".
        rule: how norm and alignment make a score and a verdict, in words.
        inputs: files that the prompts came from.
        output: where the scores are.
        command: how the run was asked for; "" leaves it out.
        date: when it ended.
    """

    engine: str
    checkpoint: str
    fingerprint: str
    key: str
    rule: str
    inputs: Sequence[str]
    output: str
    command: str = ""
    date: str = field(default_factory=_now)


def check_report(path: Path) -> None:
    """Raise InputError if no report can be written to `path`, before anything is scored for it."""
    otherwise = "name another with --report"
    if path.suffix.lower() != ".html":
        raise InputError(f"{path} is no report that can be written: name a file that ends in .html.")
    if path.is_dir():
        raise InputError(f"{path} is a directory: name a file for the report.")
    check_folder_of(path, otherwise)
    try:
        path.with_name(f"{path.name}{BESIDE}").exists()
    except OSError:
        raise InputError(f"The name of {path} is too long for the file kept beside it: use a shorter one.") from None


def write_report(path: Path, tally: Tally, about: About) -> None:
    """Write the report of a run, in one step; a file of that name is replaced.

    Raises:
        InputError: it cannot be written; what was there stays.
    """
    try:
        atomic.write(path, report(tally, about).encode())
    except OSError as error:
        raise InputError(
            f"The report {path} cannot be written ({error.strerror or error}): the scores are whole; make room and "
            "name another with --report."
        ) from error


def report(tally: Tally, about: About) -> str:
    """Return the page."""
    source = "prompts" if not about.inputs else Path(about.inputs[0]).name or about.inputs[0]
    more = f" and {counted(len(about.inputs) - 1, 'other file')}" if len(about.inputs) > 1 else ""
    sections = [_summary(tally)]
    if tally.valued:
        sections += [_distribution(tally), _suspicious(tally)]
        sections += [_near(tally)] if tally.threshold is not None else []
        sections += [_truncated(tally)] if tally.truncated_highest else []
    return document(
        f"Scores of {_text(source)}{more}",
        f"{tally.rows:,} {'row' if tally.rows == 1 else 'rows'} · {_text(about.key)} · {_text(about.date[:10])}",
        [*sections, _provenance(about)],
        allowed=f"style-src {source_hash(style())}",
    )


def _summary(tally: Tally) -> str:
    if not tally.rows:
        return section("summary", "In short", "<p>There were no rows.</p>")
    text = [f"<strong>{tally.rows:,} rows, no verdicts:</strong> the engine is not calibrated."]
    if tally.memorized is not None:
        share, are = _share(tally.memorized, tally.rows), "is" if tally.memorized == 1 else "are"
        text = [f"<strong>{tally.memorized:,} of {tally.rows:,} rows ({share}) {are} memorized.</strong>"]
    if tally.threshold is not None:
        text.append(f"The threshold is {number(tally.threshold)}.")
    if tally.early:
        text.append(
            f"Rows decided early, without a score: {tally.early:,} ({_share(tally.early, tally.rows)}), "
            f"{tally.early_memorized:,} of them memorized; they are in no list here."
        )
    if tally.valued:
        half, most = (number(tally.distribution.quantile(share)) for share in (0.5, 0.99))
        highest = number(tally.distribution.highest)
        text.append(f"Half of the {tally.kind}s are at most {half}, 99 % at most {most}; the highest is {highest}.")
    if tally.truncated:
        share = _share(tally.truncated, tally.rows)
        text.append(
            f"Rows whose prompt is truncated, so that only its beginning was judged: {tally.truncated:,} ({share})."
        )
    return section("summary", "In short", f'<p class="summary">{_glued(" ".join(text))}</p>')


def _distribution(tally: Tally) -> str:
    bins = tally.distribution.bins(BINS)
    notes = {False: "Linear: what most rows are like.", True: "Logarithmic: a few rows are seen among millions."}
    charts = "".join(
        f"<figure>{bars(bins, tally.kind, tally.threshold, logarithmic)}<figcaption>{note}</figcaption></figure>"
        for logarithmic, note in notes.items()
    )
    said = []
    if bins.split is not None:
        rows = "rows with a score" if tally.early else "rows"
        said.append(f"{sum(bins.rows[bins.split :]):,} of {tally.valued:,} {rows} reach the threshold.")
    ends = tally.distribution.lowest, tally.distribution.highest
    for name, way, end, beyond in zip(("first", "last"), ("down", "up"), ends, bins.beyond, strict=True):
        if beyond:
            said.append(f"The {name} bar also has the rows beyond it, {way} to {number(end)}.")
    note = f'<p class="note">{" ".join(said)}</p>' if said else ""
    head = ("values", "rows", "share")
    return section(
        "distribution",
        f"How the {tally.kind}s are distributed",
        f'<div class="charts">{charts}</div>{note}<details><summary>The figures</summary>'
        f"{table(head, _figures(bins, tally), f'Rows by {tally.kind}')}</details>",
    )


def _figures(bins: Bins, tally: Tally) -> list[list[str]]:
    """Return the rows of the table of bins, without empty ones."""
    return [
        [bins.words(place).replace("-", "−"), f"{rows:,}", _share(rows, tally.valued)]
        for place, rows in enumerate(bins.rows)
        if rows
    ]


def _suspicious(tally: Tally) -> str:
    title = "Most suspicious prompts"
    note = (
        f"The {LISTED} different prompts of the highest {tally.kind}s. Rows: how many have this prompt with this "
        f"{tally.kind}. First row: its number in the input, from 1."
    )
    return section("suspicious", title, f'<p class="note">{note}</p>{_prompts(tally, tally.suspicious, title)}')


def _near(tally: Tally) -> str:
    text = '<p class="note">A slightly different threshold would decide otherwise on these.</p>'
    for title, some in (("Reach the threshold", tally.above), ("Stay below it", tally.below)):
        text += f"<h3>{title}</h3>"
        text += _prompts(tally, some, f"Nearest to the threshold: {title.lower()}") if some else "<p>None.</p>"
    return section("near", "Nearest to the threshold", text)


def _truncated(tally: Tally) -> str:
    title = "Truncated prompts"
    note = f"Only the beginning of these was judged: those of the highest {tally.kind}s."
    return section("truncated", title, f'<p class="note">{note}</p>{_prompts(tally, tally.truncated_highest, title)}')


def _prompts(tally: Tally, some: Sequence[ListedPrompt], caption: str) -> str:
    judged, scored = tally.memorized is not None, tally.kind == "score"
    rows = []
    for one in some:
        row, cells = one.row, [_prompt(one.row.prompt, one.row.truncated)]
        if judged:
            kind, words = ("memorized", "memorized") if row.memorized else ("clean", "ok")
            cells.append(f'<span class="{kind}">{words}</span>')
        values = [*([tally.value(row)] if scored else []), row.norm, row.alignment]
        rows.append([*cells, *map(_figure, values), f"{one.rows:,}", f"{one.number:,}"])
    head = ["prompt", *(["verdict"] if judged else []), *(["score"] if scored else []), "norm", "alignment"]
    return table([*head, "rows", "first row"], rows, caption, texts=2 if judged else 1)


def _prompt(prompt: str, truncated: bool) -> str:
    shown = _text(prompt[:LONGEST]) or "<em>(empty)</em>"
    notes = []
    if len(prompt) > LONGEST:
        shown += "…"
        notes.append(f"{len(prompt):,} characters")
    if truncated:
        notes.append("truncated")
    aside = f' <small class="note">({", ".join(notes)})</small>' if notes else ""
    return f'<div class="prompt"><bdi>{shown}</bdi>{aside}</div>'


def _provenance(about: About) -> str:
    inputs = list(about.inputs[:INPUTS])
    if len(about.inputs) > INPUTS:
        inputs.append(f"{len(about.inputs) - INPUTS:,} more")
    entries = {
        "inputs": ", ".join(inputs),
        "output": about.output,
        "engine": about.engine,
        "checkpoint": about.checkpoint,
        "engine's fingerprint": about.fingerprint,
        "runs on": about.key,
        "rule": about.rule,
        "memedge": memedge.__version__,
        "date": about.date,
    }
    shown = [(name, plain(value)) for name, value in entries.items() if value]
    return section("provenance", "What was run", provenance(shown, plain(about.command)))


def _text(text: str) -> str:
    """Return text that is not ours as HTML."""
    return escape(plain(text))


def _figure(value: float | None) -> str:
    return "—" if value is None else f"{value:#.4g}".rstrip(".").replace("-", "−")


def _share(part: int, whole: int) -> str:
    percent = 100 * part / whole
    return f"{percent:.3g} %" if percent >= 1e-4 or not part else "less than 0.0001 %"


def _glued(text: str) -> str:
    """Return text in which no number is parted from its percent sign."""
    return text.replace(" %", "\u00a0%")
