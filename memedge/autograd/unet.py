"""The UNet that an engine was exported from, to be differentiated in torch."""

import torch

from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import InputError
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.architectures import wrapper
from memedge.export.sources.denoisers.denoiser import Denoiser
from memedge.export.sources.open import load_parts


def load_unet(directory: EngineDirectory, checkpoint: str) -> Denoiser:
    """Return the checkpoint's UNet or transformer, in float32, as the engine was exported of it.

    Args:
        directory: the engine's.
        checkpoint: what `memedge export` made the engine of (export/sources/open.py).

    Raises:
        ExportError: the checkpoint cannot be read.
        InputError: the engine was made of another one.
    """
    manifest = directory.manifest
    with quiet():
        # The first forward-mode derivative of all warns that torch uses what torch deprecates.
        torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))
        parts = load_parts(
            checkpoint, revision=None, loras=(), allow_pickle=False, config=None, progress=lambda _phase: None
        )
    if parts.sha256 != manifest.source.sha256:
        raise InputError(
            f"{directory.path} was made of {manifest.source.id}, and {checkpoint} has other weights: give the "
            "checkpoint that was exported."
        )
    if parts.architecture.denoiser.flow:  # has no size of its own
        parts.latent_size = manifest.latent_shape[1:]
    parts.guidance = manifest.guidance
    loaded: Denoiser = wrapper("denoisers", parts.architecture.denoiser.wrapper)(
        parts, manifest.tokens, manifest.pooled_width
    )
    return loaded
