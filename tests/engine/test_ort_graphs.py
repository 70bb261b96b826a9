"""Calls recorded as CUDA graphs: over sessions that record on the processor; on a GPU, against calls that are not."""

import gc
import logging
import threading
import weakref

import numpy as np
import onnxruntime
import pytest
from graph_sessions import GraphSession
from memories import CountingMemory

from memedge import Detector, Gate
from memedge.engine import probe
from memedge.engine.directory import EngineDirectory
from memedge.engine.engine import Engine
from memedge.engine.errors import ProviderError
from memedge.engine.ort import OrtBackend
from memedge.engine.ort_graphs import OneThread, sizes
from memedge.engine.precision import ENGINE

PROMPTS = ["a star", "two red bicycles", "a photo of a cat", "", "the sea"]
MOST = 5  # rows of a call


@pytest.fixture
def made():
    """The sessions that `opened` was given to record with."""
    return []


@pytest.fixture
def opened(engine, made, monkeypatch):
    """An engine that takes itself for one on a GPU, in memory that counts; sessions that record are GraphSessions."""
    directory = EngineDirectory.open(engine)
    backend = OrtBackend(engine, directory.baseline.cached, "fp32", CountingMemory(), 1)
    plain = backend._session

    def session(path, *, arena=True, recorded=False):
        backend.provider = "cpu"
        try:
            found = plain(path, arena=arena)
        finally:
            backend.provider = "cuda"
        if recorded:
            made.append(GraphSession(found))
            return made[-1]
        return found

    own = Engine(directory, backend)  # before, for ε_0 is the cpu's
    monkeypatch.setattr(backend, "_session", session)
    monkeypatch.setattr(backend, "provider", "cuda")
    monkeypatch.setattr(backend, "one_shape", True)
    own.rows_per_call = MOST
    return own


def ids_of(engine, prompts=PROMPTS):
    return engine.tokenize(prompts)[0]


def statistics(engine, prompts):
    return engine.statistics(engine.encode(ids_of(engine, prompts)), "channel", "uncond_delta")


def done(sessions):
    return [[what for what, _ in session.log] for session in sessions]


@pytest.mark.parametrize(
    ("draws", "most", "expected"),
    [(1, 4, [1, 2]), (1, 2, [1, 2]), (1, 1, [1]), (3, 16, [3, 6]), (4, 4, [4]), (8, 4, [4])],
)
def test_one_prompts_calls_are_recorded(draws, most, expected):
    assert sizes(draws, most) == expected


def test_nothing_is_recorded_unasked(opened, made):
    statistics(opened, PROMPTS[:1])
    assert not made
    assert opened.backend.padded(1, MOST) == MOST


def test_each_shape_has_a_session_and_is_recorded_once(opened, made):
    for _ in range(2):
        opened.backend.record(MOST)
    draws = opened.draws
    assert opened.backend._recordings.prompts == [1]
    assert opened.backend._recordings.rows == [draws, 2 * draws]
    # Recorded, replayed on other inputs, and the same run plainly.
    assert done(made) == [["record", "replay", "plain"]] * 3
    assert {option for session in made for option in session.run_options} == {"1"}


def test_results_are_those_of_plain_calls(opened, made):
    expected = {count: statistics(opened, PROMPTS[:count]) for count in (1, 2, 3, 5)}
    predictions = opened.backend.memory.download(
        opened.backend.predict(opened.encode(ids_of(opened)[:1]).tensor, np.zeros(1, np.int64), np.ones(1, np.int64))
    )
    opened.backend.record(MOST)
    for count in (1, 2, 1, 3, 5, 1):
        for found, wanted in zip(statistics(opened, PROMPTS[:count]), expected[count], strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5)
    found = opened.backend.predict(
        opened.encode(ids_of(opened)[:1]).tensor, np.zeros(1, np.int64), np.ones(1, np.int64)
    )
    np.testing.assert_allclose(opened.backend.memory.download(found), predictions, rtol=0, atol=1e-5)
    assert all("replay" in log[3:] for log in done(made))


