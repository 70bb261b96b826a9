"""`memedge doctor`: what is installed, what is active, what is missing and how to get it."""

import platform
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from memedge import __version__
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine import probe
from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import MemedgeError, install
from memedge.engine.opening import backend_module
from memedge.engine.providers import PROVIDERS, Provider
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
        *(_gpu_provider(row, engine) for row in PROVIDERS.values() if row.on_gpu),
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
    """Look at what runs on the processor, of which one is enough."""
    found = [_cpu_provider(row) for row in reversed(PROVIDERS.values()) if not row.on_gpu]
    if any(finding.state == "active" for finding in found):
        return found
    return [Finding(one.part, "broken", one.detail) for one in found]


def _cpu_provider(row: Provider) -> Finding:
    distributions = probe.distributions(row.module)
    if len(distributions) > 1:
        names = " and ".join(distributions)
        return Finding(
            row.product, "broken", f"{names} share one module and overwrite each other: uninstall both, then one"
        )
    if reason := probe.missing_for(row.name):
        return Finding(row.product, "missing", reason)
    try:
        able = backend_module(row).precisions("fp32")
    except (MemedgeError, RuntimeError) as error:
        return Finding(row.product, "broken", f"{error}; install it again: {row.remedy}")
    version = ", ".join(f"{name} {number}" for name, number in distributions.items())
    return Finding(row.product, "active", f"{version}: provider {row.name}, fp32 engines in {' or '.join(able)}")


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


def _gpu_provider(row: Provider, engine: Path | None) -> Finding:
    part = f"provider {row.name}"
    own = ", ".join(f"{name} {version}" for name, version in probe.distributions(row.module).items())
    if reason := probe.missing_for(row.name) or _missing_in_engine(row, engine):
        return Finding(part, "missing", reason)
    return Finding(part, "active", f"{own}: all that it needs is here")


def _missing_in_engine(row: Provider, engine: Path | None) -> str | None:
    """Return what the engine lacks to be run, in one sentence, or None."""
    try:
        return backend_module(row).missing(EngineDirectory.open(engine or EMBEDDED_ENGINE), row)
    except MemedgeError as error:
        return str(error)


def _extra(name: str, modules: tuple[str, ...]) -> Finding:
    absent = [module for module in modules if find_spec(module) is None]
    if absent:
        return Finding(name, "missing", f"without {', '.join(absent)}: {install(name)}")
    return Finding(name, "active", ", ".join(modules))


def _engine(engine: Path | None, provider: str, precision: str | None, threads: int | None) -> Finding:
    try:
        from memedge.detector import Detector

        info = Detector.load(engine, provider, precision, threads).info
    except MemedgeError as error:
        return Finding("engine", "broken", str(error))
    verdicts = "calibrated" if info.calibration else "not calibrated: no verdicts"
    return Finding("engine", "active", f"{info.path} on {info.key}, {info.threads} threads, {verdicts}")
