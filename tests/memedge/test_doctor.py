"""`memedge doctor` on machines with and without what GPU providers need."""

import json
import subprocess
import sys

import device
import fake_tensorrt
import pytest

from memedge import doctor
from memedge.engine import probe, reduction
from memedge.engine.probe import Driver, Gpu

GPUS = (Gpu("A", (8, 9), 24 << 30), Gpu("B", (12, 0), 32 << 30))


@pytest.fixture
def machine(monkeypatch):
    """Sets what the probe finds, and returns the findings by part; no engine is loaded."""
    monkeypatch.setattr(doctor, "_engine", lambda *_: doctor.Finding("engine", "active", ""))

    def examine(driver, targets=(75, 120), **missing):
        status = reduction.CoreStatus("native", "", "avx2", ("avx2",), "GCC", targets is not None, targets)
        for module in (doctor, reduction):
            monkeypatch.setattr(module, "core_status", lambda: status)
        monkeypatch.setattr(probe, "driver", lambda: driver)
        monkeypatch.setattr(probe, "missing_for", lambda provider: missing.get(provider.replace("-", "_")))
        return {finding.part: finding for finding in doctor.examine(None, "auto", None, None)}

    return examine


def test_with_all_that_gpus_need(machine, monkeypatch):
    monkeypatch.setattr(doctor, "_missing_in_engine", lambda *_: None)
    findings = machine(Driver((13, 1), GPUS))
    assert findings["NVIDIA driver"].state == "active"
    assert findings["NVIDIA driver"].detail == "CUDA 13.1: A (sm89, 24.0 GiB), B (sm120, 32.0 GiB)"
    assert findings["CUDA reduction"].state == "active"
    assert "sm75, sm120" in findings["CUDA reduction"].detail
    for provider in ("cuda", "tensorrt", "tensorrt-rtx"):
        assert findings[f"provider {provider}"].state == "active"
    assert f"onnxruntime {probe.installed('onnxruntime')}" in findings["provider cuda"].detail


def test_what_is_missing_is_told_and_is_no_fault(machine):
    lacks = {"cuda": "no cuDNN", "tensorrt": "no TensorRT", "tensorrt_rtx": "no RTX"}
    findings = machine(Driver(None, (), "No driver."), targets=None, **lacks)
    assert findings["NVIDIA driver"] == doctor.Finding("NVIDIA driver", "missing", "No driver.")
    assert findings["CUDA reduction"].state == "missing"
    assert "MEMEDGE_REQUIRE_CUDA=1" in findings["CUDA reduction"].detail
    for provider, detail in lacks.items():
        part = f"provider {provider.replace('_', '-')}"
        assert findings[part] == doctor.Finding(part, "missing", detail)
    assert not [finding for finding in findings.values() if finding.state == "broken"]


def test_two_onnx_runtimes_are_broken(machine, monkeypatch):
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(probe, "distributions", lambda _module: both)
    finding = machine(Driver((13, 0), GPUS))["ONNX Runtime"]
    assert finding.state == "broken"
    assert finding.detail.startswith("onnxruntime and onnxruntime-gpu share one module and overwrite each other")


@pytest.mark.parametrize(("code", "state", "status"), [(0, "active", 0), (100, "missing", 0), (803, "broken", 1)])
def test_the_command_on_a_driver_over_host_memory(cuda_stub, code, state, status):
    environment = device.stub_environment(cuda_stub, init=code)
    command = [sys.executable, "-P", "-m", "memedge.cli", "doctor", "--json", "--provider", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    findings = {finding["part"]: finding for finding in json.loads(done.stdout)}
    assert findings["NVIDIA driver"]["state"] == state
    assert done.returncode == status, done.stderr


@pytest.mark.parametrize("provider", ["tensorrt", "tensorrt-rtx"])
def test_a_gpu_without_plans_is_told_how_to_build_them(monkeypatch, engine, provider):
    monkeypatch.setattr(probe, "driver", lambda: Driver((13, 0), GPUS[:1], None))
    monkeypatch.setattr(probe, "missing_for", lambda _: None)
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, fake_tensorrt)
    (finding,) = (f for f in doctor.examine(engine, "cpu", None, 1) if f.part == f"provider {provider}")
    assert finding.state == "missing"
    assert f"run `memedge build {engine} --provider {provider} --gpu SM89`" in finding.detail
