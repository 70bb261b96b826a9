"""The γ that was released with the paper: for which kinds of models (docs/methods.md §1)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from memedge.engine.manifest import PredictionType, Preset
from memedge.export.sources.traits import DISTILLED


@dataclass(frozen=True)
class Published:
    """A γ, and the models of a family that it was published for.

    Fine-tuned models count as the model they were made from, but for those that are known by their names.

    Attributes:
        preset: γ.
        state_width: the width of the models' prompt embeddings.
        predictions: what their UNets predict: one of these.
        name: what a checkpoint's name has to hold, in small letters and digits; "" where all names will do.
    """

    preset: Preset
    state_width: int
    predictions: tuple[PredictionType, ...]
    name: str = ""


# The first that fits is a checkpoint's: Realistic Vision's architecture is SD 1.5's.
OF_STABLE_DIFFUSION = (
    Published(Preset("Realistic Vision", 2, 1), 768, ("epsilon",), "realisticvision"),
    Published(Preset("Stable Diffusion 1.x", 1, 2), 768, ("epsilon",)),
    Published(Preset("Stable Diffusion 2.x", 1, 0.1), 1024, ("epsilon", "v_prediction")),
)


# What names say that models were distilled to few steps by, and LoRAs that do it.
STUDENTS = re.compile(r"turbo|lightning|(?<![a-z])(lcm|tcd|pcm|dmd|hyper)(?![a-z])", re.IGNORECASE)


def student_by(name: str, scheduler: object, guidance: float | None) -> str | None:
    """Return by what a checkpoint is known to be distilled to few steps; None: it isn't.

    Students memorize otherwise than their teachers, of which γ was published.

    Args:
        name: the checkpoint's, with those of the LoRAs that were fused into it.
        scheduler: the class of its scheduler.
        guidance: the scale that it is told, if it is.
    """
    if guidance is not None:
        return "its guidance embedding"
    if scheduler in DISTILLED:
        return f"its {scheduler}"
    found = STUDENTS.search(name)
    return f"{found[0]!r} in its name" if found else None


def preset_of(
    published: Iterable[Published], name: str, state_width: int, prediction_type: PredictionType
) -> Preset | None:
    """Return the γ published for a checkpoint, or None."""
    letters = "".join(filter(str.isalnum, name.lower()))
    for one in published:
        if one.state_width == state_width and prediction_type in one.predictions and one.name in letters:
            return one.preset
    return None
