"""A report's page and its parts, as HTML. Every text given here is HTML already, but where it says otherwise."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from string import Template

import memedge
from memedge.embedded import DATA

PARTS = DATA / "report"

Cell = str  # HTML
_NUMBER = ' class="number"'


def document(title: str, about: str, sections: Iterable[str], allowed: str, end: str = "") -> str:
    """Return a whole page. Nothing in it can load anything, send a form, or run a script that is not allowed.

    Args:
        title: the heading and the tab's name.
        about: the line below it.
        sections: the content.
        allowed: what the page's policy allows, such as "style-src 'sha256-…'"; all else is forbidden.
        end: what follows the content: scripts.
    """
    return Template((PARTS / "page.html").read_text(encoding="utf-8")).substitute(
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; {allowed}",
        version=escape(memedge.__version__),
        title=title,
        about=about,
        style=style(),
        sections="\n".join(sections),
        end=end,
    )


def style() -> str:
    """Return the style sheet of all reports."""
    return (PARTS / "style.css").read_text(encoding="utf-8")


def source_hash(text: str) -> str:
    """Return the source that allows just this script or style sheet in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def section(name: str, title: str, content: str) -> str:
    """Return a section of that id and heading."""
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{title}</h2>\n{content}\n</section>'


def table(head: Iterable[str], rows: Iterable[Sequence[Cell]], caption: str, texts: int = 1) -> str:
    """Return a table in a box of its own that scrolls.

    Args:
        head: names of the columns, as plain text.
        rows: the cells. With one column of texts, the first cell is its row's heading.
        caption: what the table is, as plain text.
        texts: columns of text; all that follow are numbers.
    """
    names = "".join(
        f'<th scope="col"{"" if place < texts else _NUMBER}>{escape(name)}</th>' for place, name in enumerate(head)
    )
    body = ""
    for row in rows:
        cells = "".join(
            f"<td{'' if place < texts else _NUMBER}>{cell}</td>" for place, cell in enumerate(row[1:], start=1)
        )
        body += f"<tr>{f'<th scope=row>{row[0]}</th>' if texts == 1 else f'<td>{row[0]}</td>'}{cells}</tr>\n"
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<thead><tr>{names}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def provenance(entries: Iterable[tuple[str, str]], command: str) -> str:
    """Return names and what is known of them, and the command if there is one; all of it plain text."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries)
    if command:
        items += f"<dt>command</dt><dd><code>{escape(command)}</code></dd>"
    return f'<dl class="provenance">{items}</dl>'
