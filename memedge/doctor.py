"""`memedge doctor`: what is installed, what is active, what is missing and how to get it."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from memedge import __version__
from memedge.engine.backend import PROVIDERS
from memedge.engine.errors import MemedgeError
from memedge.engine.reduction import core_status

RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # two distributions of one module
OPTIONAL = {
    "export": ("torch", "diffusers", "transformers", "onnx", "onnxscript"),
    "eval": ("pyarrow", "sklearn"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: "active" works, "missing" is optional and not there, "broken" needs the user."""

    part: str
    state: Literal["active", "missing", "broken"]
    detail: str


def examine(engine: Path | None, provider: str, precision: str | None, threads: int | None) -> list[Finding]:
    """Look at everything without raising: what is wrong is a finding."""
    return [
        Finding("memedge", "active", f"{__version__}, Python {platform.python_version()}, {platform.machine()}"),
        _native_core(),
        *_runtime(),
        Finding("CUDA", "missing", "this version of memedge runs on CPUs only"),
        *(_extra(name, modules) for name, modules in OPTIONAL.items()),
        _engine(engine, provider, precision, threads),
    ]


def _native_core() -> Finding:
    status = core_status()
    if status.path == "numpy":
        return Finding("native core", "missing", f"reducing with NumPy, slower but equal: {status.reason}")
    return Finding(
        "native core", "active", f"SIMD {status.isa} of {', '.join(status.isas)}; built by {status.compiler}"
    )


def _runtime() -> list[Finding]:
    installed = {name: _version(name) for name in RUNTIMES}
    present = [name for name in RUNTIMES if installed[name]]
    if len(present) > 1:
        detail = "onnxruntime and onnxruntime-gpu share one module and overwrite each other: uninstall both, then one"
        return [Finding("ONNX Runtime", "broken", detail)]
    if not present:
        return [Finding("ONNX Runtime", "broken", "not installed: python -m pip install 'memedge[cpu]'")]
    detail = f"{present[0]} {installed[present[0]]}; providers memedge can use: {', '.join(PROVIDERS)}"
    return [Finding("ONNX Runtime", "active", detail)]


def _extra(name: str, modules: tuple[str, ...]) -> Finding:
    absent = [module for module in modules if find_spec(module) is None]
    if absent:
        return Finding(name, "missing", f"without {', '.join(absent)}: python -m pip install 'memedge[{name}]'")
    return Finding(name, "active", ", ".join(modules))


def _engine(engine: Path | None, provider: str, precision: str | None, threads: int | None) -> Finding:
    try:
        from memedge.detector import Detector

        info = Detector.load(engine, provider, precision, threads).info
    except MemedgeError as error:
        return Finding("engine", "broken", str(error))
    verdicts = "calibrated" if info.calibration else "not calibrated: no verdicts"
    return Finding("engine", "active", f"{info.path} on {info.key}, {info.threads} threads, {verdicts}")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
