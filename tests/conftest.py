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
    phases = [line for line in done.stderr.splitlines() if "reference" in line]
    assert len(phases) == 2, done.stderr  # computing it, and comparing with it
    return output


@pytest.fixture
def copy(engine, tmp_path) -> Path:
    """A copy of the engine, to be changed."""
    return shutil.copytree(engine, tmp_path / "engine")


@pytest.fixture(scope="module")
def one_thread():
    """On models this small, torch's threads wait for each other: measured on busy cores, 17 s instead of 0.2."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def detector():
    """A detector on the embedded engine, on the provider that it was exported with."""
    from memedge import Detector

    return Detector.load(provider="cpu")


@pytest.fixture(scope="session")
def cuda_stub(tmp_path_factory) -> Path:
    """A libcuda.so.1 over host memory, for processes with device.stub_environment."""
    if not (compiler := shutil.which("gcc")):
        pytest.skip("no gcc")
    library = tmp_path_factory.mktemp("cuda_stub") / "libcuda.so.1"
    source = Path(__file__).parent / "engine/cuda_stub.c"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, source, "-o", library, "-pthread"], check=True)
    return library
