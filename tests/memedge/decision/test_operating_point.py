"""Operating points: a given threshold, or a rate met by the calibration's clean scores; what has none is refused."""

import json
import math
import shutil

import msgspec
import numpy as np
import pytest
from command_line import fails, memedge
from engines import edit_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from memedge import Detector
from memedge.decision.operating_point import operating_at
from memedge.decision.rule import Rule
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.errors import InputError, ManifestError
from memedge.engine.manifest import MOST_CLEAN_SCORES, PromptList, read_manifest

OWN = read_manifest(EMBEDDED_ENGINE).calibrations["cpu-fp32"]
CPU = ("--provider", "cpu")


def with_scores(scores, target_fpr=0.05, threshold=None):
    """A calibration that was fitted to clean prompts of these scores."""
    ordered = sorted(map(float, scores), reverse=True)
    return msgspec.structs.replace(
        OWN,
        clean=PromptList("clean.txt", "0" * 64, len(ordered)),
        clean_scores=tuple(ordered[:MOST_CLEAN_SCORES]),
        target_fpr=target_fpr,
        threshold=ordered[0] + 1 if threshold is None else threshold,
    )


def at(calibration, threshold=None, target_fpr=None):
    return operating_at(Rule.calibrated(calibration), calibration, threshold, target_fpr, "an engine for cpu-fp32")


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=5, max_size=60), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_no_more_than_the_rate_reach_the_threshold(scores, rate, other):
    """For any scores, with ties or without; a larger rate never has a higher threshold."""
    calibration = with_scores(scores, target_fpr=1e-9)
    rates = sorted(r for r in (rate, other) if r >= 1 / (len(scores) + 1))
    thresholds = [at(calibration, target_fpr=r).threshold for r in rates]
    for r, threshold in zip(rates, thresholds, strict=True):
        assert (np.array(scores) >= threshold).sum() <= r * len(scores)
    assert thresholds == sorted(thresholds, reverse=True)


def test_the_calibrations_own_rate_has_its_own_threshold():
    calibration = with_scores(range(100), 0.05, threshold=94.25)
    assert at(calibration, target_fpr=0.05).threshold == at(calibration, target_fpr=0.059).threshold == 94.25
    assert at(calibration, target_fpr=0.1).threshold == 89.5
    rule = at(calibration, target_fpr=0.01)
    assert (rule.threshold, rule.operating_point) == (98.5, "target_fpr=0.01")
    assert (rule.gamma_alignment, rule.source) == (OWN.gamma_alignment, "calibrated")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"threshold": 1.0, "target_fpr": 0.1}, "Both threshold and target_fpr were given"),
        ({"threshold": math.nan}, "threshold is nan: give a finite number"),
        ({"threshold": "3"}, "threshold is '3'"),
        ({"threshold": True}, "threshold is True"),
        ({"target_fpr": 0.0}, "target_fpr is 0.0: give a rate between 0 and 1"),
        ({"target_fpr": 1}, "target_fpr is 1"),
        ({"target_fpr": math.nan}, "target_fpr is nan"),
        ({"target_fpr": 0.009}, "cannot be met by 100 clean prompts, .* from 0.009901 on .* with 112 of them"),
    ],
)
def test_what_cannot_be(arguments, words):
    with pytest.raises(InputError, match=words):
        at(with_scores(range(100)), **arguments)


def test_many_clean_prompts_keep_their_highest_scores():
    calibration = with_scores(range(5000), target_fpr=0.01, threshold=1e6)
    assert at(calibration, target_fpr=0.1).threshold == 4499.5
    with pytest.raises(InputError, match=r"above what the 1000 highest of 5000 clean scores tell.*at most 0\.1998"):
        at(calibration, target_fpr=0.3)


