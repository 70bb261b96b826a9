"""Checkpoints and engines that several tests read; made once per run, never changed."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

# On models this small, torch's threads wait for each other: measured on busy cores, 17 s instead of 0.2. Here, before
# anyone imports torch, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Likewise the runtimes', which by default are as many as the processors that this process may use.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@pytest.fixture(scope="session", autouse=True)
def shared_traces():
    """Exports in this process share what they trace (support/traces.py)."""
    from traces import share

    with pytest.MonkeyPatch.context() as monkeypatch:
        share(monkeypatch)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A randomly initialised ε-prediction checkpoint."""
    from models import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random")


@pytest.fixture(scope="session")
def engine(checkpoint, tmp_path_factory) -> Path:
    """Its engine: fp32, one draw, not calibrated."""
    from memedge.export.export import export

    output = tmp_path_factory.mktemp("engine") / "random"
    export(checkpoint, output)
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


@pytest.fixture(scope="session")
def triton_environment(tmp_path_factory) -> Iterator[Path]:
    """A virtual environment with a real tritonserver."""
    from triton_process import PYTHONS, environment

    if not sysconfig.get_config_var("Py_ENABLE_SHARED") or sys.version_info[:2] not in PYTHONS:
        pytest.skip("the Python backend needs libpython of 3.11, 3.12 or 3.13")
    with environment(tmp_path_factory.mktemp("triton")) as place:
        yield place


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A server of the embedded engine that several tests ask."""
    from servers import serving

    with serving(tmp_path_factory.mktemp("server"), "--provider", "cpu") as server:
        yield server


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
