"""Whether a pipeline is one that the guard can follow, and of the model that a detector's engine was exported from."""

import inspect
import math
from numbers import Real
from typing import Any, NamedTuple

from memedge.engine.errors import InputError
from memedge.engine.manifest import Manifest
from memedge.integrations.families.find import family_of
from memedge.integrations.known import check_class, is_known


def check_model(pipe: Any, manifest: Manifest) -> None:
    """Raise InputError unless the pipeline takes prompts, and its denoiser and scheduler are the engine's model's."""
    name, source = type(pipe).__name__, manifest.source.id
    parts = [getattr(pipe, part, None) for part in ("unet", "transformer")]
    if parts == [None, None] or "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise InputError(f"{name} has no UNet that prompts guide: the guard is for Stable Diffusion's pipelines.")
    check_class(pipe)
    for what, own, engine in family_of(pipe).facts(pipe, manifest):
        if own != engine:
            raise InputError(
                f"The pipeline is not of the engine's model, {source}: its {what} is {own!r}, and not {engine!r}; make "
                "an engine of the pipeline's own model with `memedge export`."
            )


class Needs(NamedTuple):
    """What sees a pipeline's calls of its denoiser, and what to do without it, for messages."""

    what: str
    instead: str


FIRST_STEP = Needs("first_step", "leave first_step out to have the prompts scored")
STEER = Needs("action='steer'", "use another action")


def check_threshold(threshold: Any) -> None:
    """Raise InputError unless `first_step` is a positive number."""
    if not isinstance(threshold, Real) or isinstance(threshold, bool) or not 0 < float(threshold) < math.inf:
        raise InputError(f"first_step is {threshold!r}: give a threshold of the norm, a number above 0.")


def takes_picture(pipe: Any) -> bool:
    """Return whether a pipeline generates from a picture too: it starts from one, or a ControlNet reads one."""
    return not {"strength", "controlnet_conditioning_scale"}.isdisjoint(inspect.signature(pipe.__call__).parameters)


def check_calls(pipe: Any, needs: Needs) -> None:
    """Raise InputError unless a pipeline guides in one call of its denoiser, each of which a hook can see."""
    family = family_of(pipe)
    denoiser, network = family.denoiser(pipe), family.network
    if family.flow and needs != FIRST_STEP:
        raise InputError(
            f"{type(pipe).__name__} generates by flow matching, where {needs.what} was never measured: {needs.instead}."
        )
    if needs == FIRST_STEP and takes_picture(pipe):
        raise InputError(
            f"{type(pipe).__name__} generates from a picture, not from noise and a prompt alone, where the norm means "
            f"something: {needs.instead}."
        )
    if not family.apart and not is_known(pipe, "do_classifier_free_guidance"):
        raise InputError(
            f"{type(pipe).__name__} decides itself when to guide, and {needs.what} needs classifier-free guidance in "
            f"one call of the {network}: {needs.instead}."
        )
    if getattr(denoiser.config, "time_cond_proj_dim", None) is not None:
        raise InputError(
            f"The UNet takes the guidance scale as an input, so that its calls have no unguided half, which "
            f"{needs.what} needs: {needs.instead}."
        )
    if not type(denoiser).__call__.__module__.startswith("torch."):
        raise InputError(
            f"The {network}'s calls are {type(denoiser).__name__}'s own, where hooks may not run: {needs.instead}."
        )
    if getattr(denoiser, "_compiled_call_impl", None) is not None:  # it would be compiled anew with every hook
        part = f"pipe.{family.part}"
        raise InputError(
            f"The {network} is compiled in place, where no hook can see its calls: use {part} = torch.compile({part}), "
            f"or {needs.instead}."
        )


def check_scale(scale: Any, needs: Needs, name: str = "guidance_scale", above: int = 1) -> None:
    """Raise InputError unless a call's guidance scale, of that name, is one at which diffusers guides."""
    if not (scale or 0) > above:
        raise InputError(
            f"{name} is {scale}, so there is no guidance, which {needs.what} needs: give more than {above}, or "
            f"{needs.instead}."
        )
