"""What waits in a gate: a prompt, and everyone who asked for its verdict."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from memedge.decision.early import Early
from memedge.results import Verdict

Answer = Future[Verdict]


@dataclass
class Waiter:
    """Someone who asked.

    Attributes:
        answer: what they wait for; cancelled if they went away.
        deadline: on `time.monotonic`'s clock; infinity: they wait for ever.
        since: when they asked.
    """

    answer: Answer
    deadline: float
    since: float = field(default_factory=time.monotonic)

    def is_gone(self, now: float) -> bool:
        """Return whether nobody would read the answer any more."""
        return self.answer.done() or now >= self.deadline


@dataclass
class Job:
    """A prompt on its way.

    Attributes:
        prompt: the prompt.
        early: which passes may be left out.
        waiters: who asked for it: more than one, if identical prompts were in flight.
        ids: its token ids' bytes, once it is tokenized, where there is a cache.
        turn: when its turn came, on `time.monotonic`'s clock.
    """

    prompt: str
    early: Early
    waiters: list[Waiter]
    ids: bytes = b""
    turn: float = 0.0

    def waiting(self, now: float) -> Iterator[Waiter]:
        """Yield who still waits."""
        return (waiter for waiter in self.waiters if not waiter.is_gone(now))

    def settle(self, verdict: Verdict) -> None:
        """Give everyone the verdict who is still there."""
        for waiter in self.waiters:
            if waiter.answer.set_running_or_notify_cancel():
                waiter.answer.set_result(verdict)

    def fail(self, error: BaseException) -> None:
        """Give everyone the error who is still there."""
        for waiter in self.waiters:
            if not waiter.answer.done() and waiter.answer.set_running_or_notify_cancel():
                waiter.answer.set_exception(error)
