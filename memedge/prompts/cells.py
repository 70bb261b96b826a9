"""Prompts in CSV cells: safe in a spreadsheet, and read back as they were.

Spreadsheets run a cell that begins with `=`, `+`, `-` or `@` as a formula, also behind white space, and some in their
full-width forms; tab and line ends in front count too. Such a prompt gets an apostrophe in front, which spreadsheets
take as "this is text". A prompt that begins with apostrophes before such a sign gets one more, so that exactly one is
taken away again.
"""

import re

# The columns of our score files. A file with just these is one of ours: only there an apostrophe is taken away.
SCORE_COLUMNS = ("prompt", "norm", "alignment", "score", "memorized", "truncated")
EARLY_COLUMNS = ("passes", "reason")  # behind them where passes were left out
_FORMULA = re.compile(r"['\s]*[=+\-@＝＋－＠]|'*[\t\r\n]")


def guarded(prompt: str) -> str:
    """Return the cell for a prompt."""
    return f"'{prompt}" if _FORMULA.match(prompt) else prompt


def unguarded(cell: str) -> str:
    """Return the prompt of a cell that `guarded` made."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell[1:]) else cell
