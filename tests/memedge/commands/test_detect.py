"""`memedge detect`: its verdicts are the detector's, in a table or as JSON."""

import json

import numpy as np
from command_line import memedge

KEYS = {"prompt", "memorized", "score", "norm", "alignment", "threshold", "truncated", "passes"}


def test_json(detector):
    done = memedge("detect", "a star", "", "cat " * 50, "--provider", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    verdicts = json.loads(done.stdout)
    assert all(v.keys() >= KEYS for v in verdicts)
    scores = detector.score(["a star", "", "cat " * 50])
    assert [v["memorized"] for v in verdicts] == scores.memorized.tolist()
    np.testing.assert_allclose([v["score"] for v in verdicts], scores.score, rtol=1e-4)
    assert [v["truncated"] for v in verdicts] == [False, False, True]


def test_table():
    done = memedge("detect", "a star [bold]", "", "cat " * 50, "--provider", "cpu", COLUMNS="100")
    assert done.returncode == 0
    assert all(words in done.stdout for words in ("a star [bold]", "(empty)", "(truncated)"))
    assert "threshold" in done.stderr


def test_without_calibration(engine):
    done = memedge("detect", "a star", "--engine", engine, "--json")
    verdict = json.loads(done.stdout)[0]
    assert (verdict["memorized"], verdict["score"], verdict["threshold"]) == (None, None, None)
    assert "No verdicts" in memedge("detect", "a star", "--engine", engine).stderr
