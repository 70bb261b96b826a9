"""The rival detectors, side by side on one engine (docs/methods.md §1 to §4)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, get_args

import numpy as np
import numpy.typing as npt

from memedge.detectors.anisotropy import Aligned, Anisotropy, Norm, alignment_name
from memedge.detectors.norm_guidance import NormOverGuidance
from memedge.detectors.norm_steps import NormOverSteps
from memedge.detectors.p_laplace import PLaplace
from memedge.detectors.sharpness import Sharpness
from memedge.engine.denoiser import Denoiser
from memedge.engine.engine import Engine
from memedge.engine.errors import InputError, not_installed
from memedge.engine.manifest import Alignment, Operands


class Statistic(Protocol):
    """One detector on one engine and some noise draws. Safe to call from several threads at once.

    Attributes:
        name: what it is called.
        formula: one line, with its source.
        passes: UNet evaluations per prompt and draw, without those that are done once per draw for all prompts.
    """

    name: str
    formula: str
    passes: float

    def __call__(self, prompts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return a value for each prompt and draw, float64 [B, draws], finite; higher where memorized.

        A prompt's score is the mean over its draws. Memory stays bounded whatever the number of prompts.

        Raises:
            InputError: something that is not text.
            NotFiniteError: the model produced NaN or infinity.
        """


_Make = Callable[[Engine, int, int | None], Statistic]


def _denoising(make: Callable[[Denoiser, int, int | None], Statistic]) -> _Make:
    return lambda engine, draws, seed: make(Denoiser(engine), draws, seed)


_ALIGNED: dict[str, _Make] = {
    alignment_name(alignment, operands): partial(Aligned, alignment=alignment, operands=operands)
    for operands in get_args(Operands)
    for alignment in get_args(Alignment)
}
_MAKERS: dict[str, _Make] = {
    "anisotropy": Anisotropy,
    "norm": Norm,
    "norm-10": _denoising(partial(NormOverSteps, count=10)),
    "norm-50": _denoising(partial(NormOverSteps, count=50)),
    NormOverGuidance.name: _denoising(NormOverGuidance),
    **_ALIGNED,
    "sharpness": _denoising(Sharpness),
    "p-laplace": _denoising(partial(PLaplace, with_prompt=True)),
    "p-laplace-image": _denoising(partial(PLaplace, with_prompt=False)),
}
_OF_FLOW = ("anisotropy", "norm", NormOverGuidance.name, *_ALIGNED)  # all others go by ᾱ
EXACT = "sharpness-exact"
NAMES: tuple[str, ...] = (*_MAKERS, EXACT)


def make(name: str, engine: Engine, draws: int, *, seed: int | None = None, checkpoint: str | None = None) -> Statistic:
    """Return the detector of that name on `draws` noise draws.

    Args:
        name: one of NAMES.
        engine: an opened engine. All detectors but anisotropy, norm and alignments on the engine's own draws need what
            Denoiser needs: provider cpu or cuda, and no int8.
        draws: at least 1.
        seed: of the noise. None: the engine's own draws first, then others from the engine's seed (Denoiser.noise).
        checkpoint: what the engine was exported from; "sharpness-exact" alone reads it.

    Raises:
        InputError: an unknown name; no draws; a detector that goes by ᾱ, for a flow-matching model; one that goes by
            the guidance scale that a model is told, for others; "sharpness-exact" without a checkpoint, or without
            torch.
        EngineError: the engine or its provider cannot do this.
        ExportError: the checkpoint cannot be read.
        NotFiniteError: the model produced NaN or infinity.
    """
    if name not in NAMES:
        raise InputError(f"There is no detector {name!r}: use one of {', '.join(NAMES)}.")
    if draws < 1:
        raise InputError(f"draws is {draws}: give at least 1.")
    if engine.directory.manifest.prediction_type == "flow" and name not in _OF_FLOW:
        raise InputError(
            f"Detector {name!r} goes by the ᾱ of a noise schedule, and {engine.directory.path} is of a flow-matching "
            f"model, which has none: use one of {', '.join(_OF_FLOW)}."
        )
    if name == EXACT:
        return _exact(engine, draws, seed, checkpoint)
    return _MAKERS[name](engine, draws, seed)


def _exact(engine: Engine, draws: int, seed: int | None, checkpoint: str | None) -> Statistic:
    if checkpoint is None:
        raise InputError(
            f"Detector {EXACT!r} differentiates the model itself: give --checkpoint, what the engine was exported from."
        )
    try:
        from memedge.detectors.sharpness_exact import ExactSharpness
    except ImportError as error:
        raise InputError(
            not_installed(f"Detector {EXACT!r}", error, "export", ", or use detector 'sharpness'")
        ) from None
    return ExactSharpness(engine, Denoiser(engine).noise(draws, seed), checkpoint)
