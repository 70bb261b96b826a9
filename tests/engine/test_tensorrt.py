"""The TensorRT backend over a stand-in for TensorRT: its lanes, buffers, graphs and errors, on the processor."""

import gc
import shutil
import sys
import threading
import weakref

import fake_tensorrt
import numpy as np
import pytest
from memories import CountingMemory

from memedge import Detector
from memedge.decision.rule import Rule
from memedge.engine.directory import SCREENS
from memedge.engine.engine import Engine
from memedge.engine.errors import EngineError, InputError, IntegrityError, ProviderError
from memedge.engine.manifest import Estimate, Screen
from memedge.engine.probe import Gpu
from memedge.engine.tensorrt import TensorRtBackend
from memedge.export.export import export

PROMPTS = ["a star", "", "two red bicycles", "a photo of a cat", "x", "the sea", "a hat", "rain", "a clock"]
PROVIDERS = ["tensorrt", "tensorrt-rtx"]
MOST = 4


@pytest.fixture
def stand_in(monkeypatch):
    """The stand-in under both modules' names."""
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, fake_tensorrt)
    fake_tensorrt.contexts.clear()
    fake_tensorrt.caches.clear()
    yield fake_tensorrt
    fake_tensorrt.refusals.clear()


@pytest.fixture(scope="module")
def built(engine, tmp_path_factory):
    """The engine with plans of both providers for an "sm89" called "Card"."""
    return fake_tensorrt.record_plans(shutil.copytree(engine, tmp_path_factory.mktemp("built") / "engine"), MOST)


@pytest.fixture(scope="module")
def drawn(checkpoint, tmp_path_factory):
    """An engine of three draws, with plans of which a call takes two rows."""
    folder = tmp_path_factory.mktemp("drawn") / "engine"
    export(checkpoint, folder, draws=3, precision="fp16")
    return fake_tensorrt.record_plans(folder, 2)


def open_lane(directory, provider, memories=None, gpu="Card"):
    def make():
        memory = CountingMemory()
        if memories is not None:
            memories.append(memory)
        return memory

    return TensorRtBackend(directory, provider, make, Gpu(gpu, (8, 9), 1 << 34))


def changes(engine, prompts, tap):
    return engine.changes(engine.encode(engine.tokenize(prompts)[0]), tap)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_scores_are_those_of_onnx_runtime(built, provider):
    own = Detector(Engine(built, open_lane(built, provider)))
    true = Detector.load(built.path, "cpu")
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[2:5], PROMPTS):  # the last again, by graphs
        found, expected = own.score(prompts), true.score(prompts)
        np.testing.assert_allclose(found.norm, expected.norm, rtol=1e-5)
        np.testing.assert_allclose(found.alignment, expected.alignment, atol=1e-6)
    assert own.info.key == f"{provider}-fp32"


@pytest.mark.usefixtures("stand_in")
def test_only_ids_go_in_and_only_statistics_come_out(built):
    memories = []
    engine = Engine(built, open_lane(built, "tensorrt", memories))
    (memory,) = memories
    for _ in range(3):  # plain, captured, replayed
        memory.reset()
        ids = engine.tokenize(["a star"])[0]
        engine.statistics(engine.encode(ids), "channel", "uncond_delta")
        assert memory.uploads == [ids.nbytes, 2 * 8, 2 * 8]  # ids; prompt and row of two rows
        assert memory.downloads == [3 * 2 * 8]


@pytest.mark.usefixtures("stand_in")
def test_calls_are_recorded_once_per_shape_and_replayed(built):
    memories = []
    engine = Engine(built, open_lane(built, "tensorrt", memories))
    (memory,) = memories
    memory.reset()
    ids = engine.tokenize(["a star"])[0]
    # The text encoder has run on the empty prompt before: it is a call ahead of the UNet.
    for captures, launches in ((1, 0), (2, 1), (2, 3), (2, 5)):
        engine.statistics(engine.encode(ids), "channel", "uncond_delta")
        assert (memory.captures, memory.launches) == (captures, launches)


def test_what_cannot_be_captured_runs_plainly(stand_in, built):
    stand_in.refusals.add("capture")
    memories = []
    own = Detector(Engine(built, open_lane(built, "tensorrt-rtx", memories)))
    for _ in range(2):
        found = own.score(PROMPTS[:2])
    np.testing.assert_allclose(found.norm, Detector.load(built.path, "cpu").score(PROMPTS[:2]).norm, rtol=1e-5)
    assert memories[0].captures == memories[0].launches == 0


