"""`memedge info`: the manifest as JSON; in the table what of it a person reads, and the rule."""

import json

from command_line import memedge
from engines import edit_manifest

PRESET = {"family": "a family", "gamma_norm": 1.0, "gamma_alignment": 2.0}


def read(text: str) -> str:
    """Return a table's text as if it had not been folded."""
    return " ".join(text.split())


def test_json(engine):
    manifest = json.loads((engine / "manifest.json").read_text())
    for arguments in ((engine,), ("--engine", engine)):
        assert json.loads(memedge("info", *arguments, "--json").stdout)["manifest"] == manifest


def test_uncalibrated(copy):
    done = memedge("info", copy)
    assert json.loads((copy / "manifest.json").read_text())["source"]["id"] in done.stdout
    assert "none for cpu-fp32: norm and alignment only, no verdicts; run `memedge calibrate`" in read(done.stdout)
    edit_manifest(copy, lambda manifest: manifest.update(preset=PRESET))
    words = "score = 1 · norm + 2 · alignment, of a family: published, not fitted here"
    assert words in read(memedge("info", copy).stdout)


def test_calibrated(detector):
    rule = detector.info.rule
    cosine = f"({rule.alignment}, {rule.operands})"
    words = f"memorized if {rule.formula} ≥ {rule.threshold:.4g} {cosine}, for a false-positive rate of"
    assert words in read(memedge("info", "--provider", "cpu").stdout)
