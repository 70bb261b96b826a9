"""The OpenVINO backend: what it refuses, what it keeps, threads, and the order of "auto"."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from engines import edit_manifest, list_file
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from memedge import Detector
from memedge.engine import openvino, probe
from memedge.engine.errors import EngineError, IntegrityError, ProviderError

EMBEDDED = Path(__file__).parents[2] / "memedge" / "data" / "engine"
PROMPTS = ["a star", "zebra on skis", "house", ""] * 6
bf16 = pytest.mark.skipif("bf16" not in openvino.precisions("fp32"), reason="this CPU does not compute in bf16")


@pytest.fixture
def embedded(tmp_path):
    """A copy of the embedded engine without what was computed on first use."""
    shutil.copytree(EMBEDDED, tmp_path / "engine", ignore=shutil.ignore_patterns("baseline.*-*"))
    return tmp_path / "engine"


@pytest.mark.parametrize(
    ("operator", "attribute", "value"),
    [("LayerNormalization", "stash_type", 0), ("Conv", "strides", [-3, -3]), ("Conv", "pads", [-60000] * 4)],
)
def test_what_openvino_cannot_compile_or_compute_is_one_sentence(embedded, operator, attribute, value):
    path = embedded / "unet.onnx"
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == operator)
    kept = [one for one in node.attribute if one.name != attribute]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])
    path.write_bytes(model.SerializeToString())
    list_file(embedded, path.name)
    with pytest.raises(EngineError, match=r"OpenVINO cannot .*: export the engine again") as caught:
        Detector.load(embedded, provider="openvino", precision="fp32").score(["a star"])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@bf16
def test_verdicts_are_those_of_onnx_runtime(detector):
    prompts = ["the left luggage sign", "a red bicycle", "skull icon", *PROMPTS]
    expected = detector.score(prompts)
    found = Detector.load(provider="openvino", precision="bf16").score(prompts)
    assert found.memorized.tolist() == expected.memorized.tolist()
    assert any(found.memorized) and not all(found.memorized)


def test_a_prompt_does_not_depend_on_its_batch(embedded):
    detector = Detector.load(embedded, provider="openvino", precision="fp32")
    together = detector.score(PROMPTS)  # blocks of 16 rows
    alone = [detector.score([prompt]) for prompt in PROMPTS[:4]]  # single rows
    np.testing.assert_allclose(together.norm[:4], [s.norm[0] for s in alone], rtol=1e-5)
    np.testing.assert_allclose(together.alignment[:4], [s.alignment[0] for s in alone], atol=1e-5)
    assert together.norm[3] == 0


def test_changes_at_taps_are_those_of_onnx_runtime(detector, embedded):
    prompts = ["the left luggage sign", "a star", ""]
    for tap in range(1, 1 + len(detector.info.manifest.taps)):
        found, expected = (
            one.engine.changes(one.engine.encode(one.engine.tokenize(prompts)[0]), tap)
            for one in (Detector.load(embedded, "openvino", "fp32"), detector)
        )
        np.testing.assert_allclose(found[:2], expected[:2], rtol=1e-4)
        assert (found[2] < 1e-3 * expected[:2].max()).all()


def test_threads_share_a_detector(embedded):
    detector = Detector.load(embedded, provider="openvino", precision="fp32", threads=1)
    expected = detector.score(PROMPTS)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: detector.score(PROMPTS), range(8)):
            np.testing.assert_array_equal(found.norm, expected.norm)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("baseline.*-*.safetensors"))


@pytest.mark.slow
def test_own_unconditional_prediction_is_kept(embedded):
    """ε_0 is computed by the backend itself, once; what is damaged or another engine's is computed again."""
    Detector.load(embedded, provider="openvino", precision="fp32")
    (path,) = kept(embedded)
    good, content = load_file(path)["uncond"], path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])  # a value that was changed
    for bad in (b"", content[:-5], content.replace(b"openvino", b"openvina"), flipped):
        path.write_bytes(bad)
        Detector.load(embedded, provider="openvino", precision="fp32")
        np.testing.assert_array_equal(load_file(path)["uncond"], good)
        assert b"openvina" not in path.read_bytes()
    time = path.stat().st_mtime_ns
    Detector.load(embedded, provider="openvino", precision="fp32")
    assert path.stat().st_mtime_ns == time


def test_a_kept_prediction_belongs_to_one_backend(embedded):
    """Another backend's is not taken under this one's name, though both are whole."""
    Detector.load(embedded, provider="openvino", precision="fp32")
    (path,) = kept(embedded)
    said = metadata(path)
    for name in ("engine", "backend", "runtime", "sha256"):
        save_file(load_file(path), path, {**said, name: "another"})
        Detector.load(embedded, provider="openvino", precision="fp32")
        assert metadata(path) == said


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "numpy") as file:
        return file.metadata()


