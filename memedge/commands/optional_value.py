"""Options whose value may be left out, such as `--ray [ADDRESS]`. Typer has none."""

import re
from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand

LOCAL = "local"
# What can stand behind --ray as its value; all else is the next argument.
_ADDRESS = re.compile(r"auto|local|ray://\S+|[\w.-]+:\d+|\[[\da-fA-F:.]+\]:\d+")


class RayCommand(TyperCommand):
    """A command whose option --ray has the value "local" where no address follows."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line with the value in its place."""
        return super().parse_args(ctx, list(_with_value(args)))


def _with_value(args: list[str]) -> Iterator[str]:
    for place, word in enumerate(args):
        yield word
        if word == "--ray" and not _ADDRESS.fullmatch(args[place + 1] if place + 1 < len(args) else ""):
            yield LOCAL
