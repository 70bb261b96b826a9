"""From a pipeline to its family."""

from typing import Any

from memedge.integrations.families.family import Family
from memedge.integrations.families.flux import Flux
from memedge.integrations.families.qwen_image import QwenImage
from memedge.integrations.families.sd3 import StableDiffusion3
from memedge.integrations.families.z_image import ZImage

UNETS = Family()
FLOWS: dict[str, Family] = {
    "StableDiffusion3Pipeline": StableDiffusion3(),
    "FluxPipeline": Flux(),
    "QwenImagePipeline": QwenImage(),
    "ZImagePipeline": ZImage(),
}


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline by its class, or the one that it is made of; UNets' where it is none of them."""
    return next((FLOWS[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in FLOWS), UNETS)
