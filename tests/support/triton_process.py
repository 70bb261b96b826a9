"""A real tritonserver in a process of its own: that of the wheel nvidia-pytriton, which brings the Python backend."""

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

import memedge

WHEEL = "nvidia-pytriton==0.7.0"
PYTHONS = ((3, 11), (3, 12), (3, 13))  # that it has a stub for, and memedge runs on
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class Triton(NamedTuple):
    """A running tritonserver: where it listens, the process, and its log so far."""

    http: str
    grpc: str
    metrics: str
    process: subprocess.Popen[str]
    log: Path

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def count(self, name: str, reason: str = "") -> float:
        """Return one of its counters of the model."""
        text = httpx.get(f"http://{self.metrics}/metrics", trust_env=False).text
        lines = [line for line in text.splitlines() if line.startswith(f"{name}{{") and reason in line]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def resident(self) -> int:
        """Return the bytes that the model's own process holds."""
        (stub,) = (path for path in Path("/proc").glob("[0-9]*/status") if _is_stub(path, self.process.pid))
        (line,) = (line for line in stub.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024


def _is_stub(status: Path, parent: int) -> bool:
    try:
        text = status.read_text()
    except OSError:  # it has ended
        return False
    return f"PPid:\t{parent}\n" in text and "Name:\ttriton_python" in text


@contextmanager
def environment(folder: Path) -> Iterator[Path]:
    """Yield a virtual environment with tritonserver and what memedge needs, but not memedge.

    MEMEDGE_TEST_TRITON names one; else it is made in `folder` from PyPI (some 100 MB), and removed.
    """
    if named := os.environ.get("MEMEDGE_TEST_TRITON"):
        yield Path(named)
        return
    place = folder / "environment"
    wanted = importlib.metadata.requires("memedge") or []
    wanted = [one.partition(";")[0] for one in wanted if "extra ==" not in one or one.endswith('extra == "cpu"')]
    python = place / "bin/python"
    try:
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", WHEEL], check=True)  # its clients' side is not needed
        subprocess.run([*pip, "numpy<2", *wanted], check=True)  # what the wheel's stub was built with
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def tritonserver(environment: Path, repository: Path, folder: Path) -> Iterator[Triton]:
    """Run tritonserver on free ports until the block ends; it is ready, or has ended.

    Args:
        environment: as `environment` yields it.
        repository: the model repository.
        folder: an empty one, for the backend, links and the log.
    """
    packages = environment / f"lib/python{PYTHON}/site-packages"
    server = packages / "pytriton/tritonserver"
    shutil.copytree(server / "backends", folder / "backends")
    stub = folder / "backends/python/triton_python_backend_stub"
    shutil.copyfile(server / "python_backend_stubs" / PYTHON / stub.name, stub)
    stub.chmod(0o755)
    # The stub's interpreter looks into the working directory first: there is the memedge that is tested.
    (folder / "memedge").symlink_to(Path(memedge.__file__).parent)
    ports = _free_ports(3)
    listening = [
        part
        for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True)
        for part in (f"--{kind}-address=127.0.0.1", f"--{kind}-port={port}")
    ]
    libraries = f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    log = folder / "log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [
                server / "bin/tritonserver",
                f"--model-repository={repository}",
                f"--backend-directory={folder / 'backends'}",
                *listening,
            ],
            cwd=folder,
            env=os.environ | {"LD_LIBRARY_PATH": libraries, "PATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    http, grpc, metrics = (f"127.0.0.1:{port}" for port in ports)
    triton = Triton(http, grpc, metrics, process, log)
    try:
        end = time.monotonic() + 300
        while process.poll() is None and not _ready(http):
            assert time.monotonic() < end, triton.said()
            time.sleep(0.1)
        yield triton
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/v2/health/ready", timeout=1, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
