"""Labels from an audit of the model itself (`memedge audit`): which captions' pictures it prints."""

from os import PathLike
from pathlib import Path

import msgspec

from memedge.engine.errors import InputError
from memedge.prompts.labelled import Prompts

REPORT = "report.json"  # in an audit's folder


class _Image(msgspec.Struct):
    caption: str | None
    by_audit: bool


class _Settings(msgspec.Struct):
    steps: int


class AuditLabels(msgspec.Struct):
    """What evaluating needs of an audit's report.json; all else in it is passed over."""

    checkpoint: str
    checkpoint_sha256: str
    similarity: str
    settings: _Settings
    images: list[_Image]

    @staticmethod
    def read(folder: str | PathLike[str]) -> "AuditLabels":
        """Read the folder that `memedge audit` made.

        Raises:
            InputError: it is none.
        """
        path = Path(folder) / REPORT
        try:
            return msgspec.json.decode(path.read_bytes(), type=AuditLabels)
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror}): name a folder that `memedge audit` made."
            ) from None
        except msgspec.DecodeError:
            raise InputError(f"{path} is no audit's report: name a folder that `memedge audit` made.") from None

    def prompts(self) -> tuple[Prompts, Prompts]:
        """Return the captions whose picture is printed, and those of which none is.

        Raises:
            InputError: there are none of a kind, because pictures had no captions, or all or none was printed.
        """
        printed = list(dict.fromkeys(one.caption for one in self.images if one.by_audit and one.caption))
        others = list(dict.fromkeys(one.caption for one in self.images if one.caption and one.caption not in printed))
        if not printed or not others:
            raise InputError(
                f"The audit of {self.checkpoint} has {len(printed)} captions whose pictures are printed and "
                f"{len(others)} others: audit some of both, with their captions."
            )
        return (
            Prompts.given(printed, "printed in the audit"),
            Prompts.given(others, "not printed in the audit"),
        )

    @property
    def caution(self) -> str:
        """How much the labels mean, in a sentence."""
        return (
            f"Labels are of an audit: printed within {self.settings.steps} steps, by {self.similarity}; with enough "
            "steps any picture is."
        )
