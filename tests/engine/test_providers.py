"""One test body for ONNX Runtime on the processor and, where there is a GPU, for all providers that use it."""

import json
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import reference
from models import make_checkpoint

from memedge import Detector
from memedge.engine import probe
from memedge.engine.engine import Engine
from memedge.engine.precision import ENGINE
from memedge.engine.providers import PROVIDERS
from memedge.engine.tensorrt_module import load_module, plan_provider
from memedge.export.export import export
from memedge.export.tensorrt import build

PROMPTS = ["a star", "", "two red bicycles", "a photo of a cat", "x", "the sea", "a hat", "rain", "a clock"]
DRAWS = 2
EXECUTION_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("gpu") / "model")


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def exported(request, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / request.param
    export(model, folder, draws=DRAWS, precision=request.param)
    return folder


ON_GPU = [pytest.param(row.name, marks=pytest.mark.gpu) for row in PROVIDERS.values() if row.on_gpu]


@pytest.fixture(params=["cpu", *ON_GPU])
def provider(request, exported):
    """A provider that can run here; TensorRT's has plans of the engine."""
    if request.param == "cpu":
        return "cpu"
    if missing := probe.missing_for(request.param):
        pytest.skip(missing)
    if request.param != "cuda":
        trt, target = load_module(plan_provider(request.param)), probe.driver().gpus[0].target.upper()
        if request.param == "tensorrt-rtx" and target not in trt.ComputeCapability.__members__:
            pytest.skip(f"TensorRT-RTX {trt.__version__} has no {target}")
        build(exported, request.param)
    return request.param


def test_statistics_are_those_of_torch(provider, exported, model):
    expected = reference.statistics(model, PROMPTS, DRAWS)
    norm, alignment = (np.array([e[key] for e in expected]) for key in ("norm", "uncond_delta/channel"))
    some = np.array([bool(prompt) for prompt in PROMPTS])
    detector = Detector.load(exported, provider)
    allowed = ENGINE[detector.info.precision]
    for _ in range(3):  # the third time as CUDA graphs
        found = detector.score(PROMPTS)
        np.testing.assert_allclose(found.norm[some], norm[some], rtol=allowed.norm)
        np.testing.assert_allclose(found.alignment[some], alignment[some], atol=allowed.alignment)
        assert found.norm[1] == found.alignment[1] == 0


def test_equal_calls_give_equal_bits(provider, exported):
    detector = Detector.load(exported, provider)
    first = detector.score(PROMPTS)
    for _ in range(20):
        again = detector.score(PROMPTS)
        np.testing.assert_array_equal(again.norm, first.norm)
        np.testing.assert_array_equal(again.alignment, first.alignment)


def test_threads_agree(provider, exported):
    detector = Detector.load(exported, provider)
    expected = detector.score(PROMPTS).norm
    found = []
    threads = [threading.Thread(target=lambda: found.append(detector.score(PROMPTS).norm)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for norm in found:
        np.testing.assert_allclose(norm, expected, rtol=1e-5)


def test_changes_at_taps_are_those_of_the_processor(provider, exported):
    """Several prompts, more than a call takes, and one; TensorRT's the third time as CUDA graphs."""
    own, true = (Engine.open(exported, name, None, None) for name in (provider, "cpu"))
    assert own.backend.screens
    tolerance = {"fp32": 1e-4, "fp16": 3e-2}[own.backend.precision]
    own.rows_per_call = min(own.rows_per_call, 4)
    for tap in range(1, 1 + len(own.directory.manifest.taps)):
        for prompts in (PROMPTS, PROMPTS[:1]):
            ids = own.tokenize(prompts)[0]
            expected = true.changes(true.encode(ids), tap)
            for _ in range(3):
                found = own.changes(own.encode(ids), tap)
                np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * expected.max())


def test_early_decisions_and_one_prompt_at_a_time(provider, exported):
    """Subsets of a batch are gathered on the GPU; another batch shape may round differently."""
    detector = Detector.load(exported, provider)
    whole = detector.score(PROMPTS)
    noise = ENGINE[detector.info.precision].norm
    for place, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(detector.score([prompt]).norm, whole.norm[place : place + 1], rtol=noise)
    assert [verdict.passes for verdict in detector.detect(PROMPTS)] == [2 * DRAWS] * len(PROMPTS)


def test_nothing_is_copied_and_all_runs_where_it_should(provider, exported, tmp_path, monkeypatch):
    """By ONNX Runtime's own profile; TensorRT's plans run on the GPU alone."""
    if provider not in EXECUTION_PROVIDERS:
        pytest.skip("only ONNX Runtime has a profile")

    plain = onnxruntime.SessionOptions
    profiles = []

    def profiled():
        options = plain()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / f"profile{len(profiles)}")
        profiles.append(options)
        return options

    monkeypatch.setattr(onnxruntime, "SessionOptions", profiled)
    engine = Engine.open(exported, provider, None, None)
    engine.statistics(engine.encode(engine.tokenize(PROMPTS)[0]), "channel", "uncond_delta")
    for session in (engine.backend._text_encoder, engine.backend._unet):
        events = json.loads(Path(session.end_profiling()).read_text())
        nodes = [event for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
        assert nodes
        assert {node["args"]["provider"] for node in nodes} == {EXECUTION_PROVIDERS[provider]}
        assert not [node for node in nodes if node["args"]["op_name"].startswith("Memcpy")]
