"""Verdicts within a generation: memorized as soon as the running maximum passes the cut, clean after the last look."""

from dataclasses import dataclass

import numpy as np

from memedge.engine.arrays import Floats
from memedge.monitor.calibration import MonitorCalibration
from memedge.monitor.statistics import running_maximum, values
from memedge.wording import counted


@dataclass(frozen=True)
class MonitorVerdict:
    """What is known of one image.

    Attributes:
        memorized: None while it is open.
        value: the highest deviation from clean images so far, in standard deviations of the statistic's logarithm.
        threshold: the calibration's cut, from which value on an image is memorized.
        step: after how many steps it was known, or how many there were.
        steps: how many the generation has.
        reason: all this in a sentence.
    """

    memorized: bool | None
    value: float
    threshold: float
    step: int
    steps: int
    reason: str


def highest_so_far(calibration: MonitorCalibration, norms: Floats, changes: Floats, moves: Floats) -> Floats:
    """Return the highest deviation from clean images after each look there was, float64 [looks, B]."""
    looks = min(len(norms), calibration.looks)
    mean, deviation = (np.array(of[:looks]) for of in (calibration.mean, calibration.deviation))
    of = values(calibration.statistic, norms[:looks], changes[: looks - 1], moves[: looks - 1])
    return running_maximum(calibration.statistic, of, mean, deviation)


def verdicts(calibration: MonitorCalibration, norms: Floats, changes: Floats, moves: Floats) -> list[MonitorVerdict]:
    """Return a verdict per image, given what Monitor has: norms [K, B], changes and moves [K − 1, B]."""
    highest = highest_so_far(calibration, norms, changes, moves)
    looks, found = len(highest), []
    for column in highest.T:
        over = np.flatnonzero(column >= calibration.cut)
        memorized = True if len(over) else None if looks < calibration.looks else False
        step = int(over[0]) + 1 if len(over) else looks
        value = float(column[step - 1])
        relation = "≥" if memorized else "<"
        reason = (
            f"{calibration.statistic} {value:.3g} deviations from clean {relation} cut {calibration.cut:.3g} after "
            f"{step} of {counted(calibration.settings.steps, 'step')}"
        )
        found.append(MonitorVerdict(memorized, value, calibration.cut, step, calibration.settings.steps, reason))
    return found
