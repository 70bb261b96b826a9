"""Where to keep what can be computed again."""

import os
import tempfile
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


def write(path: Path, content: bytes) -> None:
    """Write a file in one step: other processes may read or write the same one now."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(partial).chmod(0o644)  # mkstemp's 0600 would shut out the engine's other users
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
