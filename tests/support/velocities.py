"""What diffusers' own pipelines of flow-matching models predict, and the statistics of it (docs/methods.md §9)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from memedge.export.quiet_libraries import quiet

SIGMAS = (1.0, 0.168)  # of the norm and of the alignment


def load(folder: Path, **parts: None) -> Any:
    """Return a pipeline whose scheduler takes σ as they are given, and which says nothing; without some parts."""
    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    as_given = {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, **as_given)
    return pipeline


def predictions(pipeline: Any, sigma: float, latents: torch.Tensor, **call: Any) -> list[torch.Tensor]:
    """Return what the transformer gave in one step at σ of a call, in float64, in the order of its calls."""
    found: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        found.append(output[0].double())

    hook = pipeline.transformer.register_forward_hook(keep)
    try:
        with quiet():
            pipeline(latents=latents, num_inference_steps=1, sigmas=[sigma], output_type="latent", **call)
    finally:
        hook.remove()
    return found


def statistics(noise: npt.NDArray[np.float32], velocities: Sequence[tuple[torch.Tensor, ...]]) -> tuple[float, float]:
    """Return norm and alignment of noise [1, C, H, W] and (v_c, v_0), of its shape, at each of SIGMAS."""
    (cond, uncond), (cond_low, uncond_low) = velocities
    epsilon = torch.from_numpy(noise).double() + (1 - SIGMAS[1]) * uncond_low
    cosine = torch.nn.functional.cosine_similarity(epsilon, cond_low - uncond_low, dim=1)
    return float((cond - uncond).norm()), float(cosine.mean())
