"""Verdicts that were given before, by token ids: prompts that the model cannot tell apart share one."""

from collections import OrderedDict
from dataclasses import replace

from memedge.decision.early import Early
from memedge.results import Verdict

Key = tuple[bytes, Early]  # token ids, and which passes may be left out


class VerdictCache:
    """The verdicts that were used last, at most `size` of them. For one thread."""

    def __init__(self, size: int):
        self._size = size
        self._verdicts: OrderedDict[Key, Verdict] = OrderedDict()

    def find(self, key: Key, prompt: str) -> Verdict | None:
        """Return the verdict for a prompt of these ids, which says where it comes from; or None."""
        found = self._verdicts.get(key)
        if found is None:
            return None
        self._verdicts.move_to_end(key)
        return replace(found, prompt=prompt, passes=0, reason=f"{found.reason}; from the cache")

    def keep(self, key: Key, verdict: Verdict) -> None:
        """Keep a verdict, and drop the one that was not used for longest."""
        self._verdicts[key] = verdict
        self._verdicts.move_to_end(key)
        if len(self._verdicts) > self._size:
            self._verdicts.popitem(last=False)
