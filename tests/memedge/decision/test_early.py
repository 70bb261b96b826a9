"""Early verdicts on real engines: the same as those of score(), with the passes they say."""

import numpy as np
import pytest
from engines import PROVENANCE, edit_manifest

from memedge import Detector, InputError
from memedge.embedded import captions

GIVEN = {"gamma_norm": 1.0, "alignment": "channel", "operands": "uncond_delta", **PROVENANCE}
PROMPTS = ["a star", "zebra on skis", "house", "", "sun over a hill", "two cats", "a long road", "moon"]


@pytest.fixture
def calibrated(copy):
    """A function that calibrates the random engine and opens it."""

    def make(gamma: float, threshold: float, conformal: dict | None = None) -> Detector:
        entry = GIVEN | {"gamma_alignment": gamma, "threshold": threshold, "conformal": conformal}
        edit_manifest(copy, lambda m: m.update(calibrations={"cpu-fp32": entry}))
        return Detector.load(copy)

    return make


@pytest.mark.parametrize("gamma", [0.001, -0.001, 0.1, -2.0])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.9])
def test_proven_is_score(calibrated, gamma, quantile):
    plain = calibrated(gamma, 0.0).score(PROMPTS)
    threshold = float(np.quantile(plain.score, quantile))
    detector = calibrated(gamma, threshold)
    scores = detector.score(PROMPTS)
    for early in ("proven", "off"):
        verdicts = detector.detect(PROMPTS, early)
        assert [v.memorized for v in verdicts] == scores.memorized.tolist()
        for v, score, norm in zip(verdicts, scores.score, scores.norm, strict=True):
            assert v.norm == pytest.approx(norm, rel=1e-5)
            assert v.score is None or v.score == pytest.approx(score, abs=1e-5)
            assert (v.score is None) == (v.alignment is None)
            assert (v.passes == 1) == (v.score is None or v.norm == 0) or early == "off"
            assert v.reason
    if abs(gamma) == 0.001 and quantile == 0.5:
        passes = [v.passes for v in detector.detect(PROMPTS)]
        assert passes.count(1) > len(PROMPTS) / 2
        assert any("whatever the rest" in v.reason for v in detector.detect(PROMPTS))


def test_the_norm_alone_takes_no_second_pass(calibrated):
    plain = calibrated(0.0, 0.0)
    threshold = float(np.median(plain.score(PROMPTS).norm)) + 1e-3
    detector = calibrated(0.0, threshold)
    scores = detector.score(PROMPTS)
    np.testing.assert_array_equal(scores.score, scores.norm)
    for verdict, norm in zip(detector.detect(PROMPTS), scores.norm, strict=True):
        assert (verdict.passes, verdict.memorized) == (1, norm >= threshold)
        assert verdict.score == verdict.norm == pytest.approx(norm, rel=1e-5)
        assert verdict.alignment is None or norm == 0
        assert norm == 0 or verdict.reason.startswith(f"score {norm:.3g}"[:9])
    assert detector.info.rule.formula == "1 · norm"


def test_on_the_threshold(calibrated):
    """A score that equals the threshold to the last bit gets one verdict, in any batch, by any way."""
    score = calibrated(-2.0, 0.0).score(["two cats"]).score[0]
    detector = calibrated(-2.0, float(score))
    for prompts in (["two cats"], ["two cats", *PROMPTS], [*PROMPTS, "two cats"] * 5):
        row = prompts.index("two cats")
        assert detector.score(prompts).memorized[row]
        for early in ("proven", "off"):
            verdict = detector.detect(prompts, early)[row]
            assert verdict.memorized
            assert verdict.passes == 4  # batched, and once more alone


def test_conformal(calibrated):
    interval = {"lowest": -0.01, "highest": 1.0, "epsilon": 0.01, "prompts": 99}
    norms = calibrated(-2.0, 0.0).score(PROMPTS).norm
    detector = calibrated(-2.0, float(norms.max() + 0.021), interval)
    verdicts = detector.detect(PROMPTS, "conformal")
    assert {v.passes for v in verdicts} == {1}
    assert not any(v.memorized for v in verdicts)
    assert all("but for a share δ = 0.01" in v.reason for v in verdicts if v.norm)
    assert {v.passes for v in detector.detect([p for p in PROMPTS if p])} == {2}  # proven needs both


def test_no_interval(calibrated, engine):
    with pytest.raises(InputError, match="stores no conformal interval for cpu-fp32"):
        calibrated(1.0, 1.0).detect(["a"], "conformal")
    with pytest.raises(InputError, match="stores no conformal interval"):
        Detector.load(engine).detect(["a"], "conformal")
    with pytest.raises(InputError, match="no early='never'"):
        calibrated(1.0, 1.0).detect(["a"], "never")


@pytest.mark.slow
def test_held_out_captions(detector):
    """On the embedded engine at most a share δ changes its verdict; what it saves belongs to the model."""
    held_out = [caption for caption in captions() if caption.split == "held-out"][::2]
    prompts = [caption.prompt for caption in held_out]
    scores, verdicts = detector.score(prompts), detector.detect(prompts, "conformal")
    delta = detector.info.calibration.conformal.delta
    assert delta <= 0.01
    changed = np.array([v.memorized for v in verdicts]) != scores.memorized
    assert changed.sum() <= 1 + 3 * np.sqrt(delta * len(prompts))  # the expectation, and three deviations
