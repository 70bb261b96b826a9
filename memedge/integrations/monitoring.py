"""The monitor in a diffusers pipeline: fed from the calls of the UNet, and calibrated by generations."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memedge.integrations.checks import Needs, check_calls, check_scale
from memedge.integrations.known import check_class
from memedge.integrations.unet_calls import UNetCall, UNetCalls
from memedge.monitor.calibration import MonitorCalibration
from memedge.monitor.fitting import Traces, check_counts, cross_validate, fit
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


def feed(monitor: Monitor, call: UNetCall) -> None:
    """Take a call of the UNet as the monitor's next step."""
    tensors = (tensor.contiguous() for tensor in (call.latents, call.cond, call.uncond()))
    monitor.step(*tensors, call.timestep)


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
) -> MonitorCalibration:
    """Generate one image of each prompt, and fit what tells the memorized ones from the others, and how early.

    The calibration holds for the pipeline's model and scheduler, this number of steps and this guidance scale. All
    statistics of all numbers of steps are tried (memedge/monitor/fitting.py). The cut is on the running maximum, so
    that `target_fpr` is the share of false alarms over all looks. Images are generated to the end and thrown away.

    Args:
        pipe: a pipeline of Stable Diffusion 1, 2 or XL, from text.
        memorized: prompts that make the model print training images, at least 5.
        clean: prompts that do not, at least 1 / target_fpr − 1.
        num_inference_steps, guidance_scale: as the pipeline takes them.
        target_fpr: the share of clean images that may be called memorized.
        batch: how many images are generated at once.
        seed: of the images' noise: the i-th starts from seed + i.
        progress: called with the numbers of images made and in all, after each batch.

    Raises:
        ImportError: diffusers or scikit-learn is not installed.
        InputError: a pipeline whose calls cannot be followed, or too few prompts.
        NotFiniteError: the model produced NaN or infinity.

    Examples:
        >>> from memedge import Monitor
        >>> calibration = Monitor.calibrate(pipe, memorized, clean, num_inference_steps=20, guidance_scale=4.0)
        >>> calibration.save("engine/monitor.json")
    """
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
            )
        seen.append(Traces(monitor.norms, monitor.changes, monitor.moves))
        if progress is not None:
            progress(places.stop, len(prompts))
    traces = Traces(*(np.concatenate(arrays, axis=1) for arrays in zip(*seen, strict=True)))
    found = fit(traces, of_memorized, target_fpr)
    true, false = cross_validate(traces, of_memorized, target_fpr)
    return MonitorCalibration(
        scheduler=type(pipe.scheduler).__name__,
        steps=num_inference_steps,
        guidance_scale=float(guidance_scale),
        timesteps=tuple(timesteps),
        statistic=found.statistic,
        looks=len(found.mean),
        mean=tuple(map(float, found.mean)),
        deviation=tuple(map(float, found.deviation)),
        cut=found.cut,
        target_fpr=target_fpr,
        clean=len(clean),
        memorized=len(memorized),
        found=true,
        false_alarms=false,
    )