def test_without_what_it_takes(engine, tmp_path):
    old = shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine", ignore=shutil.ignore_patterns("baseline.*-*"))
    edit_manifest(old, lambda m: m["calibrations"]["cpu-fp32"].pop("clean_scores"))
    with pytest.raises(
        InputError, match="keeps no clean scores that target_fpr could be met on, as it was made before"
    ):
        Detector.load(old, provider="cpu", target_fpr=0.05)
    done = memedge("detect", "a star", *CPU, "--engine", old, "--target-fpr", 0.05)
    fails(done, "give a threshold, or run `memedge calibrate` again")
    with pytest.raises(InputError, match="so there is no score that a threshold is for: run `memedge calibrate`"):
        Detector.load(engine, "cpu", threshold=3)
    with pytest.raises(InputError, match="so there are no clean scores that target_fpr could be met on"):
        Detector.load(engine, "cpu", target_fpr=0.05)


def test_verdicts_say_it(detector):
    """By load, by detect and by `at` alike; and the engine's own stays what it is."""
    before = (EMBEDDED_ENGINE / "manifest.json").read_bytes()
    prompts = ["the left luggage sign", "a green star on a hill", ""]
    loaded = Detector.load(provider="cpu", threshold=-24)
    verdicts = loaded.detect(prompts)
    assert [v.memorized for v in verdicts] == [True, True, False]
    assert detector.detect(prompts, threshold=-24) == detector.at(-24).detect(prompts)
    assert [v.reason for v in detector.detect(prompts, threshold=-24)] == [v.reason for v in verdicts]
    assert {(v.threshold, v.operating_point) for v in verdicts} == {(-24, "threshold")}
    assert all("threshold -24, as given" in v.reason for v in verdicts[:1])
    assert loaded.score(prompts).memorized.tolist() == [True, True, False]
    assert detector.detect(prompts)[1].memorized is False
    assert detector.detect(prompts)[0].operating_point == "calibrated"
    assert loaded.info.fingerprint != detector.info.fingerprint
    assert detector.at() is detector
    assert (EMBEDDED_ENGINE / "manifest.json").read_bytes() == before


def test_published_weights_can_have_a_threshold(engine, tmp_path):
    copy = shutil.copytree(engine, tmp_path / "engine")
    preset = {"family": "a family", "gamma_norm": 1.0, "gamma_alignment": 0.0}
    edit_manifest(copy, lambda m: m.update(preset=preset))
    detector = Detector.load(copy, "cpu")
    assert detector.detect(["a star"])[0].memorized is None
    (verdict,) = detector.detect(["a star"], threshold=1e9)
    assert (verdict.memorized, verdict.operating_point) == (False, "threshold")


def test_commands(tmp_path):
    done = memedge("detect", "a green star on a hill", *CPU, "--threshold", -24, "--json")
    assert json.loads(done.stdout)[0]["operating_point"] == "threshold"
    done = memedge("detect", "a green star on a hill", *CPU, "--threshold", -24)
    assert "Memorized: a score of at least -24, the threshold that was given, on cpu-fp32." in done.stderr
    (tmp_path / "p.txt").write_text("a green star on a hill\n")
    done = memedge("score", "p.txt", "-o", "s.csv", *CPU, "--threshold", -24, cwd=tmp_path)
    assert "1 memorized (threshold -24, as given)" in done.stderr


@pytest.mark.parametrize("scores", [[1.0], [1.0, 2.0, *[0.0] * 3], [math.inf] * 5])
def test_clean_scores_that_nobody_writes(tmp_path, scores):
    copy = shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine", ignore=shutil.ignore_patterns("baseline.*-*"))
    clean = {"name": "c", "sha256": "0" * 64, "prompts": 5}
    change = {"clean": clean, "clean_scores": [1e999 if s == math.inf else s for s in scores]}
    edit_manifest(copy, lambda m: m["calibrations"]["cpu-fp32"].update(change))
    with pytest.raises(ManifestError, match=r"scores of clean prompts|not a memedge manifest"):
        read_manifest(copy)
