"""The γ that was released with the paper, by family of models (docs/methods.md §1)."""

from memedge.engine.manifest import PredictionType, Preset

FIRST, SECOND = Preset("Stable Diffusion 1.x", 1, 2), Preset("Stable Diffusion 2.x", 1, 0.1)
REALISTIC_VISION = Preset("Realistic Vision", 2, 1)
# By the width of the prompt embeddings, and by what the UNet predicts.
_ARCHITECTURES = {(768, "epsilon"): FIRST, (1024, "epsilon"): SECOND, (1024, "v_prediction"): SECOND}


def published(name: str, state_width: int, pooled_width: int, prediction_type: PredictionType) -> Preset | None:
    """Return the γ released for the family that a checkpoint belongs to, or None.

    Realistic Vision is known by its name alone, as its architecture is SD 1.5's; other fine-tuned models count as the
    model they were made from. Models with pooled embeddings, SDXL, were not among the published ones.
    """
    preset = None if pooled_width else _ARCHITECTURES.get((state_width, prediction_type))
    letters = "".join(filter(str.isalnum, name.lower()))
    return REALISTIC_VISION if preset is FIRST and "realisticvision" in letters else preset
