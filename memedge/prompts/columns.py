"""Which columns of a prompt file are read: the prompts', and those that are kept beside them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memedge.engine.errors import InputError, shown

PROMPT_NAMES = ("prompt", "caption", "text")  # in any case of letters
RENAME = "call one of them 'prompt'"


@dataclass(frozen=True)
class Columns:
    """What is read of each row.

    Attributes:
        prompt: the column of the prompts; None: the one named `prompt`, or else the only one named prompt, caption or
            text in any case of letters.
        kept: the columns that are read beside it; None: all others.
        remedy: what to do about a file whose prompts are not found.
        given: columns that names of folders give; a file must not have them too.
    """

    prompt: str | None = None
    kept: tuple[str, ...] | None = ()
    remedy: str = RENAME
    given: tuple[str, ...] = ()

    def prompt_of(self, place: str, names: Sequence[str]) -> str:
        """Return the column of the prompts among those of a file or a row.

        Raises:
            InputError: there is none, or more than one may be it.
        """
        if self.prompt is not None:
            found = [name for name in names if name == self.prompt]
        else:
            found = [name for name in names if name == "prompt"]
            found = found or [name for name in names if name.lower() in PROMPT_NAMES]
        if len(found) == 1:
            return found[0]
        if found:
            what = "the same name" if len(set(found)) == 1 else "such names"
            raise InputError(f"{place} has {len(found)} columns of {what}, {listed(found)}: {self.remedy}.")
        wanted = repr(self.prompt) if self.prompt is not None else "'prompt', 'caption' or 'text'"
        raise InputError(f"{place} has no column {wanted}, only {listed(names)}: {self.remedy}.")

    def kept_of(self, place: str, names: Sequence[str], prompt: str) -> list[str]:
        """Return the columns of a file that are kept.

        Raises:
            InputError: one of them is not there, or there twice; or a folder's name gives one that is there.
        """
        self.check_given(place, names)
        kept = [name for name in names if name != prompt] if self.kept is None else list(self.kept)
        for name in kept:
            if names.count(name) != 1:
                has = "no column" if name not in names else "more than one column"
                raise InputError(f"{place} has {has} {shown(name)!r} to keep, but {listed(names)}: correct --keep.")
        return kept

    def check_given(self, place: str, names: Iterable[str]) -> None:
        """Raise InputError if a file or a row has a column that a folder's name gives."""
        if self.given and (twice := [name for name in names if name in self.given]):
            raise InputError(
                f"{place} has a column {shown(twice[0])!r}, and lies in a folder {shown(twice[0])}=...: rename one of "
                "them, or leave it out with --keep none or --keep and the names of others."
            )


def listed(names: Iterable[str]) -> str:
    """Return names for an error message, cut where they would make the sentence too long."""
    text = ", ".join(map(repr, names)) or "none"
    return text if len(text) <= 200 else text[:200] + "..."
