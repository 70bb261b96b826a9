"""The command line. Exit codes: 0 done; 1 an error, said in one sentence on stderr; 2 wrong usage; 130 interrupted.

Each module in memedge/commands/ that is named after a command is one, and adds itself to the application when it is
imported.
"""

import signal
import sys

# In the order of `memedge --help`.
# isort: off
from memedge.commands import (  # noqa: F401
    detect,
    explain,
    score,
    info,
    calibrate,
    evaluate,
    doctor,
    demo,
    bench,
    export,
    build,
)

# isort: on
from memedge.commands.options import app
from memedge.commands.terminal import say
from memedge.engine.errors import MemedgeError


def main() -> None:
    """Run the command line; users' mistakes end in one sentence and exit code 1."""
    # As an interrupt: what is half made is removed. 143 is what shells report for a process that was terminated.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except MemedgeError as error:
        say(f"memedge: {error}")
        sys.exit(1)
    except OSError as error:  # a full disk, a folder without permission: what is wrong with which file says it all
        place = f"{error.filename}: " if error.filename else ""  # a write to an open file does not know its name
        say(f"memedge: {place}{error.strerror or error}.")
        sys.exit(1)
    except KeyboardInterrupt:
        print("memedge: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
