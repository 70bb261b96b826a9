"""deploy/Containerfile: what it promises, and its steps, run in a chroot instead of a container."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from containers import build, debian, healthcheck, instructions

DEPLOY = Path(__file__).parents[2] / "deploy"
CONTAINERFILE = DEPLOY / "Containerfile"


def test_how_it_runs():
    """As nobody in particular, ended by the signal that the server drains at, and reachable from outside."""
    settings = dict(instructions(CONTAINERFILE))
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", settings["USER"])
    assert json.loads(settings["ENTRYPOINT"]) == ["memedge", "serve", "--host", "0.0.0.0"]
    assert settings["STOPSIGNAL"] == "SIGTERM" and "org.opencontainers.image.title" in settings["LABEL"]
    assert "curl" not in CONTAINERFILE.read_text()


@pytest.mark.slow
def test_its_steps(tmp_path):
    """The sdist becomes a server that runs on a read-only root, is found well, answers, and ends with 0."""
    if os.getuid() or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("needs root, and mount namespaces: no stand-in for a container here")
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path / "dist", root], check=True)
    minimal = bool(shutil.which("debootstrap"))
    base = debian(tmp_path / "debian") if minimal else Path("/")
    stage = build(CONTAINERFILE, tmp_path / "dist", base, tmp_path / "stages", packages=minimal)
    stage.run(["python", "-c", "import memedge._core"], as_it_runs=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    stage.environment["MEMEDGE_SERVE_PORT"] = str(port)
    entrypoint = json.loads(stage.settings["ENTRYPOINT"])
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(stage.command(entrypoint, as_it_runs=True), stdout=log, stderr=log)
    try:
        check = stage.command(healthcheck(stage), as_it_runs=True)
        end = time.monotonic() + 120
        while subprocess.run(check, capture_output=True).returncode:
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.5)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/verdicts", json={"prompts": ["the left luggage sign"]}, trust_env=False
        )
        assert answer.json()["verdicts"][0]["memorized"] is True
        (inside,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()  # its own process 1
        status = Path(f"/proc/{inside}/status").read_text()
        assert re.search(r"^Uid:\s65532\s", status, re.MULTILINE)
        assert re.search(r"^CapBnd:\s0+$", status, re.MULTILINE)
        os.kill(int(inside), signal.SIGTERM)
        assert server.wait(30) == 0, (tmp_path / "log").read_text()
        assert subprocess.run(check, capture_output=True).returncode == 1
    finally:
        if server.poll() is None:
            server.kill()
        server.wait()
        for folder in ("debian", "stages"):  # as large as a system
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
