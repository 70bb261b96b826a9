"""One sampling run as a gate sees it: the monitor's figures, verdicts, and guidance that is turned round."""

import logging
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from comfy.model_management import InterruptProcessingException
from comfy.samplers import calc_cond_batch

from memedge.decision.reasons import SAID
from memedge.engine.errors import InputError
from memedge.integrations.comfyui.sampling import halves, kind_of, sigma_at
from memedge.integrations.steering import SCALE, UNTIL
from memedge.integrations.tensors import readable
from memedge.monitor.map import enlarged
from memedge.monitor.monitor import Monitor

Action = Literal["interrupt", "flag", "steer"]
LOG = logging.getLogger("memedge")
EMPTY = "memedge_empty"  # among a guider's conditionings


class Run:
    """What a gate measures in one run of a sampler, and does there.

    Attributes:
        samples: the run's latents, torch [B, C, H, W] on the host; None until it has ended.
    """

    def __init__(self, guider: Any, sigmas: Any, threshold: float | None, action: Action, has_empty: bool):
        """Take a run that is about to begin.

        Args:
            guider: ComfyUI's, which has the model and the conditionings.
            sigmas: its schedule, torch [K + 1].
            threshold: from which norm of the first step on an image is memorized; None: there are no verdicts.
            action: what is done then.
            has_empty: the guider has the empty prompt's conditioning, as EMPTY.
        """
        model_sampling = guider.model_patcher.get_model_object("model_sampling")
        self._kind = kind_of(model_sampling)
        self._guider, self._threshold, self._action, self._has_empty = guider, threshold, action, has_empty
        self._monitor = Monitor(prediction_type="epsilon" if self._kind == "flow" else self._kind)
        self._left, self._seen = [float(sigma) for sigma in sigmas[:-1]], 0
        self._timestep, self._until = model_sampling.timestep, sigma_at(model_sampling, UNTIL)
        if action == "steer" and (self._kind == "flow" or self._until is None):
            raise InputError(
                "Steering was measured on models of noise with 1000 training timesteps, which this one is not: use "
                "another action."
            )
        self._start, self._remedy = 0.0, ""
        self._map: Any = None  # of the first step, float32 [B, H, W]
        self.samples: Any = None

    @property
    def norm(self) -> npt.NDArray[np.float64]:
        """The first step's ‖Δ‖₂ of each image, float64 [B], in ε; in v for flows."""
        return self._monitor.norm

    @property
    def memorized(self) -> npt.NDArray[np.bool_] | None:
        """Which images' norms reach the threshold, [B]; None without one."""
        return None if self._threshold is None else self.norm >= self._threshold

    @property
    def steps(self) -> int:
        """How many steps were measured."""
        return self._seen

    def reasons(self) -> list[str]:
        """Return each image's verdict in words."""
        flagged = [None] * len(self.norm) if self.memorized is None else self.memorized.tolist()
        return [self._reason(norm, one) for norm, one in zip(self.norm.tolist(), flagged, strict=True)]

    def _reason(self, norm: float, flagged: bool | None) -> str:
        sign = "≥" if flagged else "<"
        compared = ", no threshold" if flagged is None else f" {sign} threshold {self._threshold:.4g}"
        return f"{SAID[flagged]}: norm {norm:.4g} at t {self._start:.0f}{compared}{self._remedy if flagged else ''}"

    def map(self, height: int, width: int) -> npt.NDArray[np.float32]:
        """Return where the first step's guidance pulls, [B, height, width], as a share of the batch's largest value."""
        found = enlarged(self._map, (height, width))
        shares: npt.NDArray[np.float32] = found / max(found.max(), np.finfo(np.float32).tiny)
        return shares

    def see(self, args: dict[str, Any]) -> list[Any]:
        """Take one evaluation of the model, and return what the sampler is to make of it: both denoised halves.

        Args:
            args: what ComfyUI gives a function before classifier-free guidance.

        Raises:
            InputError: there is no unconditional half, or the latents are no images'.
            InterruptProcessingException: all images are memorized, and the action is so, or it is too late to steer.
        """
        _check(args)
        cond, uncond = args["conds_out"][:2]
        sigma = float(args["sigma"].flatten()[0])
        wants_empty = self._has_empty and (not self._seen or self._steers(sigma))
        origin = self._empty_denoised(args) if wants_empty else uncond
        if self._is_next(sigma):
            measured = halves(self._kind, args["input"].float(), sigma, cond.float(), origin.float())
            self._monitor.step(*(readable(half.detach()) for half in measured), sigma=sigma)
            self._seen += 1
            if self._seen == 1:
                self._start = float(self._timestep(args["sigma"]).flatten()[0])
                self._map = self._monitor.map()  # kept: later steps tell less of where the copy is (docs/detectors.md)
                self._decide(sigma)
        if not self._steers(sigma):
            return args["conds_out"]  # type: ignore[no-any-return]
        return [self._steered(cond, uncond, origin, args["cond_scale"]), *args["conds_out"][1:]]

    def _is_next(self, sigma: float) -> bool:
        """Return whether an evaluation is the first at the schedule's next level of noise; others lie in between."""
        passed = [one for one in self._left if one >= sigma * (1 - 1e-4)]  # some skip levels, or have their own
        self._left = self._left[len(passed) :]
        return bool(passed) or not self._seen

    def _empty_denoised(self, args: dict[str, Any]) -> Any:
        conds = [self._guider.conds[EMPTY]]
        return calc_cond_batch(args["model"], conds, args["input"], args["sigma"], args["model_options"])[0]

    def _decide(self, sigma: float) -> None:
        too_late = self._action == "steer" and not self._is_early(sigma)
        if self._action == "steer":
            late = f", not steered, as the run begins at t ≤ {UNTIL}"
            self._remedy = late if too_late else f", steered until t ≤ {UNTIL}"
        for reason in self.reasons():
            LOG.info("%s", reason)
        stops = self._action == "interrupt" or too_late
        if stops and self.memorized is not None and self.memorized.all():
            LOG.warning("All images of the batch are memorized: the Memorization Gate interrupts the run.")
            raise InterruptProcessingException

    def _is_early(self, sigma: float) -> bool:
        return self._until is not None and sigma > self._until

    def _steers(self, sigma: float) -> bool:
        flagged = self.memorized
        return self._action == "steer" and self._is_early(sigma) and flagged is not None and bool(flagged.any())

    def _steered(self, cond: Any, uncond: Any, origin: Any, scale: float) -> Any:
        """Return the prompt's half with that of flagged images moved, so that the sampler's own guidance is opposite.

        It is linear, so that it holds for denoised images as for predictions (memedge/integrations/steering.py).
        """
        if scale == 0:
            raise InputError("At cfg 0 there is no guidance to turn round: raise cfg, or use another action.")
        flagged = torch.from_numpy(self.memorized).to(cond.device)[:, None, None, None]
        wanted = origin + SCALE * (cond - origin)
        return torch.where(flagged, uncond + (wanted - uncond) / scale, cond)

    def end(self, samples: Any) -> None:
        """Take the run's latents.

        Raises:
            InputError: no evaluation was seen.
        """
        if not self._seen:
            raise InputError(
                "The sampler's guider does not give the model's two predictions to patches, so nothing was measured: "
                "use KSampler or a CFGGuider with the gate's model."
            )
        self.samples = samples.detach().cpu()
        self._guider = None  # which holds models


def _check(args: dict[str, Any]) -> None:
    if args["conds"][1] is None:
        raise InputError(
            "At cfg 1 ComfyUI computes no unconditional prediction, so there is no guidance to measure: raise cfg, or "
            "remove the Memorization Gate."
        )
    if args["input"].ndim != 4:
        raise InputError(
            f"The latents have {args['input'].ndim} dimensions; the gate measures images, [B, C, H, W]: remove the "
            "Memorization Gate."
        )
