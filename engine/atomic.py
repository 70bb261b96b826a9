"""Files and folders that appear whole or not at all."""

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file in one step: whoever reads meanwhile sees the old one or the new one, never a part.

    Raises:
        OSError: it cannot be written; what was there stays, and nothing is left beside it.
    """
    # A name of its own: other processes may write the same file now. It begins with the file's, for error messages; and
    # it is not tempfile, whose 0600 would stay with it.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def folder(place: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `place` at the end, whole; where something fails, nothing is left of it.

    `place` may be an empty folder, and its own folder must exist.
    """
    place = place.resolve()
    # Beside its place, so that the last step is a rename within one file system.
    partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        partial.chmod(0o755)  # mkdtemp's 0700 would stay with it
        yield partial
        partial.replace(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
