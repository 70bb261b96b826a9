"""What flow-matching pipelines have in common: noise levels, and sizes and lengths that a call may choose."""

from collections.abc import Callable
from typing import Any

from memedge.engine.errors import InputError
from memedge.engine.manifest import Flow, Manifest
from memedge.integrations.families.family import Fact

PATCH = 2  # latents of an image token in each direction, as the export counts them for mu


def noise_facts(pipe: Any, manifest: Manifest) -> list[Fact]:
    """Return how a flow-matching pipeline's scheduler spreads its noise levels at the engine's size."""
    kind, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    known = ("scheduler", kind, "FlowMatchEulerDiscreteScheduler")
    if manifest.flow is None or kind != known[2]:
        return [known]
    flow, shift, mu = manifest.flow, None, None
    if config.use_dynamic_shifting:
        _, height, width = manifest.latent_shape
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = float(config.base_shift + slope * (height * width // PATCH**2 - config.base_image_seq_len))
    else:
        shift = float(pipe.scheduler.shift)
    own = Flow(shift, mu, config.time_shift_type, config.shift_terminal or None, flow.sigmas)
    return [
        ("shift of noise levels", own.shift, flow.shift),
        ("mu of noise levels", own.mu, flow.mu),
        ("shift_terminal", own.terminal, flow.terminal),
        ("time_shift_type", own.time_shift, flow.time_shift),
    ]


def check_length(get: Callable[[str], Any], own: int) -> None:
    """Raise InputError unless a call's prompts are read up to the engine's max_sequence_length."""
    length = get("max_sequence_length")
    if length != own:
        raise InputError(
            f"max_sequence_length is {length}, and the engine's is {own}: call the pipeline with that one, or export "
            f"an engine with --max-sequence-length {length}."
        )


def check_size(get: Callable[[str], Any], manifest: Manifest, scale: int, default: int) -> None:
    """Raise InputError unless a call's latents are as large as the engine's.

    Args:
        get: returns the value of one of the call's arguments, or None.
        manifest: the engine's.
        scale: pixels per latent.
        default: the side of the pipeline's own latents.
    """
    latents = get("latents")
    own = [scale * side for side in manifest.latent_shape[1:]]
    found = [int(get(name) or default * scale) for name in ("height", "width")]
    if latents is not None and latents.ndim == 4:  # packed ones are of the size that is said, or it is an error
        found = [scale * side for side in latents.shape[-2:]]
    if found != own:
        raise InputError(
            f"The call's pictures are of {found[1]}x{found[0]} pixels, and the engine's statistics of {own[1]}x{own[0]}"
            f": call the pipeline with width={own[1]} and height={own[0]}, or export an engine with --size "
            f"{found[1]}x{found[0]}."
        )
