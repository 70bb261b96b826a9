"""Numbers in words."""


def counted(number: int, thing: str) -> str:
    """Return how many things, in words."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