def test_calls_are_filled_up_to_the_next_recorded_number_of_rows(opened):
    opened.backend.record(MOST)
    n = opened.draws
    padded = [opened.backend.padded(rows, MOST) for rows in (n, n + 1, 2 * n, 2 * n + 1, MOST)]
    assert padded == [n, 2 * n, 2 * n, MOST, MOST]
    assert opened.backend.padded(1, 2 * n - 1) == n  # an engine with smaller calls


def test_addresses_stay(opened, made):
    opened.backend.record(MOST)
    bound = [list(session.bound) for session in made]
    for count in (1, 2, 1):
        statistics(opened, PROMPTS[:count])
    assert [session.bound for session in made] == bound
    own = [{pointer for name, _, pointer in names if not name.startswith("cached")} for names in bound]
    assert not own[0] & own[1] and not own[1] & own[2]
    cached = [{pair for pair in names if pair[0].startswith("cached")} for names in bound[1:]]
    assert cached[0] == cached[1] != set()  # not a copy each


def test_only_ids_go_in_and_only_statistics_come_out(opened):
    opened.backend.record(MOST)
    memory, ids = opened.backend.memory, ids_of(opened, PROMPTS[:1])
    for _ in range(2):
        memory.reset()
        opened.statistics(opened.encode(ids), "channel", "uncond_delta")
        rows = opened.passes
        assert memory.uploads == [ids.nbytes, 8 * rows, 8 * rows]
        assert memory.downloads == [3 * 8 * rows]


def test_results_stay_when_the_next_call_overwrites_the_tensors(opened):
    opened.backend.record(MOST)
    memory, ids = opened.backend.memory, ids_of(opened)
    row = np.zeros(opened.draws, np.int64)
    states = [opened.backend.encode(ids[i : i + 1]) for i in range(3)]
    predictions = [opened.backend.predict(each, row, row) for each in states]
    kept = [memory.download(each) for each in (*states, *predictions)]
    for index in range(3):
        np.testing.assert_allclose(
            kept[index], memory.download(opened.backend.encode(ids[[index, index]]))[:1], atol=1e-5
        )
    assert len({each.tobytes() for each in kept}) == 6
    for first, again in zip(kept, (*states, *predictions), strict=True):
        np.testing.assert_array_equal(first, memory.download(again))


def test_what_is_not_recorded_runs_plainly(opened, made):
    opened.backend.record(MOST)
    before = done(made)
    statistics(opened, PROMPTS)  # more rows
    row = np.zeros(opened.draws, np.int64)
    states = opened.encode(ids_of(opened))  # more prompts
    opened.backend.predict(states.tensor, row, row)  # more prompts than rows
    assert done(made) == before


