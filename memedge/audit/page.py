"""The report of an audit: one HTML page that needs nothing else, no network and no script."""

import base64
from collections.abc import Sequence
from html import escape

from memedge.audit.figures import Audit
from memedge.audit.words import outcome, sentence, share
from memedge.plain import plain
from memedge.reports.document import document, provenance, section, source_hash, style, table

SHOWN = 200  # pictures with their strips; more would make the page slow


def page(found: Audit, strips: Sequence[bytes]) -> str:
    """Return report.html; `strips` are PNGs, as many as pictures. Whatever is not ours in it is escaped."""
    return document(
        f"Which pictures does {escape(found.checkpoint)} print?",
        f"{len(found.images)} training pictures · at most {found.settings.steps} steps · {escape(found.date[:10])}",
        [_summary(found), _steps(found), _pictures(found, strips), _provenance(found)],
        allowed=f"style-src {source_hash(style())}; img-src data:",
    )


def _summary(found: Audit) -> str:
    lines = "".join(f'<p class="summary">{escape(sentence(group))}</p>' for group in found.groups)
    cautions = "".join(f"<li>{escape(text)}</li>" for text in found.cautions)
    rows = [
        (
            escape(group.name),
            str(group.images),
            share(group.by_prompt),
            share(group.by_audit),
            "–" if group.median_steps is None else f"{group.median_steps:g}",
        )
        for group in found.groups
    ]
    head = ("pictures", "n", "printed by their captions", "by any embedding", "steps, median")
    words = (
        f"A picture is printed where more than half of {found.settings.generations} generations are copies of it, by "
        f"{found.similarity} of at least {found.copy:g}. In brackets: 95 % intervals (Wilson)."
    )
    boxed = f'<div class="cautions"><ul>{cautions}</ul></div>' if cautions else ""
    return section(
        "summary", "Summary", f'{lines}{boxed}{table(head, rows, "Summary")}<p class="note">{escape(words)}</p>'
    )


def _steps(found: Audit) -> str:
    steps = found.settings.checks
    rows = [(escape(group.name), *(f"{group.within[step].value:.2f}" for step in steps)) for group in found.groups]
    head = ("pictures", *("caption" if step == 0 else f"{step} steps" for step in steps))
    words = (
        "The share that is printed within so many steps of the search. Enough steps print any picture: what is printed "
        "in fewer steps than controls need is memorized."
    )
    return section("steps", "How soon", f'{table(head, rows, "Steps")}<p class="note">{escape(words)}</p>')


def _pictures(found: Audit, strips: Sequence[bytes]) -> str:
    rows = []
    for image, strip in zip(found.images[:SHOWN], strips, strict=False):
        source = f"data:image/png;base64,{base64.b64encode(strip).decode()}"
        name, words = escape(plain(image.caption or image.image)), escape(outcome(image))
        rows.append(
            (
                f'<img src="{source}" alt="{name}: training picture, and generations">',
                f"{name}<br>{f'<strong>{words}</strong>' if image.by_audit else words}",
                f"{image.similarity:.2f}",
            )
        )
    note = "The training picture; generations of its caption; generations of the embedding that came nearest."
    if len(found.images) > SHOWN:
        note += f" The first {SHOWN} of {len(found.images)}; all are in report.json."
    head = ("pictures", "what was found", "similarity")
    content = f'<p class="note">{escape(note)}</p>{table(head, rows, "Pictures", texts=2)}'
    return section("pictures", "Picture by picture", content)


def _provenance(found: Audit) -> str:
    settings = found.settings
    entries = (
        ("checkpoint", f"{found.checkpoint}, SHA-256 {found.checkpoint_sha256}"),
        ("search", f"Adam, rate .1, at most {settings.steps} steps of 8 draws (Kowalczuk et al., 2026)"),
        (
            "generations",
            f"{settings.generations} of {settings.inference_steps} DDIM steps, guidance {settings.guidance:g}",
        ),
        ("similarity", f"{found.similarity}, copies from {found.copy:g} on"),
        ("seed", str(settings.seed)),
        ("device", found.device),
        ("date", found.date),
        ("memedge", found.version),
    )
    return section("provenance", "How this was made", provenance(entries, found.command))
