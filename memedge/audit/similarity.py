"""How similar two pictures are: whether a generation is a copy of a training picture."""

import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from memedge.audit.outlines import outlines
from memedge.autograd.diffusion_model import Pictures
from memedge.engine.errors import InputError

SSCD_SIDE = 288  # pixels: what the authors resize to
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which it was trained with
ROWS = 64  # pictures at once


class Similarity(Protocol):
    """The similarity of two pictures is the cosine of their descriptors.

    Attributes:
        name: for people.
        copy: from this similarity on, one is a copy of the other.
    """

    name: str
    copy: float

    def descriptors(self, pictures: Pictures) -> torch.Tensor:
        """Return unit vectors, float32 [N, D], of uint8 pictures [N, S, S, 3]."""


class Outlines:
    """The stand-in where SSCD's weights are not at hand: the same edges at the same places (memedge/audit/outlines.py).

    It was compared with people's judgement on small drawings on plain grounds alone (bench/tiny/judge.py); it neither
    sees a copy that is moved or mirrored, nor was it ever tried on photographs.
    """

    name = "outlines"
    copy = 0.8

    def descriptors(self, pictures: Pictures) -> torch.Tensor:
        return outlines(pictures)


class SSCD:
    """The copy detector that papers on memorization measure with (Pizzi et al., CVPR 2022).

    Examples:
        >>> from memedge.audit import SSCD
        >>> similarity = SSCD("sscd_disc_mixup.torchscript.pt", "cuda")  # the authors' file
    """

    name = "SSCD"
    copy = 0.7

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        """Load the authors' TorchScript file. TorchScript is a program: take it from them alone.

        Raises:
            InputError: the file cannot be read as TorchScript.
        """
        self._device = torch.device(device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, which the authors' file is
                self._model: Any = torch.jit.load(str(path), map_location=self._device).eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{path} cannot be read as TorchScript ({reason}): give SSCD's sscd_disc_mixup.torchscript.pt."
            ) from None

    @torch.no_grad()
    def descriptors(self, pictures: Pictures) -> torch.Tensor:
        mean, deviation = (torch.tensor(values, device=self._device)[:, None, None] for values in (MEAN, DEVIATION))
        found = []
        for part in torch.split(torch.from_numpy(pictures), ROWS):
            values = part.to(self._device).permute(0, 3, 1, 2).float() / 255
            size = [SSCD_SIDE, SSCD_SIDE]
            values = F.interpolate(values, size, mode="bilinear", antialias=True, align_corners=False)
            found.append(self._model((values - mean) / deviation).float())
        return F.normalize(torch.cat(found)).cpu()


def similarity_of(sscd: str | Path | None, device: torch.device | str) -> Similarity:
    """Return SSCD of a file, or the stand-in."""
    return Outlines() if sscd is None else SSCD(sscd, device)
