"""`memedge doctor`: what is installed, what is active, what is missing and how to get it."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from memedge import __version__
from memedge.engine.errors import MemedgeError
from memedge.engine.reduction import core_status

RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # two distributions of one module
OPTIONAL = {
    "export": ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "networkx"),
    "eval": ("pyarrow", "sklearn", "matplotlib"),
}


State = Literal["active", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the report: "active" works, "missing" is optional and not there, "broken" needs the user."""

    part: str
    state: State
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
    openvino = _openvino()
    if present:
        return [Finding("ONNX Runtime", "active", f"{present[0]} {installed[present[0]]}: provider cpu"), openvino]
    state: State = "missing" if openvino.state == "active" else "broken"  # one runtime is enough
    return [Finding("ONNX Runtime", state, "not installed: python -m pip install 'memedge[cpu]'"), openvino]


def _openvino() -> Finding:
    if find_spec("openvino") is None:
        return Finding("OpenVINO", "missing", "not installed: python -m pip install 'memedge[openvino]'")
    try:
        from memedge.engine.openvino import precisions

        able = precisions("fp32")
    except (MemedgeError, RuntimeError) as error:
        return Finding("OpenVINO", "broken", f"{error}; reinstall it: python -m pip install 'memedge[openvino]'")
    return Finding("OpenVINO", "active", f"{_version('openvino')}: provider openvino, on this CPU in {', '.join(able)}")


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
