"""A pipeline's run that the monitor watches at each step: ended, withheld, flagged, steered, or made again."""

from typing import Any

import numpy as np

from memedge.detector import Detector
from memedge.engine.errors import InputError
from memedge.integrations.call import Call
from memedge.integrations.denoiser_calls import AllOver, DenoiserCall
from memedge.integrations.guarded import Done, GuardedOutput, GuardVerdict
from memedge.integrations.monitoring import MONITOR, feed, make_monitor
from memedge.integrations.steering import Steering
from memedge.monitor.calibration import FILE_NAME, MonitorCalibration
from memedge.monitor.monitor import Monitor
from memedge.monitor.verdicts import MonitorVerdict
from memedge.wording import counted

TRIES = 3  # from other noise, of images that are to be made again
ORDER: tuple[Done, ...] = ("blocked", "flagged", "steered", "reseeded", "passed")  # a prompt's verdict is the first's


def calibration_of(given: Any, detector: Detector) -> MonitorCalibration:
    """Return the calibration that `guard` was given, or that beside the engine if it was given True.

    Raises:
        InputError: it is neither, or there is none beside the engine.
        ManifestError: the file beside the engine is no calibration.
    """
    if isinstance(given, MonitorCalibration):
        return given
    if given is not True:
        raise InputError(f"monitor is {type(given).__name__}: give True or a MonitorCalibration.")
    return MonitorCalibration.load(detector.info.path / FILE_NAME)


class MonitoredRun:
    """One call's images under a monitor; what is decided of them is decided for each alone.

    Attributes:
        done: what was done to each image, [N].
        found: the monitor's verdict on each, [N]: of the last time that it was made.
        norms: ‖Δ‖₂ of the first step, float64 [N]; likewise.
        tries: how often each was made again, int [N].
    """

    def __init__(self, pipe: Any, call: Call, calibration: MonitorCalibration, over: Done):
        """Take a call, and what is to be done to images that are memorized."""
        self._pipe, self._call, self._calibration, self._over = pipe, call, calibration, over
        count = len(call.prompts) * call.images
        self.done: list[Done] = ["passed"] * count
        self.found: list[MonitorVerdict] = []
        self.norms, self.tries = np.zeros(count), np.zeros(count, np.int64)
        self._said = [""] * count

    def generate(self) -> GuardedOutput:
        """Generate; images that are to be made again are made alone, until none is memorized or the tries are over."""
        self._call.use_embeddings()
        output = self._once(self._call, range(len(self.done)))
        made = {place: (output, place) for place in range(len(self.done))}
        for _ in range(TRIES if self._over == "reseeded" else 0):
            again = [place for place, done in enumerate(self.done) if done == "blocked"]
            if not again:
                break
            self.tries[again] += 1
            following = self._once(self._call.only(again), again)
            made |= {place: (following, position) for position, place in enumerate(again)}
        kept = [done != "blocked" for done in self.done]
        return GuardedOutput.assemble(self._joined(output, made), self._verdicts(), kept)

    def _once(self, call: Call, places: Any) -> Any:
        """Generate some of the images, and take what was found of them; returns the pipeline's output or None."""
        monitor = make_monitor(self._pipe, self._calibration)
        steering = Steering(self._pipe, len(places), lambda: monitor.memorized)
        ends = self._over in ("blocked", "reseeded")

        def watch(denoiser_call: DenoiserCall) -> None:
            if monitor.steps and monitor.decided:
                return
            feed(monitor, denoiser_call)
            if ends and monitor.memorized.all():
                raise AllOver

        output = call.watched(MONITOR, [watch, steering] if self._over == "steered" else [watch])
        self._take(monitor, steering, places)
        return output

    def _take(self, monitor: Monitor, steering: Steering, places: Any) -> None:
        verdicts = monitor.verdicts()
        if not self.found:
            self.found = list(verdicts)
        for position, place in enumerate(places):
            self.found[place], self.norms[place] = verdicts[position], monitor.norm[position]
            if not verdicts[position].memorized:
                self.done[place] = "reseeded" if self.tries[place] else "passed"
            elif self._over == "steered":
                was, self._said[place] = steering.outcome(position, self._call.get("guidance_scale"))
                self.done[place] = "steered" if was else "blocked"
            else:
                self.done[place] = "flagged" if self._over == "flagged" else "blocked"

    def _joined(self, output: Any, made: dict[int, tuple[Any, int]]) -> Any:
        """Return the first run's output with what was made again in its place; None if nothing was made to its end."""
        if not self.tries.any():
            return output
        outputs = [one for one, _ in made.values() if one is not None]
        if not outputs:
            return None
        joined = outputs[0]
        for name in list(joined):
            values = {id(one): one[name] for one in outputs}  # before any of them is replaced
            joined[name] = [None if one is None else values[id(one)][position] for one, position in made.values()]
        return joined

    def _verdicts(self) -> list[GuardVerdict]:
        """Return a verdict for each prompt: what was done to its worst image."""
        return [self._verdict(row) for row in range(len(self._call.prompts))]

    def _verdict(self, row: int) -> GuardVerdict:
        places = range(row * self._call.images, (row + 1) * self._call.images)
        # The images that something was done to come first, and of those the one that was known first.
        worst = min(places, key=lambda place: (ORDER.index(self.done[place]), self.found[place].step))
        reason = self.found[worst].reason
        if self.tries[worst]:
            reason += f"; made again from other noise, {counted(int(self.tries[worst]), 'time')}"
        if self._said[worst]:
            reason += f"; {self._said[worst]}"
        if len(places) > 1 and self.done[worst] != "passed":
            over = sum(self.done[place] == self.done[worst] for place in places)
            reason += f"; so {self.done[worst]} are {over} of {counted(len(places), 'image')}"
        return GuardVerdict(
            prompt=self._call.prompts[row],
            action=self.done[worst],
            score=None,
            norm=float(self.norms[places].mean()),
            threshold=self._calibration.cut,
            reason=reason,
            images=tuple(self.found[place] for place in places),
        )
