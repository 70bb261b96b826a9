"""What an audit works on, read and checked."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import msgspec
import torch
from accelerate import PartialState

from memedge.audit.figures import AuditedImage, AuditSettings
from memedge.audit.pairs import read_all, read_pairs, unlisted
from memedge.audit.picture import PictureAudit
from memedge.audit.similarity import Outlines, similarity_of
from memedge.autograd.diffusion_model import DiffusionModel
from memedge.engine.errors import InputError
from memedge.wording import counted

Told = Callable[[str], None]


class AuditJob:
    """The pictures, the model and how they are audited.

    Attributes:
        pairs: pictures and captions.
        similarity: how copies are told.
        model: the checkpoint.
        of_picture: audits one of them.
    """

    def __init__(
        self,
        checkpoint: str,
        images: Path,
        captions: Path | None,
        settings: AuditSettings,
        sscd: str | Path | None,
        state: PartialState,
        told: Told,
    ):
        """Read everything, each picture once: a damaged one is to be found before hours of work.

        Raises:
            InputError, ExportError: as `audit`.
        """
        self.pairs = read_pairs(images, captions)
        device = state.device
        self.similarity = similarity_of(sscd, device)
        self.model = DiffusionModel(checkpoint, device, told)
        self.of_picture = PictureAudit(self.model, self.similarity, settings)
        self._settings, self._processes = settings, state.num_processes
        self._digest, self._changed = read_all(self.pairs, self.model.side)
        self._unlisted = unlisted(images, self.pairs)

    def header(self) -> dict[str, str]:
        """Return what the journal knows this job by."""
        return {
            "checkpoint": self.model.sha256,
            "pairs": self._digest,
            "settings": msgspec.json.encode(asdict(self._settings)).decode(),
            "similarity": self.similarity.name,
            "processes": str(self._processes),
        }

    def cautions(self, results: Sequence[AuditedImage]) -> list[str]:
        """Return what makes the figures mean less than they seem to, in sentences."""
        found = []
        if isinstance(self.similarity, Outlines):
            found.append(
                "Copies were told by outlines, a stand-in that was tested on small drawings alone: for photographs "
                "give SSCD's weights with --sscd."
            )
        if not any(one.memorized is False for one in results):
            found.append(
                "No picture is known not to be memorized: enough steps print any picture, so give some as controls "
                "(memorized: false), and see how few steps print those."
            )
        if self._changed:
            found.append(
                f"{counted(self._changed, 'picture')} had another size than {self.model.side} × {self.model.side} "
                "pixels: scaled and cut about the centre."
            )
        if self._unlisted:
            found.append(f"{counted(self._unlisted, 'picture')} of the folder stand in no row of the captions' file.")
        return found


def check_settings(settings: AuditSettings) -> None:
    """Raise InputError if a number is none that can be."""
    for name in ("steps", "generations", "inference_steps", "rows"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name} is {getattr(settings, name)}: give a whole number from 1 on.")


@contextmanager
def memory(settings: AuditSettings) -> Iterator[None]:
    """Turn a GPU's full memory into a sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise InputError(
            f"The GPU's memory is too small for {settings.rows} rows at once: give a smaller --batch-size."
        ) from None
