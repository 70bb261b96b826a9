"""Processes that know no hub but a stand-in, and a cache of their own: huggingface_hub reads both once, at import."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

UNSET = ("HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE")


def run(arguments: list[object], url: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments; `url` is the hub's, `cache` a folder."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd="/",  # not the checkout, whose folder would hide the installed package
        env={
            **{name: value for name, value in os.environ.items() if name not in UNSET},
            "HF_ENDPOINT": url,
            "HF_HOME": str(cache),
            **environment,
        },
        capture_output=True,
        text=True,
    )


def export(*arguments: object, url: str = "http://localhost:9", cache: Path = Path("/nowhere"), **environment: str):
    """Run `memedge export`; without a url there is no hub."""
    return run(["-m", "memedge.cli", "export", *arguments], url, cache, **environment)


def fails(done: subprocess.CompletedProcess[str], words: str) -> None:
    """A command ended with one sentence, after the phases that it had passed."""
    *phases, sentence = done.stderr.splitlines()
    assert done.returncode == 1
    assert sentence.startswith("memedge: ") and words in sentence
    assert all(re.fullmatch(r".+: \d+\.\d s", phase) for phase in phases), done.stderr


def manifest(engine: Path) -> dict:
    """Return an engine's manifest."""
    return json.loads((engine / "manifest.json").read_text())
