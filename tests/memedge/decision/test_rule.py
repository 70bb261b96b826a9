"""The decision rule: bounds never contradict whole scores, and the conformal share is kept."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge.calibration.conformal import conformal_interval
from memedge.decision.early import decide_early
from memedge.decision.rule import Rule
from memedge.engine.errors import InputError
from memedge.engine.manifest import Conformal
from memedge.engine.precision import BATCH_NOISE, Tolerance

EXACT = Tolerance(0, 0)
finite = st.floats(-20, 20, allow_nan=False)
cosine = st.floats(-1, 1)


def calibrated(gamma_norm: float, gamma_alignment: float, threshold: float, conformal=None) -> Rule:
    return Rule(gamma_norm, gamma_alignment, source="calibrated", threshold=threshold, conformal=conformal)


class FakeEngine:
    """An engine whose statistics are given: norm [B], alignment per draw [B, n]. States are row numbers."""

    def __init__(self, norm, alignment, precision="fp32", jitter=0.0):
        self.norms, self.draw = np.asarray(norm, float), np.asarray(alignment, float)
        self.draws = self.draw.shape[1]
        self.backend = SimpleNamespace(precision=precision)
        self.calls = np.zeros(len(self.norms), dtype=int)
        self.jitter = jitter  # what another batch shape may change

    def norm(self, states):
        self.calls[states] += self.draws
        return self.norms[states] * (1 + self.jitter)

    def alignments(self, states, prompts, draw, *_options):
        self.calls[states[prompts]] += 1
        return self.draw[states[prompts], draw] + self.jitter


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_proven_verdicts_are_those_of_whole_scores(data):
    """Any γ of either sign, any threshold, any statistics, any number of draws, any rounding within the margin."""
    draws, count = data.draw(st.integers(1, 4)), 5
    rule = calibrated(data.draw(finite), data.draw(finite), data.draw(finite))
    norm = data.draw(st.lists(st.floats(0, 10), min_size=count, max_size=count))
    alignment = [data.draw(st.lists(cosine, min_size=draws, max_size=draws)) for _ in range(count)]
    noise = BATCH_NOISE["fp32"]
    engine = FakeEngine(norm, alignment, jitter=data.draw(st.sampled_from([-1, 0, 1])) * noise.alignment / 2)
    outcome = decide_early(engine, rule, np.arange(count))
    whole = rule.gamma_norm * engine.norms + rule.gamma_alignment * engine.draw.mean(axis=1)
    np.testing.assert_array_equal(outcome.passes, engine.calls)
    for row in range(count):
        if norm[row] == 0:
            assert outcome.passes[row] == draws
        elif np.isnan(outcome.alignment[row]):
            assert outcome.passes[row] < 2 * draws
            assert (outcome.lowest[row] >= rule.threshold) == (whole[row] >= rule.threshold)
        else:  # known whole: whoever asks settles scores that are too near the threshold
            assert outcome.passes[row] == 2 * draws
            assert outcome.lowest[row] == outcome.highest[row]


def test_what_can_be_left_out_is():
    rule = calibrated(1.0, 2.0, 3.0)
    norms = [0.5, 0.99, 1.5, 4.9, 5.1, 0.0]  # score within ± 2 of the norm
    engine = FakeEngine(norms, np.full((6, 1), 0.3))
    outcome = decide_early(engine, rule, np.arange(6))
    assert outcome.passes.tolist() == [1, 1, 2, 2, 1, 1]
    np.testing.assert_allclose(outcome.highest[:2], [2.5, 2.99])
    np.testing.assert_allclose(outcome.lowest[4], 3.1)


def test_draw_by_draw():
    """Of four draws, as many as it takes until the rest cannot matter."""
    rule = calibrated(1.0, 2.0, 3.0)
    engine = FakeEngine([2.0], [[-1.0, -0.5, 0.9, 0.9]])
    # After one draw the mean is at most (-1 + 3) / 4, so the score 3.0, which is not below the threshold; after two,
    # at most (-1.5 + 2) / 4, so 2.25.
    outcome = decide_early(engine, rule, np.arange(1))
    assert outcome.passes.tolist() == engine.calls.tolist() == [4 + 2]
    np.testing.assert_allclose(outcome.highest, [2.25])


@given(finite, finite, finite, st.floats(0, 10), cosine, cosine)
def test_decide_is_sound_and_monotone(gamma_norm, gamma_alignment, threshold, norm, one, two):
    rule = calibrated(gamma_norm, gamma_alignment, threshold)
    lowest, highest = np.array([min(one, two)]), np.array([max(one, two)])
    norms = np.array([norm])
    memorized, undecided = rule.decide(norms, lowest, highest, EXACT)
    assert not (memorized & undecided).any()
    for alignment in np.linspace(lowest[0], highest[0], 7):
        score = gamma_norm * norm + gamma_alignment * alignment
        if not undecided[0] and abs(score - threshold) > 1e-9:
            assert memorized[0] == (score >= threshold and norm > 0)
    # A margin only ever opens verdicts.
    assert (rule.decide(norms, lowest, highest, Tolerance(0.1, 0.1))[1] >= undecided).all()


def test_bounds_are_met_by_the_extremes():
    known = np.array([0.5])
    np.testing.assert_allclose(Rule().alignment_bounds(known, 1, 4), [[-2.5 / 4], [3.5 / 4]])
    np.testing.assert_allclose(Rule().alignment_bounds(known, 1, 1), [[0.5], [0.5]])
    narrow = Rule(conformal=Conformal(-0.2, 1.0, 0.01, 99))
    np.testing.assert_allclose(narrow.alignment_bounds(known, 1, 4), [[-0.2], [3.5 / 4]])
    # The known draws already lie outside the interval: only what is proven is left.
    np.testing.assert_allclose(narrow.alignment_bounds(np.array([-2.0]), 2, 3), [[-1.0], [-1 / 3]])
    np.testing.assert_allclose(narrow.alignment_bounds(np.array([-3.0]), 3, 3), [[-1.0], [-1.0]])


@pytest.mark.parametrize("gamma", [2.0, -6.1])
@pytest.mark.parametrize(("prompts", "delta"), [(99, 0.01), (175, 0.01), (60, 0.05), (400, 0.01)])
def test_conformal_share_is_kept(gamma, prompts, delta):
    """Over many calibrations a new alignment lies outside with the stored probability: at most δ, and nearly δ."""
    rng = np.random.default_rng(0)
    outside = []
    for _ in range(4000):
        values = np.clip(rng.standard_t(3, prompts + 1) * 0.1, -1, 1)
        interval = conformal_interval(values[:-1], gamma, delta)
        outside.append(not interval.lowest <= values[-1] <= interval.highest)
    assert interval.delta <= delta
    error = 4 * np.sqrt(interval.delta / len(outside))
    assert np.mean(outside) == pytest.approx(interval.delta, abs=error)
    assert (interval.lowest == -1) == (gamma > 0) and (interval.highest == 1) == (gamma < 0)


def test_conformal_verdicts_change_for_at_most_delta():
    """The guarantee itself: of new prompts, at most a share δ gets another verdict than from all passes."""
    rng = np.random.default_rng(1)
    changed = total = 0
    for _ in range(300):
        alignment = np.clip(rng.normal(0, 0.05, (100 + 99, 1)), -1, 1)
        norm = rng.gamma(4, 0.5, len(alignment))
        interval = conformal_interval(alignment[:99, 0], -6.0, 0.01)
        rule = calibrated(1.0, -6.0, 3.0, interval)
        engine = FakeEngine(norm[99:], alignment[99:])
        outcome = decide_early(engine, rule, np.arange(100))
        whole = norm[99:] - 6.0 * alignment[99:, 0] >= 3.0
        changed += (np.where(np.isnan(outcome.alignment), outcome.lowest >= 3.0, whole) != whole).sum()
        total += 100
        assert outcome.passes.mean() < 2
    assert changed / total <= 0.01


def test_too_few_prompts():
    with pytest.raises(InputError, match=r"98 prompts cannot bound the alignment at δ = 0\.01: give at least 99"):
        conformal_interval(np.zeros(98), 1.0, 0.01)


def test_the_empty_prompt_is_never_memorized():
    rule = calibrated(1.0, 0.0, -1.0)
    assert rule.memorized(np.array([0.0, 0.1]), np.array([0.0, 0.1])).tolist() == [False, True]
    memorized, undecided = rule.decide(np.array([0.0]), np.array([-1.0]), np.array([1.0]), EXACT)
    assert not memorized[0] and not undecided[0]


def test_without_a_threshold_there_is_no_verdict():
    rule, one = Rule(), np.array([1.0])
    assert not rule.fitted and rule.memorized(one, one) is None
    assert not any(np.concatenate(rule.decide(one, -one, one, EXACT)))


def test_another_cosine_is_not_fitted():
    rule = calibrated(1.0, 2.0, 3.0)
    assert rule.measuring(None, None) is rule.measuring("channel", "uncond_delta") is rule
    other = rule.measuring("flat", None)
    assert (other.alignment, other.operands, other.fitted, other.threshold) == ("flat", "uncond_delta", False, None)
    with pytest.raises(InputError, match="no alignment 'round'"):
        rule.measuring("round", None)


def test_formula():
    assert calibrated(2.0, -6.1234567, 3.0).formula == "2 · norm − 6.123 · alignment"
    assert Rule().formula == "1 · norm + 1 · alignment"
