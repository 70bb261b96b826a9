"""Numbers and lists in words."""

from collections.abc import Sequence


def counted(number: int, thing: str) -> str:
    """Return how many things, in words."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def listed(names: Sequence[str], conjunction: str) -> str:
    """Return names, at least one, as people list them: "a, b and c"."""
    *others, last = names
    return f"{', '.join(others)} {conjunction} {last}" if others else last
