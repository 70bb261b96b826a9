"""Pictures that commands draw: their file names and their colours."""

from pathlib import Path

from memedge.engine.errors import InputError, MemedgeError, not_installed
from memedge.engine.places import check_folder_of

SUFFIXES = (".png", ".svg")
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # told apart by the colour-blind too


def check_plot(path: Path) -> None:
    """Raise an error if no plot can be written to `path`, given with --output, before anything is measured for it.

    Raises:
        InputError: another suffix than SUFFIXES, or a folder that is not there or is read-only.
        MemedgeError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} is no plot that can be drawn: name a file that ends in {' or '.join(SUFFIXES)}.")
    if path.is_dir():
        raise InputError(f"{path} is a directory: name a file for the plot.")
    check_folder_of(path, "name another with --output")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MemedgeError(not_installed("Plotting", "matplotlib", "eval")) from None
