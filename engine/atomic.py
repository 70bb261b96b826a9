"""Files that appear whole or not at all."""

import secrets
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
