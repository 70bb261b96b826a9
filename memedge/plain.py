"""Text that is not ours, made fit for a terminal or a page: prompts, file names, messages of libraries.

Control characters move the cursor, change titles or hide text; direction overrides show it in another order. What is
printable stays as it is, all else is written as an escape. It is an allow-list: unknown characters are escaped too.
"""

import unicodedata

LONGEST = 500  # characters of an error
JOINERS = "\u200c\u200d"  # in Persian, Indic scripts and emoji: they move nothing
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def plain(text: str) -> str:
    """Return text on one line, with escapes such as \\x1b for what a terminal would act on."""
    if text.isprintable():
        return text
    return "".join(char if _is_shown(char) else escaped(char) for char in text)


def one_line(text: str) -> str:
    """Return a message as one line of bounded length, without characters that a terminal would act on."""
    line = plain(" ".join(text.split()) if "\n" in text or "\r" in text else text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def escaped(char: str) -> str:
    """Return a character as Python writes it in ASCII."""
    return _ESCAPES.get(char) or char.encode("ascii", "backslashreplace").decode().replace(char, f"\\x{ord(char):02x}")


def _is_shown(char: str) -> bool:
    return char.isprintable() or char in JOINERS or unicodedata.category(char) == "Zs"
