"""Where to keep what can be computed again."""

import os
from collections.abc import Iterator
from pathlib import Path

from memedge.engine.directory import EngineDirectory


def folders(directory: EngineDirectory) -> tuple[Path, ...]:
    """Return where things computed for an engine may lie, in order: in its directory, or in the user's cache folder.

    A process without a home has no cache folder: one of a service, or of a user id that no user has.
    """
    home = _user_cache()
    return (directory.path,) if home is None else (directory.path, home / "memedge" / directory.identity[:32])


def writable(directory: EngineDirectory) -> Iterator[Path]:
    """Yield those of `folders` that can be written to, made if need be."""
    for folder in folders(directory):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            yield folder


def _user_cache() -> Path | None:
    # Relative paths are ignored, as the XDG specification asks: they would mean another folder after each `cd`.
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home / ".cache" if home.is_absolute() else None
