"""What a library raised, in one sentence that names it."""

import sys
from types import TracebackType

from memedge.plain import one_line

_MOST = 200  # characters of what a library says


def sentence(error: BaseException) -> str:
    """Return what to say of an error that nobody expected."""
    said = one_line(str(error))
    said = said if len(said) <= _MOST else f"{said[: _MOST - 1]}…"
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    library = _library(error)
    whose = "memedge itself" if library == "memedge" else f"the library {library}"
    return f"{whose} failed ({what}): run `memedge --debug …` for the traceback, and report it if it is no fault here."


def _library(error: BaseException) -> str:
    """Return the package that raised an error: that of its class, or else of the innermost frame, but for Python's."""
    own = type(error).__module__.partition(".")[0]
    names = [own, *reversed(_packages(error.__traceback__))]
    return next((name for name in names if name and name not in sys.stdlib_module_names), "memedge")


def _packages(traceback: TracebackType | None) -> list[str]:
    found = []
    while traceback:
        found.append(str(traceback.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        traceback = traceback.tb_next
    return found
