"""A monitor of one generation, fed with each step's own predictions (docs/methods.md §7)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memedge.engine.arrays import Bools, Floats, Singles
from memedge.engine.errors import InputError, not_installed
from memedge.engine.guidance_step import StepReduction
from memedge.engine.manifest import PredictionType, velocity_norm_factor
from memedge.monitor.calibration import MonitorCalibration
from memedge.monitor.map import enlarged, smoothed
from memedge.monitor.verdicts import MonitorVerdict, highest_so_far, verdicts


class Monitor:
    """Statistics of the images of one generation with classifier-free guidance, a step after the other; no pass added.

    Feed each step's latents and both predictions to `step`. A monitor is for one generation: make a new one for the
    next. Tensors on an NVIDIA GPU are reduced there, and what is needed of a step for the next one stays there.

    Attributes:
        calibration: what the verdicts are by; None: there are none.
        norms: float64 [K, B], ‖ε_c − ε_0‖₂ at each of the K steps so far (Wen et al., ICLR 2024).
        changes: float64 [K − 1, B], ‖ε_c(x_k+1) − ε_c(x_k)‖₂²: the first is DSM01, the second DSM12.
        moves: float64 [K − 1, B], ‖x_k − x_k+1‖₂, the update norm of "Broken Memories".

    Examples:
        >>> import numpy as np
        >>> from memedge import Monitor
        >>> monitor = Monitor()
        >>> x = np.zeros((1, 4, 8, 8), np.float32)
        >>> for t in (981, 961):
        ...     monitor.step(x, eps_cond=x + 1, eps_uncond=x, t=t)
        >>> monitor.norm, monitor.changes.shape
        (array([16.]), (1, 1))
    """

    def __init__(
        self,
        calibration: MonitorCalibration | None = None,
        *,
        prediction_type: PredictionType = "epsilon",
        alphas_cumprod: Sequence[float] | None = None,
    ):
        """Begin a generation.

        Args:
            calibration: made by `Monitor.calibrate` for generations like this one.
            prediction_type: what the model predicts, of which ε is made: "epsilon" or "v_prediction".
            alphas_cumprod: the model's ᾱ by timestep, which v-predictions need where `step` is not given σ.

        Raises:
            InputError: there is no such prediction type.
        """
        if prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"There is no prediction type {prediction_type!r}: use 'epsilon' or 'v_prediction'.")
        self.calibration, self._prediction_type = calibration, prediction_type
        self._alphas = None if alphas_cumprod is None else np.asarray(alphas_cumprod, np.float64)
        self._reduction, self._first_factor = StepReduction(), 1.0
        self._norms: list[Floats] = []
        self._changes: list[Floats] = []
        self._moves: list[Floats] = []

    def step(
        self, x: Any, eps_cond: Any, eps_uncond: Any, t: float | None = None, *, sigma: float | None = None
    ) -> None:
        """Take one step of all images. It waits for the reduction, not for more.

        Args:
            x: the latents [B, C, H, W] as the model was given them, √ᾱ x_0 + √(1 − ᾱ) ε; what `guidance_stats` takes.
            eps_cond: the prediction for the prompt, of the same shape and dtype, on the same device.
            eps_uncond: that for the empty prompt.
            t: the timestep. A calibration is compared with it.
            sigma: the noise level √(1 − ᾱ) / √ᾱ instead, of samplers that have no timesteps.

        Raises:
            InputError: tensors that do not fit, another timestep than the calibration's, or no noise level where the
                prediction type needs it.
            ProviderError: CUDA fails.
            NotFiniteError: NaN or infinity.
        """
        if self.calibration is not None:
            self.calibration.check_step(len(self._norms), t)
        scale, shift = 1.0, 0.0
        if self._prediction_type == "v_prediction":
            alpha = self._alpha(t, sigma)
            scale, shift = math.sqrt(alpha), math.sqrt(1 - alpha)
            if not self._norms:
                self._first_factor = velocity_norm_factor(alpha) / scale
        found = self._reduction.step(x, eps_cond, eps_uncond, scale, shift)
        if self._norms:
            self._changes.append(found.change**2)
            self._moves.append(found.move)
        self._norms.append(found.norm)

    @property
    def steps(self) -> int:
        """How many steps there were."""
        return len(self._norms)

    @property
    def norm(self) -> Floats:
        """‖Δ‖₂ of the first step, float64 [B], as `guidance_stats` gives it (docs/methods.md §1, v-prediction)."""
        first: Floats = self.norms[0] * self._first_factor
        return first

    @property
    def norms(self) -> Floats:
        return self._stacked(self._norms, 1)

    @property
    def changes(self) -> Floats:
        return self._stacked(self._changes, 2)

    @property
    def moves(self) -> Floats:
        return self._stacked(self._moves, 2)

    def mean_norm(self, steps: int | None = None) -> Floats:
        """Return the mean of ‖Δ‖₂ over the first `steps` steps, or over all so far (Wen et al.), float64 [B]."""
        mean: Floats = self.norms[:steps].mean(axis=0)
        return mean

    @property
    def memorized(self) -> Bools:
        """Which images are memorized by what is known so far, bool [B]; once an image is, it stays so.

        Raises:
            InputError: there is no calibration, or there was no step.
        """
        calibration = self._calibration()
        highest = highest_so_far(calibration, self.norms, np.array(self._changes), np.array(self._moves))
        over: Bools = highest[-1] >= calibration.cut
        return over

    @property
    def decided(self) -> bool:
        """Whether no further step changes a verdict: the calibration looks at no more steps."""
        return self.steps >= self._calibration().looks

    def verdicts(self) -> list[MonitorVerdict]:
        """Return what is known of each image so far.

        Raises:
            InputError: there is no calibration, or there was no step.
        """
        return verdicts(self._calibration(), self.norms, np.array(self._changes), np.array(self._moves))

    def map(self, size: tuple[int, int] | None = None, *, smooth: bool = True) -> Singles:
        """Return where the last step's guidance is: Σ over channels of Δ² at each pixel, float32 [B, H, W].

        Where a part of a training image is copied, it is there that Δ is large. The first step told best on the
        embedded model (docs/detectors.md), and the last is published for Stable Diffusion 1.4.

        Args:
            size: the image's (height, width), which the map is enlarged to; None: that of the latents.
            smooth: the mean over a window of a fifth of the shorter side, instead of each pixel's own value.

        Raises:
            InputError: there was no step, or the size is none.
        """
        values = self._reduction.map()
        values = smoothed(values) if smooth else values
        return values if size is None else enlarged(values, size)

    @staticmethod
    def calibrate(
        pipe: Any,
        memorized: Sequence[str],
        clean: Sequence[str],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        target_fpr: float = 0.01,
        batch: int = 8,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> MonitorCalibration:
        """Generate one image of each prompt, and fit what tells the memorized ones from the others, and how early.

        The calibration holds for the pipeline's model, class and scheduler, this number of steps and this guidance. All
        statistics of all numbers of steps are tried (memedge/monitor/fitting.py). The cut is on the running maximum, so
        that `target_fpr` is the share of false alarms over all looks. Images are generated to the end and thrown away.

        Args:
            pipe: a pipeline of Stable Diffusion 1, 2 or XL.
            memorized: prompts that make the model print training images, at least 5.
            clean: prompts that do not, at least 1 / target_fpr − 1.
            num_inference_steps, guidance_scale: as the pipeline takes them.
            target_fpr: the share of clean images that may be called memorized.
            batch: how many images are generated at once.
            seed: of the images' noise: the i-th starts from seed + i.
            progress: called with the numbers of images made and in all, after each batch.
            options: what the pipeline takes beside, such as image and strength, or guidance_rescale; as it is for all.

        Raises:
            ImportError: diffusers or scikit-learn is not installed.
            InputError: a pipeline whose calls cannot be followed, or too few prompts.
            NotFiniteError: the model produced NaN or infinity.

        Examples:
            >>> from pathlib import Path
            >>> from diffusers import StableDiffusionPipeline
            >>> from memedge import Monitor
            >>> memorized, clean = (Path(f"{name}.txt").read_text().splitlines() for name in ("memorized", "clean"))
            >>> pipe = StableDiffusionPipeline.from_pretrained("model")
            >>> options = {"num_inference_steps": 2, "guidance_scale": 4.0, "target_fpr": 0.05}
            >>> calibration = Monitor.calibrate(pipe, memorized[:5], clean[:19], **options)
            >>> calibration.save("monitor.json")
            >>> calibration.settings.scheduler, calibration.settings.steps, calibration.clean
            ('DDIMScheduler', 2, 19)
        """
        try:
            from memedge.integrations.monitor_calibration import calibrate
        except ModuleNotFoundError as error:
            raise ImportError(not_installed("Monitor.calibrate", error, "eval")) from error
        fit = (num_inference_steps, guidance_scale, target_fpr, batch, seed, progress)
        return calibrate(pipe, memorized, clean, *fit, options)

    def _calibration(self) -> MonitorCalibration:
        if self.calibration is None:
            raise InputError("The monitor has no calibration, and so no verdicts: make one with Monitor.calibrate.")
        return self.calibration

    def _stacked(self, values: list[Floats], steps: int) -> Floats:
        if self.steps < steps:
            raise InputError(f"There were {self.steps} steps, and this needs {steps}: call step first.")
        return np.array(values)

    def _alpha(self, t: float | None, sigma: float | None) -> float:
        """Return ᾱ, which may lie between two trained timesteps."""
        if sigma is not None:
            alpha = 1 / (1 + float(sigma) ** 2)
        elif t is not None and self._alphas is not None:
            alpha = float(np.interp(float(t), np.arange(len(self._alphas)), self._alphas))
        else:
            raise InputError(
                "v-prediction needs the noise level: give step sigma, or the monitor alphas_cumprod and step t."
            )
        if not 0 < alpha < 1:
            raise InputError(
                f"ᾱ is {alpha:g} at this step, where ε cannot be told from v-predictions: leave the step out (zero "
                "terminal SNR), or give the noise level."
            )
        return alpha
