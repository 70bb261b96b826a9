"""Calibrate the embedded engine on the calibration split, for every backend: `memedge calibrate`, three times.

    python bench/tiny/calibrate.py ENGINE_DIR CAPTIONS.csv

At most 1 % of the clean calibration captions reach the threshold. Needs OpenVINO and a CPU that computes in bf16.
Labels are those of behaviour (label.py); captions that replicate in part are left out, held-out ones are not read.
"""

import argparse
import csv
from pathlib import Path

from label import kind

from memedge.calibration.calibrate import calibrate
from memedge.commands.calibrate import print_calibrated
from memedge.commands.terminal import say
from memedge.prompts.labelled import Prompts

BACKENDS = (("cpu", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("captions", type=Path)
    arguments = parser.parse_args()
    with arguments.captions.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "calibration"]
    memorized, clean = (
        Prompts.given(
            (row["caption"] for row in rows if kind(int(row["replicas"]), int(row["generations"])) == name),
            f"{arguments.captions.name}, calibration split, {name}",
        )
        for name in ("memorized", "clean")
    )
    for provider, precision in BACKENDS:
        done = calibrate(arguments.engine, memorized, clean, provider=provider, precision=precision)
        for warning in done.warnings:
            say(f"Warning: {warning}")
        print_calibrated([done])


if __name__ == "__main__":
    main()
