"""The noise levels of a flow-matching checkpoint: at which σ it is looked at, and how its sampler spreads them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler

from memedge.engine.flow import size_shift
from memedge.engine.manifest import Flow, Schedule
from memedge.export.sources.architectures import Denoiser
from memedge.export.sources.schedule import Noise, invalid

# σ = 1, where samplers begin, and where the Δ of ε and of the score are 0; and σ / (1 − σ) = .202, the signal-to-noise
# ratio that Stable Diffusion has at t = 41, in thousandths (docs/methods.md §9).
TIMESTEPS = (1000, 168)


def read_flow(config: Mapping[str, Any], denoiser: Denoiser, latent_shape: tuple[int, int, int]) -> Noise:
    """Return the noise of a flow-matching checkpoint's scheduler_config.json.

    Args:
        config: the configuration, which was checked (check_traits.py).
        denoiser: says how many steps the family's pipeline takes, and how it asks the scheduler for them.
        latent_shape: C, H, W of a picture, by whose tokens schedulers may shift.

    Raises:
        ExportError: the configuration is not valid.
    """
    steps = denoiser.steps
    try:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
        own = scheduler.config
        mu = size_shift(own, latent_shape) if own.use_dynamic_shifting else None
        scheduler.set_timesteps(steps, mu=mu, sigmas=np.linspace(1, 1 / steps, steps) if denoiser.even else None)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise invalid(config, error) from None
    sigmas = tuple(float(sigma) for sigma in scheduler.sigmas[:-1])
    flow = Flow(
        shift=None if own.use_dynamic_shifting else float(own.shift),
        mu=mu,
        time_shift=own.time_shift_type,
        terminal=own.shift_terminal or None,
        sigmas=sigmas,
    )
    steps_of = Schedule(
        timesteps=tuple(round(1000 * sigma) for sigma in sigmas),
        alphas_cumprod=tuple(_alpha(sigma) for sigma in sigmas),
        final_alpha_cumprod=1.0,
    )
    first, last = (_alpha(timestep / 1000) for timestep in TIMESTEPS)
    return Noise("flow", TIMESTEPS, (first, last), steps_of, flow=flow)


def _alpha(sigma: float) -> float:
    """Return the ᾱ of the same signal-to-noise ratio: ᾱ / (1 − ᾱ) = ((1 − σ) / σ)²."""
    return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
