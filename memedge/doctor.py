"""`memedge doctor`: what is installed, what is active, what is missing and how to get it."""

import platform
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from memedge import __version__
from memedge.engine import probe
from memedge.engine.backend import ON_GPU, PROVIDERS
from memedge.engine.errors import MemedgeError
from memedge.engine.reduction import core_status

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
        _driver(),
        _device_code(),
        *(_gpu_provider(name, PROVIDERS[name], engine) for name in ON_GPU),
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
    installed = probe.onnx_runtimes()
    if len(installed) > 1:
        detail = "onnxruntime and onnxruntime-gpu share one module and overwrite each other: uninstall both, then one"
        return [Finding("ONNX Runtime", "broken", detail)]
    openvino = _openvino()
    for name, version in installed.items():
        return [Finding("ONNX Runtime", "active", f"{name} {version}: provider cpu"), openvino]
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
    return Finding(
        "OpenVINO", "active", f"{probe.installed('openvino')}: provider openvino, on this CPU in {', '.join(able)}"
    )


def _driver() -> Finding:
    driver = probe.driver()
    if driver.problem:
        return Finding("NVIDIA driver", "broken" if driver.fails else "missing", driver.problem)
    gpus = ", ".join(f"{gpu.name} ({gpu.target}, {gpu.memory / 2**30:.1f} GiB)" for gpu in driver.gpus)
    return Finding("NVIDIA driver", "active", "CUDA {}.{}: ".format(*driver.cuda or (0, 0)) + gpus)


def _device_code() -> Finding:
    if reason := probe.missing_device_code():
        return Finding("CUDA reduction", "missing", reason)
    targets = ", ".join(f"sm{target}" for target in core_status().cuda_targets or ())
    return Finding("CUDA reduction", "active", f"device code for {targets}; newer GPUs compile it when it is loaded")


def _gpu_provider(name: str, module: str, engine: Path | None) -> Finding:
    part = f"provider {name}"
    versions = {d: probe.installed(d) for d in packages_distributions().get(module, ())}
    own = ", ".join(f"{distribution} {version}" for distribution, version in versions.items())
    if reason := probe.missing_for(name) or _missing_plans(engine, name):
        return Finding(part, "missing", reason)
    return Finding(part, "active", f"{own}: all that it needs is here")


def _missing_plans(engine: Path | None, provider: str) -> str | None:
    """Return why there are no plans of the engine for this GPU, in one sentence; None if there are, or for "cuda"."""
    if provider == "cuda":
        return None
    from memedge.detector import EMBEDDED_ENGINE
    from memedge.engine.directory import EngineDirectory
    from memedge.engine.tensorrt import find_plans
    from memedge.engine.tensorrt_module import plan_backend

    try:
        directory = EngineDirectory.open(engine or EMBEDDED_ENGINE)
        find_plans(directory, plan_backend(provider), probe.driver().gpus[0])
    except MemedgeError as error:
        return str(error)
    return None


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
