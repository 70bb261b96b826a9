"""Checkpoints and engines that several tests read; made once per run, never changed."""

from pathlib import Path

import pytest


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


@pytest.fixture(scope="session")
def detector():
    """A detector on the embedded engine."""
    from memedge import Detector

    return Detector.load()
