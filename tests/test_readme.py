"""What README shows works as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_three_lines_of_python(tmp_path):
    code = blocks("python")[0]
    assert len(code.splitlines()) == 3
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "memorized=True" in done.stdout
    assert "memorized=False" in done.stdout


def test_free_norm():
    import numpy as np

    names = {"eps_cond": np.ones((3, 4, 8, 8), np.float32), "eps_uncond": np.zeros((1, 4, 8, 8), np.float32)}
    exec(blocks("python")[1], names)
    np.testing.assert_allclose(names["stats"].norm, [16, 16, 16])


def test_mitigation():
    names: dict = {}
    exec(blocks("python")[2], names)
    assert names["result"].succeeded
    assert names["noise"].shape == (4, 32, 32)


def test_guard(detector):
    from diffusers import StableDiffusionPipeline
    from guarded import make_pipe

    names = {"pipe": make_pipe(StableDiffusionPipeline), "detector": detector}
    exec(blocks("python")[3], names)
    assert [image is None for image in names["result"].images] == [True, False]


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "prompts.txt").write_text("woman farmer\na red bicycle\n")
    (folder / "my-model").symlink_to(checkpoint)
    return folder


def sort_captions(folder):
    """Write the lists of prompts. What a random model "memorized" is what has the larger norms."""
    import csv

    from memedge import Detector
    from memedge.embedded import CAPTIONS

    with CAPTIONS.open(newline="") as file:
        captions = [row["caption"] for row in csv.DictReader(file)][:30]
    norm = Detector.load(folder / "my-engine").score(captions).norm
    ascending = [captions[i] for i in norm.argsort()]
    (folder / "harmless.txt").write_text("".join(f"{caption}\n" for caption in ascending[:20]))
    (folder / "replicates.txt").write_text("".join(f"{caption}\n" for caption in ascending[20:]))


def test_commands(folder):
    commands = [line.split("#")[0].strip() for line in blocks("sh")[1].splitlines()]
    assert len(commands) == 11
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        if "calibrate" in command:
            sort_captions(folder)
        done = subprocess.run(
            command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
