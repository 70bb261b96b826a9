"""What README shows works as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import memedge
from servers import ask, serving

from memedge.measure import latency

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    return [content for named, content in found if named == language]


def test_it_is_read_in_five_minutes():
    assert len(README.read_text().splitlines()) <= 160


def test_three_lines_of_python(tmp_path):
    """They print what stands below them, but for the last digits, which hang on the provider that runs here."""
    code = blocks("python")[0]
    assert len(code.splitlines()) == 3
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = re.compile(r"-?\d+\.\d+")
    shown = blocks("")[0]
    assert number.sub("N", done.stdout) == number.sub("N", shown)
    found, expected = ([float(n) for n in number.findall(text)] for text in (done.stdout, shown))
    assert found == pytest.approx(expected, rel=0.02)


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "prompts.txt").write_text("woman farmer\na red bicycle\n")
    (folder / "my-model").symlink_to(checkpoint)
    return folder


def sort_captions(folder):
    """Write the lists of prompts. What a random model "memorized" is what has the larger norms."""
    from memedge import Detector
    from memedge.embedded import captions

    prompts = [caption.prompt for caption in captions()[:30]]
    norm = Detector.load(folder / "my-engine").score(prompts).norm
    ascending = [prompts[i] for i in norm.argsort()]
    (folder / "harmless.txt").write_text("".join(f"{caption}\n" for caption in ascending[:20]))
    (folder / "replicates.txt").write_text("".join(f"{caption}\n" for caption in ascending[20:]))


@pytest.mark.slow
def test_commands(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "CALLS", 2)
    commands = [shlex.split(line, comments=True) for line in blocks("sh")[1].splitlines()]
    assert len(commands) == 14
    for name, *arguments in commands:
        assert name == "memedge"
        if "calibrate" in arguments:
            sort_captions(folder)
        if "serve" in arguments:
            # On a free port, not on the one that is shown.
            _, option, engine, port, _ = arguments
            assert (option, port) == ("--engine", "--port")
            with serving(tmp_path, option, folder / engine) as server:
                assert ask(server.url, ["a red bicycle"]).status_code == 200
            continue
        done = memedge(*arguments, cwd=folder)
        assert done.returncode == 0, f"{arguments}\n{done.stderr}"
