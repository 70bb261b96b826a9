"""Fit γ and a threshold to the embedded engine on the calibration split, for every backend, into its manifest.

    python bench/tiny/calibrate.py ENGINE_DIR CAPTIONS.csv

Logistic regression on (norm, alignment) gives the direction, scaled so that γ_norm = 1; the threshold lets at most 1 %
of the clean calibration captions through. The conformal interval comes from all of them. Needs OpenVINO and a CPU that
computes in bf16. Labels are those of behaviour (label.py); held-out captions are not read.
"""

import argparse
import csv
from pathlib import Path

import msgspec
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from memedge import Detector
from memedge.conformal import conformal_interval
from memedge.engine.manifest import Calibration, read_manifest, write_manifest

FALSE_POSITIVES = 0.01
OPEN_VERDICTS = 0.01  # the share ε of verdicts that `early="conformal"` may change
BACKENDS = (("cpu", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))


def fit_direction(features: np.ndarray, memorized: np.ndarray) -> np.ndarray:
    """Return (γ_norm, γ_alignment) of features [B, 2], with γ_norm = 1."""
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced")).fit(features, memorized)
    gamma = model[-1].coef_[0] / model[0].scale_
    assert gamma[0] > 0, "a larger norm should mean memorized: look at the labels"
    return gamma / gamma[0]


def fit_threshold(score: np.ndarray, memorized: np.ndarray) -> float:
    """Return the middle of the gap above the highest clean score that may not pass."""
    clean = np.sort(score[~memorized])[::-1]
    highest = clean[int(FALSE_POSITIVES * len(clean))]
    return float((highest + score[score > highest].min()) / 2)


def fit(detector: Detector, captions: list[str], memorized: np.ndarray, data: str) -> Calibration:
    """Return the calibration for what the detector runs."""
    scores = detector.score(captions, alignment="channel", operands="uncond_delta")
    features = np.stack([scores.norm, scores.alignment], axis=1)
    gamma = fit_direction(features, memorized)
    return Calibration(
        gamma_norm=float(gamma[0]),
        gamma_alignment=float(gamma[1]),
        threshold=fit_threshold(features @ gamma, memorized),
        alignment="channel",
        operands="uncond_delta",
        data=data,
        fitted_by="bench/tiny/calibrate.py",
        memorized_prompts=int(memorized.sum()),
        clean_prompts=int((~memorized).sum()),
        conformal=conformal_interval(scores.alignment, float(gamma[1]), OPEN_VERDICTS),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("captions", type=Path)
    arguments = parser.parse_args()
    with arguments.captions.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "calibration"]
    memorized = np.array([row["memorized"] == "true" for row in rows])
    captions = [row["caption"] for row in rows]
    manifest = read_manifest(arguments.engine)
    calibrations = {}
    for provider, precision in BACKENDS:
        detector = Detector.load(arguments.engine, provider=provider, precision=precision)
        found = fit(detector, captions, memorized, f"{arguments.captions.name}, calibration split")
        calibrations[detector.info.key] = found
        print(detector.info.key, found)
    write_manifest(arguments.engine, msgspec.structs.replace(manifest, calibrations=calibrations))


if __name__ == "__main__":
    main()
