"""A server in a process of its own, as an operator has it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx


class Server(NamedTuple):
    """A running server: where it is, its process, and its log so far."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)


@contextmanager
def serving(
    folder: Path,
    *arguments: object,
    threads: int = 1,
    ready: bool = True,
    stdout: str | None = None,
    **environment: str,
) -> Iterator[Server]:
    """Run `memedge serve` on a free port until the block ends. Its log is both streams, or stderr alone."""
    log = folder / "log"
    command = [
        sys.executable,
        "-P",
        "-m",
        "memedge.cli",
        "serve",
        "--port",
        "0",
        "--threads",
        str(threads),
        *map(str, arguments),
    ]
    with log.open("w", encoding="utf-8") as said, Path(stdout or os.devnull).open("w", encoding="utf-8") as other:
        process = subprocess.Popen(
            command, cwd="/", env=os.environ | environment, stdout=other if stdout else said, stderr=said, text=True
        )
    try:
        url = ""
        end = time.monotonic() + 120
        while ready:
            said = log.read_text(encoding="utf-8")
            assert process.poll() is None and time.monotonic() < end, said
            if found := re.search(r"http://[0-9.]+:\d+", said):
                url = found[0]
                try:
                    if httpx.get(f"{url}/health/ready", timeout=1, trust_env=False).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
            time.sleep(0.05)
        yield Server(url, process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def ask(url: str, prompts: list[str], early: str = "proven") -> httpx.Response:
    """Ask for verdicts."""
    return httpx.post(f"{url}/v1/verdicts", json={"prompts": prompts, "early": early}, timeout=60, trust_env=False)
