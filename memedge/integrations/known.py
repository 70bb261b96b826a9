"""The classes and methods of diffusers that the guard knows; what is none of them is refused, or judged by its result.

Methods are known by where they were defined, so that a class made of a known one is taken for what it does itself.
"""

from typing import Any

from memedge.engine.errors import InputError

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
)
MODULES = tuple(
    f"diffusers.pipelines.{name}" for name in ("stable_diffusion", "controlnet.", "flux.", "qwenimage.", "z_image.")
)


def check_class(pipe: Any) -> None:
    """Raise InputError unless a call of the pipeline is known to generate from what its encode_prompt returns."""
    if not is_known(pipe, "__call__"):
        raise InputError(
            f"The guard does not know how {type(pipe).__name__} generates: guard one of {', '.join(PIPELINES)}, or "
            "judge this pipeline's prompts with Detector.detect or Detector.score_embeddings."
        )


def is_known(pipe: Any, name: str) -> bool:
    """Return whether a pipeline's method or property is the one that diffusers gives a known class."""
    if name in vars(pipe):
        return False
    found = getattr(type(pipe), name, None)
    found = found.fget if isinstance(found, property) else found
    module, place = getattr(found, "__module__", ""), getattr(found, "__qualname__", "")
    known = {f"{kind}.{name}" for kind in PIPELINES}
    return module.startswith(MODULES) and place in known
