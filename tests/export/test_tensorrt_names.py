"""Every TensorRT name that our code uses is in the real bindings: the oldest and newest of each major version we take.

The bindings of TensorRT-RTX that are installed are looked at by themselves. The others are fetched by pip, so those
tests are slow ones, which skip where they cannot be fetched or there is no C compiler.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trt_names

import memedge.engine
import memedge.export

FILES = sorted(path for package in (memedge.engine, memedge.export) for path in Path(package.__path__[0]).glob("*.py"))
OURS = [path for path in FILES if path.name.startswith("tensorrt")]


def test_names_are_found(tmp_path):
    source = tmp_path / "source.py"
    source.write_text(
        "def f(trt, config, other):\n"
        "    class Log(trt.ILogger):\n"
        "        def log(self, severity): ...\n"
        "        def _own(self): ...\n"
        "    config.clear_flag(trt.BuilderFlag.TF32)\n"
        "    config.progress_monitor = other.attribute\n"
        "    trt.__version__\n"
    )
    assert trt_names.used_names([source]) == {
        "ILogger",
        "ILogger.log",
        "BuilderFlag",
        "BuilderFlag.TF32",
        "IBuilderConfig.clear_flag",
        "IBuilderConfig.progress_monitor",
    }


def test_installed_rtx():
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: memedge[tensorrt-rtx]")
    names = trt_names.used_names(OURS)
    assert len(names) > 30
    assert trt_names.missing(trt, names) == set()
    assert trt_names.missing(trt, ["BuilderFlag.FP16", "No.such", "Builder.build_engine"]) == {
        "BuilderFlag.FP16",
        "No.such",
        "Builder.build_engine",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wheel", "gone"),
    [
        ("tensorrt-cu13-bindings==10.13.2.6", []),
        ("tensorrt-cu13-bindings==10.*", []),
        ("tensorrt-cu13-bindings==11.0.0.114", ["BuilderFlag.FP16"]),
        ("tensorrt-cu13-bindings==11.*", ["BuilderFlag.FP16"]),
        ("tensorrt-rtx-cu13-bindings==1.4.0.76", []),
    ],
)
def test_names_exist(tmp_path, wheel, gone):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler, to make empty libraries with")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "wheel", wheel]
    fetched = subprocess.run(command, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"{wheel} cannot be fetched: {fetched.stderr.strip().splitlines()[-1]}")
    known = tmp_path / "known.py"
    known.write_text("trt.BuilderFlag.FP16")  # gone in TensorRT 11
    done = subprocess.run(
        [sys.executable, trt_names.__file__, tmp_path / "wheel", known, *OURS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = {*gone} if "rtx" in wheel else {*gone, *trt_names.RTX_ONLY}
    assert set(done.stdout.split()) == expected
