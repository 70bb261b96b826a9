"""What an operator reads: lines on stdout, and what happens when they cannot be written."""

import contextlib
import logging
import os

STDOUT, STDERR = 1, 2


class LinesHandler(logging.Handler):
    """Writes each record as a whole line, so that several processes may share a stdout.

    What cannot be written is lost, and requests are answered all the same: stderr says so once, until it works again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self._works = True

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            while line:
                line = line[os.write(STDOUT, line) :]
        except OSError as error:  # a full disk, a reader that is gone
            if self._works:
                said = f"memedge: the log cannot be written ({error.strerror}): requests are answered, not logged.\n"
                with contextlib.suppress(OSError):
                    os.write(STDERR, said.encode())
            self._works = False
        else:
            self._works = True


def begin() -> None:
    """Log what concerns an operator: requests, and what goes wrong."""
    logging.basicConfig(level=logging.INFO, handlers=[LinesHandler()])
    for name, level in (("uvicorn", logging.WARNING), ("memedge", logging.WARNING), ("memedge.access", logging.INFO)):
        logging.getLogger(name).setLevel(level)