def test_threads_do_not_mix(opened, made):
    """All graphs run in one thread, for ONNX Runtime keeps those of each thread apart."""
    opened.backend.record(MOST)
    expected = [statistics(opened, [prompt]) for prompt in PROMPTS]
    found = {}

    def work(number):
        found[number] = [statistics(opened, [PROMPTS[(number + i) % len(PROMPTS)]]) for i in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for number, results in found.items():
        for i, result in enumerate(results):
            np.testing.assert_array_equal(result, expected[(number + i) % len(PROMPTS)])
    assert len({thread for session in made for _, thread in session.log}) == 1
    assert all(log.count("record") == 1 for log in done(made))


@pytest.mark.parametrize("how", ["load", "refusal", "stale"])
def test_what_cannot_be_recorded_runs_as_before_and_says_so(opened, monkeypatch, caplog, how):
    """No room for another session; a capture that fails; graphs that do not do what the calls did."""
    expected = statistics(opened, PROMPTS[:1])
    session = opened.backend._session

    def spoiled(path, *, arena=True, recorded=False):
        if recorded and how == "load":
            raise ProviderError("out of memory")
        found = session(path, arena=arena, recorded=recorded)
        if recorded:
            found.refusal = RuntimeError("CUDA failure 900") if how == "refusal" else None
            found.stale = how == "stale"
        return found

    monkeypatch.setattr(opened.backend, "_session", spoiled)
    with caplog.at_level(logging.WARNING, "memedge"):
        opened.backend.record(MOST)
    (line,) = caplog.messages
    assert "stay slower" in line
    assert {"load": "out of memory", "refusal": "CUDA failure 900", "stale": "other values"}[how] in line
    assert opened.backend.padded(1, MOST) == MOST
    np.testing.assert_array_equal(statistics(opened, PROMPTS[:1]), expected)
    opened.backend.record(MOST)  # is not tried again
    assert len(caplog.messages) == 1


def test_the_option_is_given_to_sessions_that_record_alone(opened, engine, monkeypatch):
    given = []

    def session(_path, _options, *, providers, **_):
        given.append(providers[0])
        raise RuntimeError("no GPU")

    monkeypatch.undo()
    backend = opened.backend
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(backend, "provider", "cuda")
    monkeypatch.setattr(backend, "_execution_provider", "CUDAExecutionProvider")
    for recorded in (False, True):
        with pytest.raises(ProviderError, match="no GPU"):
            backend._session(engine / "unet.onnx", recorded=recorded)
    assert [name for name, _ in given] == ["CUDAExecutionProvider"] * 2
    assert [settings["enable_cuda_graph"] for _, settings in given] == ["0", "1"]
    assert all({"user_compute_stream", "device_id"} <= set(settings) for _, settings in given)


def test_warming_up_records(opened, made):
    Detector(opened).warmup()
    assert len(made) == 3
    with Gate(Detector(opened)) as gate:
        gate.warmup()
        assert gate.detect(PROMPTS[0]).prompt == PROMPTS[0]
    assert len(made) == 3


def test_on_the_processor_nothing_is_recorded(engine):
    detector = Detector.load(engine, "cpu")
    detector.warmup()
    assert not detector.engine.backend._recordings.rows
    assert detector.engine.backend.padded(1, MOST) == 1


def test_sessions_and_their_thread_end_with_the_backend(opened, made):
    opened.backend.record(MOST)
    statistics(opened, PROMPTS[:1])
    thread = next(thread for thread in threading.enumerate() if thread.name == "memedge-graphs")
    recordings = opened.backend._recordings
    left = [weakref.ref(each) for each in (*recordings._unet.values(), *made)]
    made.clear()
    gc.collect()
    gc.disable()  # it knows nothing of a GPU's memory running out
    try:
        opened.backend._recordings = None
        del recordings
        thread.join(10)
        assert not thread.is_alive()
        assert not any(each() for each in left)
    finally:
        gc.enable()


def test_what_fails_in_the_thread_is_raised_where_it_was_asked_for():
    call = OneThread()
    with pytest.raises(ZeroDivisionError):
        call(lambda: 1 // 0)
    assert call(threading.get_ident) == call(threading.get_ident) != threading.get_ident()


@pytest.mark.gpu
def test_recorded_calls_on_a_gpu(engine):
    if missing := probe.missing_for("cuda"):
        pytest.skip(missing)
    plain, own = Detector.load(engine, "cuda"), Detector.load(engine, "cuda")
    allowed = ENGINE[own.info.precision]
    own.warmup()
    assert own.engine.backend._recordings.rows == sizes(own.engine.draws, own.engine.rows_per_call)
    for prompt in (*PROMPTS, *PROMPTS):
        found, expected = own.score([prompt]), plain.score([prompt])
        np.testing.assert_allclose(found.norm, expected.norm, rtol=allowed.norm)
        np.testing.assert_allclose(found.alignment, expected.alignment, atol=allowed.alignment)
    first = own.score(PROMPTS[:1])
    results = []
    threads = [threading.Thread(target=lambda: results.append(own.score(PROMPTS[:1]).norm)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for norm in results:
        np.testing.assert_array_equal(norm, first.norm)
    np.testing.assert_allclose(own.score(PROMPTS).norm, plain.score(PROMPTS).norm, rtol=allowed.norm)
