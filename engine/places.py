"""Where output goes: checked before anything is computed for it."""

import os
from pathlib import Path

from memedge.engine.errors import InputError


def check_folder_of(path: Path, otherwise: str) -> None:
    """Check that something can be written at `path`.

    Args:
        path: of a file or a folder to make.
        otherwise: what else the user can do, such as "name another with --output".

    Raises:
        InputError: the folder that `path` lies in does not exist, or cannot be written to.
    """
    try:
        folder = path.resolve().parent
        path.exists()  # a name that is too long
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or "the name holds a NUL, or links lead in a circle"
        raise InputError(f"{path} cannot be written to ({reason}): {otherwise}.") from None
    if not folder.is_dir():
        raise InputError(f"The folder of {path} does not exist: make it, or {otherwise}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written to: change its permissions, or {otherwise}.")


def check_new_folder(path: Path, otherwise: str) -> None:
    """Check that a folder can be made at `path`; an empty one may be there.

    Raises:
        InputError: something is there, or the folder that `path` lies in does not exist or cannot be written to.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is there already: remove it, or {otherwise}.")
    check_folder_of(path, otherwise)
