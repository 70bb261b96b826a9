"""`memedge` for tests: in this process, which is quick; or in one of its own, where the process is what is tested."""

import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from memedge import cli

Done = subprocess.CompletedProcess[str]


def memedge(*arguments: object, cwd: Path | str = "/", **environment: str) -> Done:
    """Run main() on arguments; return what a process would have: its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    line = ["memedge", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", line)
        patch.setattr(signal, "signal", lambda *_: None)  # main's handler would stay
        patch.chdir(cwd)
        for name, value in ({"COLUMNS": "80"} | environment).items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return subprocess.CompletedProcess(line, ended.value.code or 0, out.getvalue(), err.getvalue())


def memedge_process(*arguments: object, module: str = "memedge.cli", **environment: str) -> Done:
    """Run memedge in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd="/",  # not the checkout, whose folder would hide the installed package
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def fails(done: Done, words: str, code: int = 1) -> None:
    """Check that a command failed: with 1 for what is wrong, said in one sentence, or with 2 for wrong usage."""
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.startswith("memedge: ")
        assert len(done.stderr.strip().splitlines()) == 1
