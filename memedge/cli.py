"""The command line. Exit codes: 0 done; 1 an error, said in one sentence on stderr; 2 wrong usage; 130 interrupted.

What a library raises is an error too. Its traceback is shown after `memedge --debug`.

Each module in memedge/commands/ that is named after a command is one, and adds itself to the application when it is
imported.
"""

import errno
import io
import os
import signal
import sys
import traceback
from typing import Any, TextIO

import typer

# In the order of `memedge --help`.
# isort: off
from memedge.commands import (  # noqa: F401
    detect,
    explain,
    score,
    merge,
    serve,
    info,
    calibrate,
    evaluate,
    doctor,
    demo,
    bench,
    export,
    build,
    triton,
    audit,
    cure,
)

# isort: on
from memedge.commands.failures import sentence
from memedge.commands.options import app
from memedge.commands.terminal import say
from memedge.engine.errors import MemedgeError
from memedge.plain import one_line, plain

# click's ClickException. typer has no name for it, and brings its own copy of click from some version on.
_WRONG_USAGE: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """Run the command line; whatever fails ends in one sentence and exit code 1."""
    # As an interrupt: what is half made is removed. 143 is what shells report for a process that was terminated.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the terminal's encoding lacks is "?", not an error
    context = None
    try:
        command = typer.main.get_command(app)
        with command.make_context("memedge", sys.argv[1:]) as context:
            command.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except SystemExit:
        raise
    except BaseException as error:  # also a panic of a library in Rust, which is no Exception
        if context is not None and context.params.get("debug"):
            traceback.print_exc()
        sys.exit(_ended_by(error))
    sys.exit(0)


def _ended_by(error: BaseException) -> int:
    """Say on one line what happened, and return the exit code."""
    if isinstance(error, _WRONG_USAGE):
        text = io.StringIO()
        error.show(file=text)
        for line in text.getvalue().splitlines():
            print(plain(line), file=sys.stderr)
        return int(error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end in a traceback of the interpreter's end
        _say(f"interrupted: {error}" if str(error) else "interrupted")
        return 130
    if isinstance(error, BrokenPipeError):  # `| head`: whoever read has enough
        _give_up(sys.stdout)
    elif isinstance(error, MemedgeError):
        _say(str(error))
    elif isinstance(error, OSError) and error.strerror:
        # A full disk, a folder without permission: what is wrong with which file says it all.
        if error.errno == errno.ENOSPC:
            _give_up(sys.stdout)
        place = f"{error.filename}: " if error.filename else ""  # a write to an open file does not know its name
        _say(f"{place}{error.strerror}.")
    else:
        _say(sentence(error))
    return 1


def _say(text: str) -> None:
    say(f"memedge: {one_line(text)}")


def _give_up(stream: TextIO) -> None:
    """Let what is still to be written to a stream go nowhere: the interpreter's end would fail on it once more."""
    if isinstance(stream, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
