"""Opposite guidance for memorized images while the noise is high, then the user's own (docs/remedies.md).

By Jain et al. (CVPR 2025), who hold guidance back, or turn it round, until a transition point.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.integrations.denoiser_calls import AllOver, DenoiserCall
from memedge.wording import counted

# The paper's, and in the middle of what bench/mitigation.py --sweep found on calibration captions (docs/benchmarks.md).
SCALE = -2.0  # g′, instead of the user's guidance scale
UNTIL = 650  # t₀: at this timestep, of 1000, and below, the scale is the user's own


class Steering:
    """Has a pipeline's own arithmetic, ε_n + g (ε_c − ε_n), yield ε_0 + g′ (ε_c − ε_0) for some images.

    For that ε_c is replaced by ε_n + (ε_0 + g′ (ε_c − ε_0) − ε_n) / g, in float32. It holds for v-predictions too, as
    it is linear. Where a pipeline rescales its guidance, by the standard deviation of ε_c, it takes that of what
    replaced it. Other images' rows are not touched.

    Attributes:
        calls: how many calls there were.
        steered: int [N], in how many of them each image was steered.
        since: float [N], the timestep of the call at which each was flagged; NaN if it never was.
    """

    def __init__(self, pipe: Any, images: int, flagged: Callable[[], npt.NDArray[np.bool_]]):
        """Take the pipeline, how many images it is to make, and what says at each call which are to be steered, [N]."""
        self._pipe, self._flagged = pipe, flagged
        self.calls, self.steered, self.since = 0, np.zeros(images, np.int64), np.full(images, np.nan)

    def __call__(self, call: DenoiserCall) -> None:
        """Steer the flagged images of one call; raises AllOver if all are flagged and it is too late for each."""
        self.calls += 1
        flagged = self._flagged()
        self.since[flagged & np.isnan(self.since)] = call.timestep
        if call.timestep <= UNTIL:
            if (flagged & (self.steered == 0)).all():
                raise AllOver
            return
        rows = np.flatnonzero(flagged).tolist()
        if not rows:
            return
        own, cond, uncond = (half.float() for half in (call.own[rows], call.cond[rows], call.uncond(rows)))
        wanted = uncond + SCALE * (cond - uncond)
        call.set_cond(rows, own + (wanted - own) / self._pipe.guidance_scale)
        self.steered[rows] += 1

    def outcome(self, place: int, scale: float) -> tuple[bool, str]:
        """Return whether a flagged image was steered at all, and what is to be said of it.

        Args:
            place: the image's.
            scale: the user's own guidance scale.
        """
        if not self.steered[place]:
            where = f"timestep {self.since[place]:g} is the first that could be"
            return False, f"not steered: {where}, and nothing is at {UNTIL} or below"
        steps = f"{self.steered[place]} of {counted(self.calls, 'step')}"
        return True, f"steered: guidance {SCALE:g}, not {scale:g}, above timestep {UNTIL}, in {steps}"
