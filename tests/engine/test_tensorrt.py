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
from memedge.engine import plans
from memedge.engine.directory import TEXT_ENCODER, UNET, EngineDirectory
from memedge.engine.engine import Engine
from memedge.engine.errors import EngineError, IntegrityError, ProviderError
from memedge.engine.probe import Gpu
from memedge.engine.tensorrt import TensorRtBackend

PROMPTS = ["a star", "", "two red bicycles", "a photo of a cat", "x", "the sea", "a hat", "rain", "a clock"]
PROVIDERS = ["tensorrt", "tensorrt-rtx"]
MOST = {"unet": 4, "text": 3}


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
    folder = shutil.copytree(engine, tmp_path_factory.mktemp("built") / "engine")
    directory = EngineDirectory.open(folder)
    for provider in PROVIDERS:
        files = []
        for component, name in (("text", TEXT_ENCODER), ("unet", UNET)):
            content = memoryview(fake_tensorrt.plan(folder, name, MOST[component]))
            plan = plans.describe(
                content,
                component=component,
                backend=provider,
                target="sm89",
                version=fake_tensorrt.__version__,
                gpu="Card",
                most=MOST[component],
                seconds=1.0,
                peak_memory=1,
            )
            files.append((plan, content))
        plans.record(plans.writable_folder(directory), directory, files)
    return directory


def open_lane(directory, provider, memories=None, gpu="Card"):
    def make():
        memory = CountingMemory()
        if memories is not None:
            memories.append(memory)
        return memory

    return TensorRtBackend(directory, provider, make, Gpu(gpu, (8, 9), 1 << 34))


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
    found = {}

    def work(number):
        found[number] = [own.score(PROMPTS).norm for _ in range(3)]

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
    assert all(len(context.threads) == 1 for context in stand_in.contexts)


@pytest.mark.usefixtures("stand_in")
def test_what_a_thread_had_on_the_gpu_is_freed_when_it_ends(built):
    """At once: garbage collection knows nothing of a GPU's memory running out."""
    memories = []
    own = Detector(Engine(built, open_lane(built, "tensorrt", memories)))
    gc.collect()
    gc.disable()
    try:
        thread = threading.Thread(target=lambda: own.score(PROMPTS[:2]))
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
    assert engine.rows_per_call == MOST["unet"]
    engine.rows_per_call = 1
    found = Detector(engine).score(PROMPTS)
    np.testing.assert_allclose(found.norm, Detector.load(built.path, "cpu").score(PROMPTS).norm, rtol=1e-5)
