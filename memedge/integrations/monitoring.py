"""The monitor in a diffusers pipeline: fed from the calls of the UNet, and calibrated by generations."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memedge.integrations.checks import Needs, check_calls, check_scale
from memedge.integrations.known import check_class
from memedge.integrations.unet_calls import UNetCall, UNetCalls
from memedge.monitor.calibration import MonitorCalibration, Settings
from memedge.monitor.fitting import Traces, calibration_of, check_counts
from memedge.monitor.monitor import Monitor
from memedge.prompts.text import checked_prompts

MONITOR = Needs("the monitor", "leave it out to have the prompts scored before")


def make_monitor(pipe: Any, calibration: MonitorCalibration | None = None) -> Monitor:
    """Return a monitor of a pipeline's next generation."""
    config = pipe.scheduler.config
    return Monitor(
        calibration,
        prediction_type=getattr(config, "prediction_type", "epsilon"),
        alphas_cumprod=pipe.scheduler.alphas_cumprod.double().cpu().numpy(),
    )


def settings_of(pipe: Any, argument: Callable[[str], Any]) -> Settings:
    """Return what a call generates with; `argument` gives the value of one of its arguments, or None."""
    return Settings(
        pipeline=type(pipe).__name__,
        scheduler=type(pipe.scheduler).__name__,
        steps=argument("num_inference_steps"),
        guidance_scale=float(argument("guidance_scale")),
        guidance_rescale=float(argument("guidance_rescale") or 0),
    )


def feed(monitor: Monitor, call: UNetCall) -> None:
    """Take a call of the UNet as the monitor's next step."""
    x, cond, uncond = (tensor.contiguous() for tensor in (call.latents, call.cond, call.uncond()))
    monitor.step(x, cond, uncond, call.timestep)


def calibrate(
    pipe: Any,
    memorized: Sequence[str],
    clean: Sequence[str],
    num_inference_steps: int,
    guidance_scale: float,
    target_fpr: float,
    batch: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
    options: dict[str, Any],
) -> MonitorCalibration:
    """Do what Monitor.calibrate says (memedge/monitor/monitor.py)."""
    import torch

    check_class(pipe)
    check_calls(pipe, MONITOR)
    check_scale(guidance_scale, MONITOR)
    prompts = [*checked_prompts(memorized), *checked_prompts(clean)]
    check_counts(len(memorized), len(clean), target_fpr)
    of_memorized = np.arange(len(prompts)) < len(memorized)
    seen: list[Traces] = []
    timesteps: list[float] = []
    for start in range(0, len(prompts), batch):
        places = range(start, min(start + batch, len(prompts)))
        monitor, timesteps = make_monitor(pipe), []

        def watch(call: UNetCall, monitor: Monitor = monitor, timesteps: list[float] = timesteps) -> None:
            timesteps.append(call.timestep)
            feed(monitor, call)

        with UNetCalls(pipe, len(places), 1, MONITOR, [watch]):
            pipe(
                prompts[start : places.stop],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed + place) for place in places],
                output_type="latent",
                **options,
            )
        seen.append(Traces(monitor.norms, monitor.changes, monitor.moves))
        if progress is not None:
            progress(places.stop, len(prompts))
    traces = Traces(*(np.concatenate(arrays, axis=1) for arrays in zip(*seen, strict=True)))
    return calibration_of(
        traces,
        of_memorized,
        target_fpr,
        settings_of(
            pipe, {**options, "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}.get
        ),
        timesteps,
    )
