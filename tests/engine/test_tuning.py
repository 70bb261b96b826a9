"""Batch sizes by measurement: with a clock and a memory that the test moves."""

from types import SimpleNamespace

import numpy as np
import pytest

from memedge import Detector, InputError
from memedge.engine import tuning
from memedge.engine.errors import EngineError


class FakeEngine:
    """Takes seconds(rows) per call, and bytes(rows) of memory."""

    passes = 2
    directory = SimpleNamespace(manifest=SimpleNamespace(precision="fp32"))

    def __init__(self, seconds, memory=lambda _rows: 0, most_rows=None):
        self.seconds, self.memory = seconds, memory
        self.now, self.peak = 0.0, 0
        self.backend, self.most_rows, self.uncond = self, most_rows, None

    def tokenize(self, prompts):
        return prompts, None

    def encode(self, ids):
        return SimpleNamespace(tensor=np.zeros((len(ids), 2, 2), dtype=np.float32))

    def statistics(self, states, prompt, row, _uncond, _operands):
        assert len(prompt) == len(row) and max(row) < self.passes and max(prompt) < len(states)
        self.now += self.seconds(len(row))
        self.peak = max(self.peak, self.memory(len(row)))


@pytest.mark.parametrize(
    ("seconds", "memory", "best"),
    [
        (lambda rows: rows, lambda _rows: 0, 1),  # nothing gained
        (lambda rows: 1 + rows, lambda _rows: 0, 16),  # 17/16, 33/32: the last gain is below 3 %
        (lambda rows: rows + max(0, rows - 4), lambda _rows: 0, 1),
        (lambda rows: 1 + rows + 10 * max(0, rows - 4), lambda _rows: 0, 4),  # slower again after 4
        (lambda _rows: 1, lambda _rows: 0, 64),  # a machine that computes all at once
        (lambda _rows: 1, lambda rows: rows * 10, 8),  # of 100 bytes, half may be taken
    ],
)
def test_smallest_that_is_nearly_the_best(monkeypatch, seconds, memory, best):
    engine = FakeEngine(seconds, memory)
    monkeypatch.setattr(tuning, "peak_memory", lambda: engine.peak)
    monkeypatch.setattr(tuning, "available_memory", lambda: 100)
    assert tuning.best_rows_per_call(engine, clock=lambda: engine.now) == best


def test_what_does_not_fit_is_too_large():
    def seconds(rows):
        if rows > fits:
            raise EngineError("out of memory")
        return 1

    engine = FakeEngine(seconds)
    fits = 8
    assert tuning.best_rows_per_call(engine, clock=lambda: engine.now) == 8
    fits = 0
    with pytest.raises(EngineError):
        tuning.best_rows_per_call(engine, clock=lambda: engine.now)


def test_a_backend_may_take_fewer():
    engine = FakeEngine(lambda _rows: 1, most_rows=6)
    assert tuning.best_rows_per_call(engine, clock=lambda: engine.now) == 4


def test_on_an_engine(engine):
    assert 1 <= Detector.load(engine, batch_size="auto")._engine.rows_per_call <= tuning.MOST
    detector = Detector.load(engine, batch_size=3)
    expected, found = Detector.load(engine).score(["a", "b c", "d", ""]), detector.score(["a", "b c", "d", ""])
    np.testing.assert_allclose(found.norm, expected.norm, rtol=1e-5)
    np.testing.assert_allclose(found.alignment, expected.alignment, atol=1e-5)


@pytest.mark.parametrize("size", [0, -1, 1.5, "many"])
def test_bad_sizes(engine, size):
    with pytest.raises(InputError, match="batch_size is"):
        Detector.load(engine, batch_size=size)
