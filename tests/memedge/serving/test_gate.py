"""The gate: verdicts are the detector's, callers share calls of the UNet, and nobody is left waiting."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from engines import spoil_second_prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge import Detector, InputError, NotFiniteError
from memedge.decision.rule import Rule
from memedge.embedded import captions
from memedge.engine.precision import BATCH_NOISE
from memedge.export.export import export
from memedge.serving.errors import ClosedError, DeadlineError, OverloadedError
from memedge.serving.gate import Gate, Round
from memedge.serving.pace import Pace

PROMPTS = [caption.prompt for caption in captions()][::9][:40]
MODES = ("proven", "conformal", "screen", "off")


@pytest.fixture(scope="module")
def gate(detector):
    with Gate(detector) as gate:
        yield gate


@pytest.fixture
def held(detector, monkeypatch):
    """A gate whose engine computes nothing until it is let go: what is asked meanwhile waits."""
    go, calls, measure = threading.Event(), [], detector.engine.measure

    def slow(states, prompt, row, operands):
        assert go.wait(20)
        calls.append(len(row))
        return measure(states, prompt, row, operands)

    monkeypatch.setattr(detector.engine, "measure", slow)
    rounds: list[Round] = []
    gate = Gate(detector, most_prompts=8, most_bytes=1000, observe=rounds.append)
    yield gate, go, calls, rounds
    go.set()
    gate.close()


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def same(found, expected, precision="fp32"):
    noise = BATCH_NOISE[precision]
    for one, other in zip(found, expected, strict=True):
        assert (one.prompt, one.memorized, one.truncated, one.threshold) == (
            other.prompt,
            other.memorized,
            other.truncated,
            other.threshold,
        )
        assert (one.norm is None) == (other.norm is None)
        if one.norm is not None:
            np.testing.assert_allclose(one.norm, other.norm, rtol=noise.norm)
        if one.alignment is not None and other.alignment is not None:
            np.testing.assert_allclose(one.alignment, other.alignment, atol=noise.alignment)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([*PROMPTS, "", "a " * 60, "猫"]), st.sampled_from(MODES)), min_size=1, max_size=40
    )
)
def test_verdicts_are_the_detectors(detector, gate, asked):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: gate.detect(*one), asked))
    expected = [detector.detect([prompt], early)[0] for prompt, early in asked]
    same(found, expected)
    assert [one.passes for one in found] == [one.passes for one in expected]


def test_a_round_that_the_screen_ends_is_counted(detector):
    """All are passed: no row of the UNet, but verdicts, and an observer that hears of them."""
    rounds: list[Round] = []
    found = detector.info.calibration.screen
    rule = replace(detector.info.rule, screen=msgspec.structs.replace(found, cut=1e9))
    with Gate(Detector(detector.engine, rule), observe=rounds.append) as gate:
        verdicts = gate.detect_all(PROMPTS, "screen")
    assert all(one.norm is None and one.memorized is False for one in verdicts)
    assert sum(len(one.waited) for one in rounds) == len(PROMPTS)
    assert {one.rows for one in rounds} == {0}


def test_coroutines(detector, gate):
    async def all_at_once():
        return await asyncio.gather(*(gate.adetect(prompt) for prompt in PROMPTS))

    same(asyncio.run(all_at_once()), detector.detect(PROMPTS))


def test_an_engine_without_calibration_gives_no_verdict(engine):
    detector = Detector.load(engine, "cpu")
    with Gate(detector) as gate:
        (found,) = gate.detect_all(["a star"])
    assert found.memorized is None and found == detector.detect(["a star"])[0]


@pytest.mark.parametrize("early", ["proven", "off"])
def test_several_draws(checkpoint, tmp_path, early):
    """Open prompts take one draw after the other while new ones join them."""
    export(checkpoint, tmp_path / "engine", draws=3)
    detector = Detector.load(tmp_path / "engine", "cpu")
    norms = detector.score(PROMPTS).norm
    rule = Rule(1.0, 0.5 * float(np.median(norms)), source="calibrated", threshold=float(np.median(norms)))
    detector = Detector(detector.engine, rule)
    expected = detector.detect(PROMPTS, early)
    with Gate(detector) as gate, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda prompt: gate.detect(prompt, early), PROMPTS))
    same(found, expected)
    assert [one.passes for one in found] == [one.passes for one in expected]
    assert len({one.passes for one in found}) > (1 if early == "proven" else 0)


def test_callers_share_calls(held):
    gate, go, calls, rounds = held
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(gate.detect, PROMPTS[0], "off")
        wait_for(lambda: not gate._waiting and gate.queued == 1)  # it is in the engine
        rest = [pool.submit(gate.detect, prompt, "off") for prompt in PROMPTS[1:8]]
        wait_for(lambda: gate.queued == 8)
        go.set()
        assert [future.result().prompt for future in (first, *rest)] == PROMPTS[:8]
    assert calls == [2, 14]
    wait_for(lambda: len(rounds) == 2)  # it counts after it has answered
    assert [(one.rows, one.prompts, len(one.waited)) for one in rounds] == [(2, 1, 1), (14, 7, 7)]
    assert all(waited >= 0 for one in rounds for waited in one.waited)


def test_who_was_answered_may_join_the_next_call(held, monkeypatch):
    """And nobody waits for company that does not come, nor at an idle gate."""
    gate, go, calls, _ = held
    monkeypatch.setattr(gate._engine, "rows_per_call", 4)
    monkeypatch.setattr("memedge.serving.gate.MOMENT", 1e6)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: [gate.detect(prompt, "off") for prompt in PROMPTS[:2]])
        wait_for(lambda: not gate._waiting and gate.queued == 1)
        second = pool.submit(gate.detect, PROMPTS[2], "off")
        wait_for(lambda: gate.queued == 2)
        go.set()
        assert [one.prompt for one in (*first.result(), second.result())] == PROMPTS[:3]
    assert calls == [2, 4]
    monkeypatch.setattr("memedge.serving.gate.MOMENT", 0.05)
    assert gate.detect(PROMPTS[3], "off").prompt == PROMPTS[3]
    go.clear()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(gate.detect, PROMPTS[4], "off")]
        wait_for(lambda: not gate._waiting and gate.queued == 1)
        asked.append(pool.submit(gate.detect, PROMPTS[5], "off"))
        wait_for(lambda: gate.queued == 2)
        go.set()
        assert [one.result().prompt for one in asked] == PROMPTS[4:6]


def test_prompts_that_are_asked_for_twice_are_computed_once(held):
    gate, go, calls, _ = held
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(gate.detect, PROMPTS[0], "off") for _ in range(4)]
        wait_for(lambda: len(gate._in_flight) == 1 and len(next(iter(gate._in_flight.values())).waiters) == 4)
        go.set()
        assert len({future.result() for future in asked}) == 1
    assert calls == [2]


def test_a_cache_knows_prompts_by_their_tokens(detector, monkeypatch):
    with Gate(detector, cache=2) as gate:
        first = gate.detect("the left luggage sign")
        with monkeypatch.context() as patch:
            patch.setattr(detector.engine, "measure", None)
            again = gate.detect("the LEFT luggage sign")  # of the same tokens
        assert (again.prompt, again.passes, again.reason) == (
            "the LEFT luggage sign",
            0,
            f"{first.reason}; from the cache",
        )
        assert (again.score, again.norm, again.memorized) == (first.score, first.norm, first.memorized)
        assert gate.detect("the left luggage sign", "off").passes == 2  # other passes, another verdict
        assert gate.detect("zebra").passes and gate.detect("the left luggage sign").passes  # it had gone
        assert gate.queued == 0


def test_a_full_gate_refuses_at_once(held):
    gate, go, _, _ = held
    with ThreadPoolExecutor(9) as pool:
        asked = [pool.submit(gate.detect, prompt) for prompt in PROMPTS[:8]]
        wait_for(lambda: gate.queued == 8)
        with pytest.raises(
            OverloadedError, match=r"8 prompts wait, and the gate takes 8: try again in 1\.0 s"
        ) as caught:
            gate.detect(PROMPTS[8])
        assert caught.value.retry_after == 1
        go.set()
        for one in asked:
            one.result()
    assert gate.detect(PROMPTS[8]).prompt == PROMPTS[8]


def test_what_a_gate_never_takes(held):
    gate, go, _, _ = held
    go.set()
    with pytest.raises(InputError, match=r"9 prompts of .* are more than the gate ever takes, 8 and 1000: send fewer"):
        gate.detect_all(PROMPTS[:9])
    with pytest.raises(InputError, match="send fewer"):
        gate.detect("a" * 1001)
    assert len(gate.detect_all(PROMPTS[:8])) == 8
    assert gate.queued == 0 and gate._bytes == 0


def test_a_deadline_that_passes(held):
    gate, go, calls, _ = held
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gate.detect, PROMPTS[0], "off")
        wait_for(lambda: not gate._waiting and gate.queued == 1)
        with pytest.raises(DeadlineError, match="allow more time"):
            gate.detect(PROMPTS[1], timeout=0.05)
        with pytest.raises(DeadlineError):
            asyncio.run(gate.adetect(PROMPTS[2], timeout=0.05))
        with pytest.raises(DeadlineError, match="timeout 0 s"):
            gate.detect(PROMPTS[1], timeout=0)
        go.set()
        first.result()
    wait_for(lambda: gate.queued == 0)
    assert calls == [2]  # nobody waited for the others any more


def test_what_cannot_be_in_time_is_refused_at_once(held):
    gate, go, _, _ = held
    gate._pace.measured(1.0)  # prompts per second
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(gate.detect, prompt) for prompt in PROMPTS[:4]]
        wait_for(lambda: gate.queued == 4)
        with pytest.raises(
            OverloadedError, match=r"4 prompts wait, which takes 4\.0 s, and there are 3 s: allow"
        ) as caught:
            gate.detect(PROMPTS[4], timeout=3)
        assert caught.value.retry_after == pytest.approx(1)
        assert gate.queued == 4
        in_time = pool.submit(gate.detect, PROMPTS[4], timeout=20)
        go.set()
        assert [one.result().prompt for one in (*asked, in_time)] == PROMPTS[:5]
    gate._pace.measured(0.01)
    assert gate.detect(PROMPTS[5], timeout=20).prompt == PROMPTS[5]  # behind nobody it is tried


def test_nothing_is_begun_that_would_be_late(held, monkeypatch):
    gate, go, calls, _ = held
    monkeypatch.setattr(gate._pace, "had_its_turn", lambda _seconds: None)
    gate._pace.turn = 30.0
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gate.detect, PROMPTS[0], "off")
        wait_for(lambda: not gate._waiting and gate.queued == 1)
        second = pool.submit(gate.detect, PROMPTS[1], timeout=20)
        wait_for(lambda: gate.queued == 2)
        go.set()
        first.result()
        with pytest.raises(DeadlineError):
            second.result()
    assert calls == [2]


def test_pace_is_that_of_late():
    """Against the definition: a running mean, and twice the mean deviation above it."""
    pace = Pace()
    assert pace.wait(100) == 0  # not known yet
    for seconds in [0.1] * 100:
        pace.had_its_turn(seconds)
        pace.took(8, seconds)
    assert pace.turn == pytest.approx(0.1, rel=1e-3)
    assert pace.wait(40) == pytest.approx(40 / 80 + 0.1, rel=1e-3)
    for seconds in [0.2, 0.4] * 100:
        pace.had_its_turn(seconds)
        pace.took(8, 0.4)
    assert 0.45 < pace.turn < 0.55
    assert pace.speed == pytest.approx(20, rel=1e-3)


def test_callers_that_go_away_are_skipped(held):
    gate, go, calls, _ = held

    async def impatient():
        tasks = [asyncio.create_task(gate.adetect(prompt, "off")) for prompt in PROMPTS[:3]]
        await asyncio.to_thread(wait_for, lambda: gate.queued == 3)
        tasks[1].cancel()
        tasks[2].cancel()
        go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = asyncio.run(impatient())
    assert first.prompt == PROMPTS[0] and all(isinstance(one, asyncio.CancelledError) for one in others)
    wait_for(lambda: gate.queued == 0)
    assert sum(calls) in (2, 4, 6) and gate._bytes == 0


def test_what_is_not_finite_is_one_prompts_error(detector, monkeypatch):
    spoil_second_prompt(detector.engine, monkeypatch)
    with Gate(detector) as gate:
        answers, _ = gate._admit(PROMPTS[:3], "off", None)
        assert [answer.exception(20) is None for answer in answers] == [True, False, True]
        with pytest.raises(NotFiniteError, match="run it in a higher precision"):
            answers[1].result()


@pytest.mark.parametrize("place", ["measure", "encode"])
def test_an_error_of_the_engine_reaches_everyone_and_the_gate_lives(detector, monkeypatch, place):
    def broken(*_):
        raise RuntimeError("no room")

    with Gate(detector) as gate:
        with monkeypatch.context() as patch:
            patch.setattr(detector.engine, place, broken)
            with pytest.raises(RuntimeError, match="no room"):
                gate.detect_all(PROMPTS[:3])
        assert gate.detect(PROMPTS[0]).prompt == PROMPTS[0]
        assert gate.queued == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_gate_that_breaks_leaves_nobody_waiting(detector):
    def broken(_):
        raise RuntimeError("no such metric")

    gate = Gate(detector, observe=broken)
    gate.detect(PROMPTS[0], "off")
    gate._thread.join(20)
    with pytest.raises(ClosedError, match="closed"):
        gate.detect(PROMPTS[0])


def test_close_finishes_what_is_there(held):
    gate, go, _, _ = held
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(gate.detect, prompt) for prompt in PROMPTS[:4]]
        wait_for(lambda: gate.queued == 4)
        threading.Timer(0.05, go.set).start()
        assert gate.close()
        assert [future.result().prompt for future in asked] == PROMPTS[:4]
    with pytest.raises(ClosedError, match="The gate is closed: ask another one"):
        gate.detect(PROMPTS[0])


def test_close_does_not_wait_for_ever(held):
    gate, go, _, _ = held
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(gate.detect, PROMPTS[0])
        wait_for(lambda: not gate._waiting and gate.queued == 1)
        second = pool.submit(gate.detect, PROMPTS[1])
        wait_for(lambda: gate.queued == 2)
        assert not gate.close(0.05)
        with pytest.raises(ClosedError, match="before this prompt's turn"):
            second.result(20)
        go.set()
        first.result(20)


def test_warm_up_bounds_the_queue_by_what_is_measured(detector):
    with Gate(detector) as gate:
        speed = gate.warmup(10)
        assert gate.most_prompts == round(10 * speed)
    with Gate(detector, most_prompts=5) as gate:
        gate.warmup()
        assert gate.most_prompts == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [({"most_prompts": 0}, "most_prompts is 0"), ({"most_bytes": True}, "most_bytes is True")],
)
def test_wrong_options(detector, options, words):
    with pytest.raises(InputError, match=words):
        Gate(detector, **options)
    with pytest.raises(InputError, match="Gate takes a Detector, not str"):
        Gate("engine")


@pytest.mark.parametrize(
    ("prompts", "early", "words"),
    [(["a"], "late", "no early='late'"), ([], "off", "no prompts to judge"), (["a", 7], "off", "Prompt 2 is int")],
)
def test_wrong_prompts(gate, prompts, early, words):
    with pytest.raises(InputError, match=words):
        gate.detect_all(prompts, early)
