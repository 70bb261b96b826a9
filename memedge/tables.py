"""Columns of results, as a pandas table and as HTML in a notebook."""

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

from memedge.engine.errors import MemedgeError, not_installed

if TYPE_CHECKING:
    from pandas import DataFrame

Columns = dict[str, list[Any]]  # by name; all of one length, None where there is no value

ROWS = 20  # that a notebook shows
LONGEST = 200  # characters of a text that a notebook shows
# So that a column has one dtype, whatever it lacks.
DTYPES = {"memorized": "boolean"} | dict.fromkeys(("norm", "alignment", "score", "threshold"), "float64")


def to_pandas(columns: Columns) -> "DataFrame":
    """Return the columns as a table; raises MemedgeError if pandas is not installed."""
    try:
        from pandas import DataFrame
    except ImportError:
        raise MemedgeError(not_installed("A table", "pandas", "eval", ", or use to_dict")) from None
    return DataFrame(columns).astype({name: dtype for name, dtype in DTYPES.items() if name in columns})


def to_html(columns: Columns, total: int) -> str:
    """Return the first rows of a table of `total` prompts as HTML. Prompts are not ours: no text is read as markup."""
    heads = "".join(f"<th>{name}</th>" for name in columns)
    rows = "".join(f"<tr>{''.join(_cells(row))}</tr>" for row in zip(*columns.values(), strict=True))
    shown = len(next(iter(columns.values())))
    more = "" if shown == total else f", the first {shown} of them"
    # The classes keep notebooks from reading $…$ in a prompt as a formula.
    return (
        f'<table class="tex2jax_ignore mathjax_ignore"><caption>prompts: {total}{more}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _cells(row: tuple[Any, ...]) -> Iterator[str]:
    for value in row:
        if isinstance(value, str):
            text = value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…"
            yield f'<td style="text-align: left">{escape(text)}</td>'
        else:
            yield f"<td>{_number(value)}</td>"


def _number(value: float | None) -> str:
    """Return a number or a truth value, rounded as the command line rounds."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
