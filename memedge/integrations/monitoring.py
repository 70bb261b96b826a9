"""The monitor in a diffusers pipeline: fed from the calls of the UNet."""

from collections.abc import Callable
from typing import Any

from memedge.integrations.checks import Needs
from memedge.integrations.denoiser_calls import DenoiserCall
from memedge.integrations.tensors import readable
from memedge.monitor.calibration import GenerationSettings, MonitorCalibration
from memedge.monitor.monitor import Monitor

MONITOR = Needs("the monitor", "leave it out to have the prompts scored before")


def make_monitor(pipe: Any, calibration: MonitorCalibration | None = None) -> Monitor:
    """Return a monitor of a pipeline's next generation."""
    alphas = getattr(pipe.scheduler, "alphas_cumprod", None)
    return Monitor(
        calibration,
        prediction_type=getattr(pipe.scheduler.config, "prediction_type", "epsilon"),
        alphas_cumprod=None if alphas is None else alphas.double().cpu().numpy(),
    )


def settings_of(pipe: Any, argument: Callable[[str], Any]) -> GenerationSettings:
    """Return what a call generates with; `argument` gives the value of one of its arguments, or None."""
    return GenerationSettings(
        pipeline=type(pipe).__name__,
        scheduler=type(pipe.scheduler).__name__,
        steps=argument("num_inference_steps"),
        guidance_scale=float(argument("guidance_scale")),
        guidance_rescale=float(argument("guidance_rescale") or 0),
    )


def feed(monitor: Monitor, call: DenoiserCall) -> None:
    """Take a call of the UNet as the monitor's next step."""
    x, cond, uncond = (readable(tensor) for tensor in (call.latents, call.cond, call.uncond()))
    monitor.step(x, cond, uncond, call.timestep)
