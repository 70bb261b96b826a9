"""Where to keep what can be computed again."""

import os
from collections.abc import Iterator
from pathlib import Path

from memedge.engine.directory import EngineDirectory


def folders(directory: EngineDirectory) -> tuple[Path, Path]:
    """Return where things computed for an engine may lie, in order: in its directory, or in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return directory.path, home / "memedge" / directory.identity[:32]


def writable(directory: EngineDirectory) -> Iterator[Path]:
    """Yield those of `folders` that can be written to, made if need be."""
    for folder in folders(directory):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            yield folder
