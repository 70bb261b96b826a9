"""Which rows of an input one of N jobs scores, without the jobs knowing of each other."""

import hashlib
import re
from dataclasses import dataclass

from memedge.engine.errors import InputError, shown

MOST = 100_000


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 1. A row belongs to the part that its prompt's text says.

    So equal prompts meet in one part, whatever the files they stand in.
    """

    index: int
    count: int

    @staticmethod
    def parse(text: str) -> "Shard":
        """Return the shard of a text such as "3/16".

        Raises:
            InputError: it is something else.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
        shard = Shard(*map(int, match.groups())) if match else Shard(0, 0)
        if not 1 <= shard.index <= shard.count <= MOST:
            raise InputError(
                f"{shown(text)} is no shard: give I/N with I from 1 to N and N up to {MOST}, such as 3/16."
            )
        return shard

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, prompt: str) -> bool:
        """Return whether a prompt belongs here."""
        digest = hashlib.sha256(prompt.encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1
