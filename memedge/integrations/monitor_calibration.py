"""The monitor's calibration by a pipeline's own generations.

Needs scikit-learn and SciPy, of the extra `eval`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memedge.integrations.checks import check_calls, check_scale
from memedge.integrations.denoiser_calls import DenoiserCall, DenoiserCalls
from memedge.integrations.known import check_class
from memedge.integrations.monitoring import MONITOR, feed, make_monitor, settings_of
from memedge.monitor.calibration import MonitorCalibration
from memedge.monitor.fitting import Traces, calibration_of, check_counts
from memedge.monitor.monitor import Monitor
from memedge.prompts.text import checked_prompts


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

        def watch(call: DenoiserCall, monitor: Monitor = monitor, timesteps: list[float] = timesteps) -> None:
            timesteps.append(call.timestep)
            feed(monitor, call)

        with DenoiserCalls(pipe, len(places), 1, MONITOR, [watch]):
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
