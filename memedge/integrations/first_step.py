"""The norm of the guidance in a pipeline's own first step: no pass of the denoiser is added (docs/methods.md §5)."""

from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError
from memedge.engine.manifest import PredictionType
from memedge.guidance import guidance_stats
from memedge.integrations.denoiser_calls import AllOver, DenoiserCall
from memedge.integrations.families.find import family_of


class FirstStep:
    """Measures the first of a pipeline's calls of its denoiser: ‖Δ‖ in ε, or of flow matching in v.

    Attributes:
        timestep: that of the first call.
    """

    def __init__(
        self, pipe: Any, prompts: int, prediction_type: PredictionType, threshold: float, *, stop: bool = False
    ):
        """Take a pipeline that is to generate the same number of images of each of the prompts.

        Args:
            stop: whether AllOver is raised from the first call if no norm is under the threshold.
        """
        self._pipe, self._prompts, self._prediction_type = pipe, prompts, prediction_type
        self._threshold, self._stop = threshold, stop
        self._network = family_of(pipe).network
        self._norms: npt.NDArray[np.float64] | None = None
        self.timestep = 0.0

    def __call__(self, call: DenoiserCall) -> None:
        """Take the norms, of the first call alone."""
        if self._norms is not None:
            return
        self.timestep = call.timestep
        # To the host, some hundred kilobytes, on which the step waits for its verdict anyhow: so any device will do.
        cond, uncond = call.cond.contiguous().cpu(), call.uncond().contiguous().cpu()
        if cond.ndim == 3:  # packed into tokens, [N, S, D]
            cond, uncond = cond[:, None], uncond[:, None]
        stats = guidance_stats(cond, uncond, prediction_type=self._prediction_type, alpha_cumprod=self._alpha_cumprod())
        self._norms = stats.norm.reshape(self._prompts, -1).mean(1)
        if self._stop and self.over().all():
            raise AllOver

    def over(self) -> npt.NDArray[np.bool_]:
        """Return whether each prompt's norm is at the threshold or over it; raises what `norms` does."""
        over: npt.NDArray[np.bool_] = self.norms >= self._threshold
        return over

    @property
    def norms(self) -> npt.NDArray[np.float64]:
        """Each prompt's mean of ‖Δ‖₂ over its images, [B].

        Raises:
            InputError: no call was seen, as of what is in a denoiser's place and has no hooks.
        """
        if self._norms is None:
            raise InputError(
                f"The {self._network}'s first call could not be seen, as its hooks did not run: leave first_step out "
                "to have the prompts scored."
            )
        return self._norms

    def _alpha_cumprod(self) -> float | None:
        """Return ᾱ at the timestep, which may lie between two trained ones; None where it is not needed."""
        if self._prediction_type != "v_prediction":
            return None
        trained = self._pipe.scheduler.alphas_cumprod.double().cpu().numpy()
        alpha = float(np.interp(self.timestep, np.arange(len(trained)), trained))
        if not 0 < alpha < 1:
            raise InputError(
                f"At the first step, timestep {self.timestep:g}, the latents hold no signal (zero terminal SNR), so "
                "the norm says nothing there: leave first_step out to have the prompts scored."
            )
        return alpha
