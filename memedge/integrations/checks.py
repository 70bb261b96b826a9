"""Whether a pipeline is one that the guard can follow, and of the model that a detector's engine was exported from."""

import inspect
import math
from numbers import Real
from typing import Any

from memedge.engine.errors import InputError
from memedge.engine.manifest import Manifest
from memedge.integrations.known import check_class, is_known


def check_model(pipe: Any, manifest: Manifest) -> None:
    """Raise InputError unless the pipeline has a UNet of the engine's shapes and prediction type, and takes prompts."""
    name, source = type(pipe).__name__, manifest.source.id
    unet = getattr(pipe, "unet", None)
    if unet is None or "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise InputError(f"{name} has no UNet that prompts guide: the guard is for Stable Diffusion's pipelines.")
    check_class(pipe)
    pairs = [
        ("number of latent channels", unet.config.in_channels, manifest.latent_shape[0]),
        ("width of prompt embeddings", unet.config.cross_attention_dim, manifest.state_width),
        ("prediction type", getattr(pipe.scheduler.config, "prediction_type", "epsilon"), manifest.prediction_type),
    ]
    for what, own, engine in pairs:
        if own != engine:
            raise InputError(
                f"The pipeline is not of the engine's model, {source}: its {what} is {own!r}, and not {engine!r}; make "
                "an engine of the pipeline's own model with `memedge export`."
            )


def check_first_step(pipe: Any, threshold: Any) -> None:
    """Raise InputError unless the threshold is a positive number, and the first step's norm can be had and means it."""
    if not isinstance(threshold, Real) or isinstance(threshold, bool) or not 0 < float(threshold) < math.inf:
        raise InputError(f"first_step is {threshold!r}: give a threshold of the norm, a number above 0.")
    if "strength" in inspect.signature(pipe.__call__).parameters:
        raise InputError(
            f"{type(pipe).__name__} starts from a picture, not from noise alone, where the norm means something: leave "
            "first_step out to have the prompts scored."
        )
    if not is_known(pipe, "do_classifier_free_guidance"):
        raise InputError(
            f"{type(pipe).__name__} decides itself when to guide, and first_step needs classifier-free guidance in one "
            "call of the UNet: leave first_step out to have the prompts scored."
        )
    if not type(pipe.unet).__call__.__module__.startswith("torch."):
        raise InputError(
            f"The UNet's calls are {type(pipe.unet).__name__}'s own, where hooks may not run: leave first_step out to "
            "have the prompts scored."
        )
    if getattr(pipe.unet, "_compiled_call_impl", None) is not None:  # it would be compiled anew with every hook
        raise InputError(
            "The UNet is compiled in place, where no hook can see its calls: use pipe.unet = torch.compile(pipe.unet), "
            "or leave first_step out to have the prompts scored."
        )
