"""ONNX Runtime on a memory that counts what is moved: the code that runs on GPUs, on the processor's memory."""

import numpy as np
import pytest
from memories import CountingMemory

from memedge.engine.denoiser import Denoiser
from memedge.engine.directory import EngineDirectory
from memedge.engine.engine import Engine
from memedge.engine.errors import EngineError, ProviderError
from memedge.engine.ort import OrtBackend


@pytest.fixture
def opened(engine):
    directory = EngineDirectory.open(engine)
    memory = CountingMemory()
    backend = OrtBackend(engine, directory.baseline.cached, "fp32", memory, 1)
    return Engine(directory, backend), memory, directory


def test_cached_inputs_go_in_once(opened):
    _, memory, directory = opened
    cached = [array.nbytes for array in directory.baseline.cached.values()]
    ids = 8 * directory.ids_width
    assert memory.uploads == [*cached, ids, directory.baseline.uncond.nbytes]


@pytest.mark.parametrize("prompts", [["a star"], ["a", "b", "c"]])
def test_only_ids_go_in_and_only_statistics_come_out(opened, prompts):
    engine, memory, _ = opened
    ids = engine.tokenize(prompts)[0]
    for _ in range(2):
        memory.reset()
        engine.statistics(engine.encode(ids), "channel", "uncond_delta")
        rows = 2 * len(prompts)
        assert memory.uploads == [ids.nbytes, 8 * rows, 8 * rows]  # which cached row and which prompt is for each row
        assert memory.downloads == [3 * 8 * rows]


def test_a_provider_that_onnx_runtime_does_not_give_is_an_error(engine):
    """Also where its package claims that it has it, as onnxruntime-gpu does without CUDA's libraries."""
    memory = CountingMemory()
    memory.device, memory.stream = "cuda", 1
    directory = EngineDirectory.open(engine)
    with pytest.raises(ProviderError, match="memedge doctor"):
        OrtBackend(engine, directory.baseline.cached, "fp32", memory, 1)


def test_what_onnx_runtime_cannot_run_is_an_error_in_its_words(opened):
    """Such as a GPU without room for so many rows; here, a prompt that is not there."""
    engine, _, _ = opened
    states = engine.encode(engine.tokenize(["a"])[0]).tensor
    with pytest.raises(EngineError, match=r"cannot compute 1 rows on cpu \(.+Gather.+\): use a smaller batch size"):
        engine.backend.predict(states, np.array([7]), np.array([0]))
    engine.backend.predict(states, np.array([0]), np.array([0]))  # and goes on


def test_calls_of_one_shape(opened, monkeypatch):
    """As on GPUs: every call is filled up to the same number of rows, and the results stay what they are."""
    engine, _, _ = opened
    states = engine.encode(engine.tokenize(["a", "b", "c"])[0])
    noise = np.random.default_rng(0).standard_normal((3, *engine.directory.manifest.latent_shape), dtype=np.float32)
    timestep = engine.directory.manifest.timesteps[0]
    denoiser = Denoiser(engine)
    expected = (
        engine.statistics(states, "channel", "uncond_delta"),
        denoiser.predict(states, states.all, noise, timestep),
    )
    shapes = set()

    def counted(name):
        original = getattr(engine.backend, name)

        def call(states, prompt, row, *rest):
            shapes.add((name, len(prompt), len(row), *(len(r) for r in rest[:1] if name == "predict_at")))
            return original(states, prompt, row, *rest)

        return call

    for name in ("statistics", "predict_at"):
        monkeypatch.setattr(engine.backend, name, counted(name))
    monkeypatch.setattr(engine.backend, "one_shape", True)
    monkeypatch.setattr(engine, "rows_per_call", 4)
    found = engine.statistics(states, "channel", "uncond_delta"), denoiser.predict(states, states.all, noise, timestep)
    assert shapes == {("statistics", 4, 4), ("predict_at", 4, 4, 2)}
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5)