def test_compiled_kernels_are_kept_for_the_next_process(stand_in, built):
    Engine(built, open_lane(built, "tensorrt-rtx")).uncond  # noqa: B018
    first = len(stand_in.caches[0].content)
    assert first > 0
    open_lane(built, "tensorrt-rtx")
    assert len(stand_in.caches[2].content) == first


def test_every_thread_has_contexts_and_a_stream_of_its_own(stand_in, built):
    memories = []
    own = Detector(Engine(built, open_lane(built, "tensorrt", memories)))
    expected = own.score(PROMPTS).norm
    found, seen = {}, {}

    def work(number):
        found[number] = [own.score(PROMPTS).norm for _ in range(3)]
        seen[number] = [changes(own.engine, PROMPTS, 1) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(memories) == 5
    assert len(found) == 4
    for results in found.values():
        for norm in results:
            np.testing.assert_array_equal(norm, expected)
    for results in seen.values():  # against a reference that one of the threads computed, which have all ended
        for change in results:
            np.testing.assert_array_equal(change, changes(own.engine, PROMPTS, 1))
    assert all(len(context.threads) == 1 for context in stand_in.contexts)


@pytest.mark.usefixtures("stand_in")
def test_what_a_thread_had_on_the_gpu_is_freed_when_it_ends(built):
    """At once: garbage collection knows nothing of a GPU's memory running out."""
    memories = []
    own = Detector(Engine(built, open_lane(built, "tensorrt", memories)))
    changes(own.engine, PROMPTS[:1], 1)  # the reference stays on the GPU with whoever computed it

    def work():
        own.score(PROMPTS[:2])
        changes(own.engine, PROMPTS[:2], 1)

    gc.collect()
    gc.disable()
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        memory = weakref.ref(memories.pop())
        assert memory() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("refusal", "error", "message"),
    [
        ("load", IntegrityError, "of another version.*memedge build"),
        ("context", EngineError, "cannot prepare.*out of memory"),
        ("shape", EngineError, "cannot prepare"),
        ("run", EngineError, "cannot run.*illegal memory access"),
    ],
)
def test_what_tensorrt_refuses_is_said_in_its_words(stand_in, built, refusal, error, message):
    stand_in.refusals.add(refusal)
    with pytest.raises(error, match=message):
        Engine(built, open_lane(built, "tensorrt"))


@pytest.mark.usefixtures("stand_in")
def test_plans_for_another_gpu_are_refused(built):
    with pytest.raises(ProviderError, match="memedge build"):
        open_lane(built, "tensorrt", gpu="Another card")


def test_without_tensorrt_the_error_names_the_extra(built):
    for provider in PROVIDERS:
        if provider.replace("-", "_") in sys.modules:
            pytest.skip("it is installed here")
    with pytest.raises(ProviderError, match=r"pip install 'memedge\[tensorrt"):
        open_lane(built, "tensorrt")


@pytest.mark.usefixtures("stand_in")
def test_a_prompt_with_more_rows_than_a_plan_takes_is_several_calls(built):
    engine = Engine(built, open_lane(built, "tensorrt"))
    assert engine.rows_per_call == MOST
    engine.rows_per_call = 1
    found = Detector(engine).score(PROMPTS)
    np.testing.assert_allclose(found.norm, Detector.load(built.path, "cpu").score(PROMPTS).norm, rtol=1e-5)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_changes_at_taps_are_those_of_onnx_runtime(built, provider):
    own = Engine(built, open_lane(built, provider))
    true = Engine.open(built.path, "cpu", None, 1)
    assert own.backend.screens and built.manifest.taps
    for tap in range(1, 1 + len(built.manifest.taps)):
        for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[2:5], PROMPTS):  # the last again, by graphs
            found, expected = changes(own, prompts, tap), changes(true, prompts, tap)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_changes_of_more_draws_than_a_call_takes(drawn, provider):
    own = Engine(drawn, open_lane(drawn, provider))
    true = Engine.open(drawn.path, "cpu", None, 1)
    assert own.rows_per_call < own.draws
    for tap in range(1, 1 + len(drawn.manifest.taps)):
        found, expected = changes(own, PROMPTS[:3], tap), changes(true, PROMPTS[:3], tap)
        np.testing.assert_allclose(found, expected, rtol=3e-2, atol=3e-2 * expected.max())


