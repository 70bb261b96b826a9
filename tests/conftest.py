"""Checkpoints and engines that several tests read; made once per run, never changed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A randomly initialised ε-prediction checkpoint."""
    from models import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random")


@pytest.fixture(scope="session")
def engine(checkpoint, tmp_path_factory) -> Path:
    """Its engine, made by the command line: fp32, one draw, not calibrated."""
    output = tmp_path_factory.mktemp("engine") / "random"
    command = [sys.executable, "-m", "memedge.cli", "export", checkpoint, "-o", output]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    phases = [line for line in done.stderr.splitlines() if "torch" in line]
    assert len(phases) == 3, done.stderr  # the reference, the comparison, and what it found
    return output


@pytest.fixture
def copy(engine, tmp_path) -> Path:
    """A copy of the engine, to be changed."""
    return shutil.copytree(engine, tmp_path / "engine")


@pytest.fixture(scope="session")
def detector():
    """A detector on the embedded engine, on the provider that it was exported with."""
    from memedge import Detector

    return Detector.load(provider="cpu")
