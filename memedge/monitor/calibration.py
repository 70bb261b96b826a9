"""A monitor's calibration: for which generations it is, the clean images' statistics, and the cut on their maximum."""

from os import PathLike
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from memedge.engine import atomic
from memedge.engine.errors import InputError, ManifestError, shown
from memedge.engine.manifest import Count, Estimate, Real, Text
from memedge.monitor.statistics import Statistic

SCHEMA: Literal[1] = 1
FILE_NAME = "monitor.json"  # beside an engine's manifest, where `guard(..., monitor=True)` looks for it
SIZE_LIMIT = 1 << 20
NEAR = 0.5  # timesteps: schedulers round them
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e15)]


class GenerationSettings(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a generation is made with: what a monitor's statistics depend on, beside model and prompt.

    Attributes:
        pipeline, scheduler: the classes of diffusers.
        steps: num_inference_steps.
        guidance_scale, guidance_rescale: the pipeline's.
    """

    pipeline: Text
    scheduler: Text
    steps: Count
    guidance_scale: Real
    guidance_rescale: Real = 0.0

    def __str__(self) -> str:
        rescale = f" rescaled by {self.guidance_rescale:g}" if self.guidance_rescale else ""
        return f"{self.pipeline}, {self.scheduler}, {self.steps} steps, guidance {self.guidance_scale:g}{rescale}"


class MonitorCalibration(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What verdicts within a generation are made by, and for which generations it holds.

    Attributes:
        settings: of the generations that it was fitted to.
        timesteps: of the UNet's calls.
        statistic: what is looked at (memedge/monitor/statistics.py).
        looks: after how many steps it is looked at for the last time.
        mean, deviation: of the statistic's logarithm over clean images after each of the looks; 0 and 1 where it is not
            known yet.
        cut: from which running maximum of |value − mean| / deviation an image is memorized.
        target_fpr: the share of clean images that reach the cut at any look, at most, if they are like these.
        clean, memorized: how many images of either kind it was fitted to, one per prompt.
        found: the share of memorized images that are found, each by what was fitted to other prompts.
        false_alarms: the share of clean images that are, likewise.
    """

    settings: GenerationSettings
    timesteps: tuple[Real, ...]
    statistic: Statistic
    looks: Annotated[int, msgspec.Meta(ge=1, le=10000)]
    mean: tuple[Real, ...]
    deviation: tuple[Positive, ...]
    cut: Real
    target_fpr: Real
    clean: Count
    memorized: Count
    found: Estimate
    false_alarms: Estimate
    schema: Literal[1] = SCHEMA

    def check(self, settings: GenerationSettings) -> None:
        """Raise InputError for a generation that it was not made for."""
        if settings != self.settings:
            raise InputError(
                f"The monitor is calibrated for {self.settings}, and not for {settings}: ask for the former, or "
                "calibrate for these with Monitor.calibrate."
            )

    def check_step(self, place: int, timestep: float | None) -> None:
        """Raise InputError if the step at a place, from 0, is at another timestep than in the calibration."""
        if place >= self.looks or timestep is None:
            return
        if abs(float(timestep) - self.timesteps[place]) > NEAR:
            raise InputError(
                f"Step {place + 1} is at timestep {float(timestep):g}, and at {self.timesteps[place]:g} in the "
                "monitor's calibration: generate as it says, from noise alone, or calibrate with Monitor.calibrate."
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to a file, whole or not at all.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            atomic.write(Path(path), msgspec.json.format(msgspec.json.encode(self)) + b"\n")
        except OSError as error:
            raise InputError(f"{shown(str(path))} cannot be written ({error.strerror}): give another path.") from error

    @staticmethod
    def load(path: str | PathLike[str]) -> "MonitorCalibration":
        """Read a file that `save` has written.

        Raises:
            InputError: there is no such file.
            ManifestError: it is not such a file.
        """
        name = shown(str(path))
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(
                f"{name} cannot be read ({error.strerror}): make a calibration with Monitor.calibrate, and save it "
                "there."
            ) from error
        try:
            found = msgspec.json.decode(content[: SIZE_LIMIT + 1], type=MonitorCalibration)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ManifestError(f"{name} is no monitor's calibration ({shown(str(error))}): calibrate anew.") from error
        if not found.looks <= min(len(found.timesteps), len(found.mean), len(found.deviation)):
            raise ManifestError(f"{name} has fewer timesteps or means than its {found.looks} looks: calibrate anew.")
        return found