def test_compiled_models_lie_in_the_users_cache(embedded, tmp_path, monkeypatch):
    """Those that come with an engine are not read: OpenVINO verifies none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(openvino, "SMALL", 0)
    Detector.load(embedded, provider="openvino", precision="fp32")
    assert not (embedded / "plans").exists()
    assert list((tmp_path / "cache").rglob("plans/openvino/*.blob"))


def test_where_the_engine_cannot_be_written(embedded, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("memedge.engine.cache.os.access", lambda path, _mode: embedded not in (path, *path.parents))
    Detector.load(embedded, provider="openvino", precision="fp32")
    assert not kept(embedded)
    assert len(kept(tmp_path / "cache")) == 1


def test_refusals(engine, embedded, monkeypatch):
    with pytest.raises(ProviderError, match=r"cannot run .* in 'int8' on this CPU: use"):
        Detector.load(engine, provider="openvino", precision="int8")
    monkeypatch.setattr(openvino, "precisions", lambda _own: ("fp32",))
    with pytest.raises(ProviderError, match=r"cannot run .* in 'bf16' on this CPU: use fp32"):
        Detector.load(engine, provider="openvino", precision="bf16")
    monkeypatch.undo()
    edit_manifest(embedded, lambda m: m.update(precision="fp16"))
    with pytest.raises((ProviderError, IntegrityError)):
        Detector.load(embedded, provider="openvino")


def test_auto_takes_what_is_calibrated(embedded, monkeypatch):
    """The first of a fixed order that is installed, that this CPU can do, and that the engine is calibrated for."""
    best = openvino.precisions("fp32")[0]

    def key() -> str:
        return Detector.load(embedded).info.key

    assert key() == f"openvino-{best}"
    assert Detector.load(embedded, precision="fp32").info.key == "openvino-fp32"
    edit_manifest(embedded, lambda m: m["calibrations"].pop(f"openvino-{best}"))
    assert key() == ("openvino-fp32" if best != "fp32" else "cpu-fp32")
    monkeypatch.setattr(probe, "find_spec", lambda name: None if name == "openvino" else object())
    assert key() == "cpu-fp32"
    monkeypatch.undo()
    edit_manifest(embedded, lambda m: m.update(calibrations={}))
    assert key() == "cpu-fp32"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")


def test_not_installed():
    """One sentence that names the extra, as for every provider."""
    code = (
        "import sys; sys.modules['openvino'] = None\n"
        "from memedge import Detector\n"
        "try: Detector.load(provider='openvino')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = python(code)
    assert done.stdout.startswith("ProviderError Provider 'openvino' needs OpenVINO"), done.stderr
    assert "memedge[openvino]" in done.stdout


def test_no_torch_is_imported():
    code = (
        "import sys, json; from memedge import Detector\n"
        "Detector.load(provider='openvino', precision='fp32').score(['a'])\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'onnx', 'onnxruntime'}\n"
        "print(json.dumps(sorted(heavy & sys.modules.keys())))"
    )
    done = python(code)
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr


def test_threads_are_not_tied_to_processors():
    """Pinned to a processor each, the threads of two processes meet on the same ones, and the others idle."""
    code = (
        "import os, threading\n"
        "os.sched_setaffinity(0, range(os.cpu_count()))\n"  # tests keep to one processor
        "from memedge import Detector\n"
        "detector = Detector.load(provider='openvino', threads=1)\n"
        "work = threading.Thread(target=detector.score, args=(['a star'] * 64,))\n"
        "allowed = set()\n"
        "work.start()\n"
        "while work.is_alive():\n"
        "    for task in os.listdir('/proc/self/task'):\n"
        "        try: allowed.add(frozenset(os.sched_getaffinity(int(task))))\n"
        "        except ProcessLookupError: pass\n"
        "print(allowed == {frozenset(os.sched_getaffinity(0))})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout == "True\n"


def test_signals_reach_a_process_that_has_let_go_of_engines():
    """A server that has reloaded its engine ends as SIGTERM asks it to, also with a stack for signals of its own."""
    program = f"""
import faulthandler, signal
from memedge import Detector
faulthandler.enable()
first, second = (Detector.load({str(EMBEDDED)!r}, provider="openvino", threads=1) for _ in range(2))
first.score(["a star"])
del first
second.score(["a star"])
del second
signal.signal(signal.SIGTERM, lambda *_: print("ended as asked"))
signal.raise_signal(signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ended as asked\n"), done.stderr
