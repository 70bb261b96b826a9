"""The screen on the embedded engine: who is passed, what the others' verdicts are, and what is refused."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from engines import edit_manifest

from memedge import Detector, InputError
from memedge.decision.screen import LEAST, decide_screened, screen
from memedge.embedded import EMBEDDED_ENGINE, captions

HELD_OUT = [caption for caption in captions() if caption.split == "held-out"]
PROMPTS = [caption.prompt for caption in HELD_OUT if caption.memorized][:20]
PROMPTS += [*(caption.prompt for caption in HELD_OUT[::45] if caption.clean), ""]


@pytest.fixture
def changed(tmp_path):
    """A function that changes the calibration of a copy of the embedded engine, and opens it."""

    def make(change) -> Detector:
        folder = shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine")
        edit_manifest(folder, lambda m: change(m["calibrations"]["cpu-fp32"]))
        return Detector.load(folder, "cpu")

    return make


def readouts(detector, prompts):
    """The read-outs by the definition, each prompt alone."""
    engine, found = detector.engine, detector.info.calibration.screen
    values = [engine.changes(engine.encode(engine.tokenize([prompt])[0]), found.tap)[0] for prompt in prompts]
    return np.array([sum(w * np.log(x + LEAST) for w, x in zip(found.weights, v, strict=True)) for v in values]) + (
        found.intercept
    )


def test_who_is_below_the_cut_is_passed(detector):
    found = detector.info.calibration.screen
    share = detector.info.manifest.taps[found.tap - 1].flops / detector.info.manifest.flops.remaining
    verdicts, values = detector.detect(PROMPTS, "screen"), readouts(detector, PROMPTS)
    others = detector.detect(PROMPTS, "conformal")
    passed = 0
    for prompt, verdict, value, other in zip(PROMPTS, verdicts, values, others, strict=True):
        assert verdict.truncated == other.truncated
        if prompt and value < found.cut:
            passed += 1
            assert (verdict.memorized, verdict.score, verdict.norm, verdict.alignment) == (False, None, None, None)
            assert verdict.passes == pytest.approx(share)
            assert f"{value:.4g} < cut {found.cut:.4g}" in verdict.reason
            assert f"α = {found.alpha:.2g}" in verdict.reason
        else:
            assert verdict.passes == pytest.approx(other.passes + share)
            assert (verdict.memorized, verdict.reason) == (other.memorized, other.reason)
            assert verdict.norm == pytest.approx(other.norm, rel=1e-5)
    assert 30 < passed < 75  # most of the clean ones, and hardly any memorized one


def test_no_found_memorized_caption_is_missed_here(detector):
    memorized = [caption.prompt for caption in HELD_OUT if caption.memorized][:200]
    scores, verdicts = detector.score(memorized), detector.detect(memorized, "screen")
    found = scores.memorized
    assert found.sum() > 50
    missed = sum(not verdict.memorized for verdict, one in zip(verdicts, found, strict=True) if one)
    assert missed <= 2  # of some 75, where a share of .008 is promised


def test_near_the_cut_the_batch_does_not_matter(detector, changed):
    prompt = PROMPTS[30]
    value = readouts(detector, [prompt])[0]
    near = changed(lambda c: c["screen"].update(cut=float(value) + 1e-9))
    alone, others = near.detect([prompt], "screen")[0], near.detect([prompt, *PROMPTS[:5]], "screen")[0]
    assert alone == others
    screened = near.info.manifest.tap_share(near.info.calibration.screen.tap)
    assert alone.passes in (pytest.approx(2 * screened), pytest.approx(2 * screened + 1, abs=1.01))


def test_nobody_and_everybody_is_passed(changed):
    detector = changed(lambda c: c["screen"].update(cut=1e9))
    verdicts = detector.detect(["a star", "", "two cats"], "screen")
    assert [verdict.norm for verdict in verdicts] == [None, 0.0, None]  # the empty prompt is never screened
    engine, rule = detector.engine, detector.info.rule
    states = engine.encode(engine.tokenize(["a star"])[0])
    outcome = decide_screened(engine, rule, states, lambda _: states)
    assert (outcome.lowest[0], outcome.highest[0]) == (-np.inf, np.inf)
    assert not outcome.proven[0]


def test_what_is_not_finite_goes_on(detector, monkeypatch):
    engine = detector.engine
    states = engine.encode(engine.tokenize(["a star", "two cats"])[0])
    changes = engine.changes(states, 1)
    changes[0] = np.nan
    monkeypatch.setattr(engine, "changes", lambda *_: changes)
    found = screen(engine, detector.info.rule, states, lambda _: states)
    assert not found.passed[0]


def test_refusals(detector, changed):
    with pytest.raises(InputError, match="holds for the calibrated threshold: leave threshold and target_fpr out"):
        detector.detect(["a star"], "screen", threshold=-10.0)
    with pytest.raises(InputError, match="holds for the calibrated threshold"):
        detector.at(target_fpr=0.02).detect(["a star"], "screen")
    none = changed(lambda c: c.update(screen=None, no_screen="The full rule finds 3 of the memorized prompts."))
    with pytest.raises(InputError, match=r"no screen for cpu-fp32 \(The full rule finds 3 .* prompts\): run"):
        none.detect(["a star"], "screen")


def test_without_a_conformal_interval_others_are_proven(changed):
    detector = changed(lambda c: c.update(conformal=None))
    verdicts, proven = detector.detect(PROMPTS[:6], "screen"), detector.detect(PROMPTS[:6])
    for verdict, other in zip(verdicts, proven, strict=True):
        assert verdict.norm is None or verdict.memorized == other.memorized


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(tap=9),
        lambda s: s.update(tap=0),
        lambda s: s.update(weights=s["weights"][1:]),
        lambda s: s.update(alpha=0.0),
        lambda s: s.update(memorized=0),
        lambda s: s["decided"].update(value=1.5),
    ],
)
def test_a_screen_that_fits_no_tap_is_refused(changed, change):
    from memedge import ManifestError

    with pytest.raises(ManifestError, match="calibrate the engine again"):
        changed(lambda c: change(c["screen"]))


MEMORY = """
import sys
from memedge import Detector
detector = Detector.load(provider=sys.argv[1], precision="fp32", threads=1)
detector.score(["a star"])
detector.detect(["a star"], sys.argv[2])
print(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_memory(provider):
    """Resident memory with the screen is at most 1.15 × that without."""
    without, with_screen = (
        int(subprocess.run([sys.executable, "-c", MEMORY, provider, early], check=True, capture_output=True).stdout)
        for early in ("conformal", "screen")
    )
    assert with_screen <= 1.15 * without
