"""Fit the embedded engine's γ and threshold on the calibration split, and write them into its manifest.

    python bench/tiny/calibrate.py ENGINE_DIR CAPTIONS.csv

Logistic regression on (norm, alignment) gives the direction, scaled so that γ_norm = 1; the threshold lets at most 1 %
of the clean calibration captions through. Labels are those of behaviour (label.py); held-out captions are not read.
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
from memedge.engine.manifest import Calibration, read_manifest, write_manifest

FALSE_POSITIVES = 0.01


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("captions", type=Path)
    arguments = parser.parse_args()
    with arguments.captions.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "calibration"]
    memorized = np.array([row["memorized"] == "true" for row in rows])
    detector = Detector.load(arguments.engine)
    scores = detector.score([row["caption"] for row in rows], alignment="channel", operands="uncond_delta")
    features = np.stack([scores.norm, scores.alignment], axis=1)
    gamma = fit_direction(features, memorized)
    calibration = Calibration(
        gamma_norm=float(gamma[0]),
        gamma_alignment=float(gamma[1]),
        threshold=fit_threshold(features @ gamma, memorized),
        alignment="channel",
        operands="uncond_delta",
        data=f"{arguments.captions.name}, calibration split",
        fitted_by="bench/tiny/calibrate.py",
        memorized_prompts=int(memorized.sum()),
        clean_prompts=int((~memorized).sum()),
    )
    manifest = read_manifest(arguments.engine)
    manifest = msgspec.structs.replace(manifest, calibrations={detector.info.key: calibration})
    write_manifest(arguments.engine, manifest)
    print(calibration)


if __name__ == "__main__":
    main()