@pytest.mark.usefixtures("stand_in")
def test_a_screened_prompt_is_one_graph_and_only_changes_come_out(built):
    memories = []
    engine = Engine(built, open_lane(built, "tensorrt", memories))
    (memory,) = memories
    changes(engine, ["a star"], 1)  # which computes the reference
    states = engine.encode(engine.tokenize(["a star"])[0])
    for captures, launches in ((1, 0), (0, 1), (0, 1)):
        memory.reset()
        engine.changes(states, 1)
        assert (memory.captures, memory.launches) == (captures, launches)
        assert memory.uploads == [8, 8]  # prompt and row
        assert memory.downloads == [4 * built.manifest.taps[0].channels]
    memory.reset()
    engine.statistics(states, "channel", "uncond_delta")
    assert memory.launches == 0  # a graph of its own, though the buffers are shared


@pytest.mark.usefixtures("stand_in")
def test_another_reference_is_another_graph(built):
    """Which lives as long as what reads it."""
    engine = Engine(built, open_lane(built, "tensorrt"))
    states = engine.encode(engine.tokenize(PROMPTS[:1])[0])
    first = engine.changes(states, 1)
    memory = engine.backend.memory
    zeros = memory.upload(np.zeros((1, *built.manifest.taps[0].shape), np.float32))
    prompt, row = np.zeros(1, np.int64), np.zeros(1, np.int64)
    whole = [engine.backend.change(1, states.tensor, prompt, row, zeros) for _ in range(3)]
    del zeros
    gc.collect()
    for _ in range(3):
        np.testing.assert_array_equal(engine.changes(states, 1), first)
    assert (whole[0] > 1.5 * first[0]).any()
    np.testing.assert_array_equal(whole[1:], whole[:-1])


@pytest.mark.usefixtures("stand_in")
def test_only_the_tap_that_is_asked_for_is_loaded(built):
    engine = Engine(built, open_lane(built, "tensorrt"))
    assert engine.backend._screens == {}
    changes(engine, PROMPTS, 2)
    assert set(engine.backend._screens) == {2}


@pytest.fixture
def own_folder(engine, tmp_path):
    return shutil.copytree(engine, tmp_path / "engine")


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("screens", [(), SCREENS[:1]])
def test_plans_without_the_screens_say_that_they_are_to_be_built_again(own_folder, screens):
    directory = fake_tensorrt.record_plans(own_folder, MOST, screens)
    engine = Engine(directory, open_lane(directory, "tensorrt"))
    assert not engine.backend.screens
    with pytest.raises(ProviderError, match=r"none of the screen's: run `memedge build .*engine --provider tensorrt"):
        changes(engine, PROMPTS, 1)
    # An engine may have been calibrated by other plans, which had them.
    weights = (0.0,) * directory.manifest.taps[0].channels
    found = Screen(1, weights, 0.0, 1.0, 0.1, 9, 1.0, Estimate(0.5, 0.4, 0.6))
    detector = Detector(engine, Rule(source="calibrated", threshold=1.0, operating_point="calibrated", screen=found))
    detector.warmup()
    with pytest.raises(InputError, match=r"stores no screen for tensorrt-fp32 \(The plans here .* run `memedge build`"):
        detector.detect(PROMPTS, "screen")
    assert all(verdict.memorized is not None for verdict in detector.detect(PROMPTS))


@pytest.mark.usefixtures("stand_in")
def test_a_plan_that_changed_since_the_engine_was_opened_is_not_loaded(own_folder):
    directory = fake_tensorrt.record_plans(own_folder, MOST)
    engine = Engine(directory, open_lane(directory, "tensorrt"))
    first, second = (file.path for file in engine.backend._plans.screens[:2])
    first.write_bytes(second.read_bytes())
    second.unlink()
    with pytest.raises(IntegrityError, match="is not the plan that was built: run `memedge build"):
        changes(engine, PROMPTS, 1)
    with pytest.raises(IntegrityError, match="is missing or a link: run `memedge build"):
        changes(engine, PROMPTS, 2)


@pytest.mark.parametrize("refusal", ["load", "context", "run"])
def test_what_tensorrt_refuses_of_a_tap_is_said_in_its_words(stand_in, built, refusal):
    engine = Engine(built, open_lane(built, "tensorrt"))
    states = engine.encode(engine.tokenize(PROMPTS[:1])[0])
    stand_in.refusals.add(refusal)
    with pytest.raises(EngineError, match=r"TensorRT cannot .*screen_1-tensorrt-sm89"):
        engine.changes(states, 1)
    stand_in.refusals.clear()
    assert np.isfinite(engine.changes(states, 1)).all()
