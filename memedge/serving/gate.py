"""The gate: many threads and coroutines ask for verdicts, and the UNet sees batches.

One thread runs the engine, so nothing waits for anything but work. The next batch is whatever waits. Nobody who comes
to an idle gate is delayed. While it works, it gives those whom it has just answered a moment to come back, a twentieth
of a call: without it, calls are three quarters full where callers wait for an answer before they ask again. Admission
is outside the queue, and so the queue cannot grow by surprise. Prompts that are still open after their first pass go on
while new ones join them.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import TracebackType

import numpy as np

from memedge.decision.early import Early, check_early
from memedge.detector import Detector
from memedge.engine.arrays import Indices
from memedge.engine.errors import InputError, MemedgeError
from memedge.prompts.text import checked_prompts
from memedge.results import Verdict
from memedge.serving.cache import VerdictCache
from memedge.serving.cohort import Cohort
from memedge.serving.errors import ClosedError, DeadlineError, OverloadedError, TooLargeError
from memedge.serving.jobs import Answer, Job, Waiter
from memedge.serving.pace import Pace

PROMPTS = 1024  # that may wait, where nobody says otherwise
BYTES = 16 << 20  # of their text
_LATE = "The deadline passed before the verdict was there: allow more time, or send fewer prompts at a time."
WARM_PROMPTS = 64  # measured at warm-up
MOMENT = 0.05  # of a round


@dataclass(frozen=True)
class Round:
    """One call of the UNet, for whoever counts.

    Attributes:
        rows: UNet rows (prompt × timestep × draw).
        prompts: whose rows they were.
        seconds: what the round took, tokenizer and text encoder included.
        waited: seconds that each prompt which was admitted in it had waited.
        queued: prompts that wait now.
    """

    rows: int
    prompts: int
    seconds: float
    waited: tuple[float, ...]
    queued: int


class Gate:
    """Gives verdicts to many callers at once, in batches. They are those of `Detector.detect`.

    `memorized` is the same; norm and score are equal but for what another batch's shape rounds (engine/precision.py).
    Any number of threads and event loops may call any method. A gate has one thread of its own, until it is closed.

    Examples:
        >>> from memedge import Detector, Gate
        >>> with Gate(Detector.load(provider="cpu")) as gate:
        ...     gate.detect("the left luggage sign").memorized
        True
    """

    def __init__(
        self,
        detector: Detector,
        *,
        most_prompts: int | None = None,
        most_bytes: int = BYTES,
        cache: int = 0,
        observe: Callable[[Round], None] | None = None,
    ):
        """Start the gate's thread.

        Args:
            detector: gives the verdicts; others may go on using it.
            most_prompts: that may be in the gate at once, waiting or on their way; more are refused at once. Default:
                1024, or after `warmup(seconds)` what the engine does in so many.
            most_bytes: of their text in UTF-8, likewise.
            cache: how many verdicts are kept for prompts of the same tokens, which then cost no pass; their reasons say
                so. 0: none.
            observe: is called by the gate's thread after each call of the UNet.

        Raises:
            InputError: a limit that is not positive, or a cache of less than nothing.
        """
        if not isinstance(detector, Detector):
            raise InputError(f"Gate takes a Detector, not {type(detector).__name__}: make one with Detector.load.")
        for name, value, least in (
            ("most_prompts", most_prompts, 1),
            ("most_bytes", most_bytes, 1),
            ("cache", cache, 0),
        ):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise InputError(f"{name} is {value!r}: give a whole number of at least {least}.")
        self._detector, self._engine = detector, detector.engine
        self._most_prompts, self._most_bytes = most_prompts or PROMPTS, most_bytes
        self._measured = most_prompts is None
        self._cache = VerdictCache(cache) if cache else None
        self._observe = observe
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._in_flight: dict[tuple[str, Early], Job] = {}
        self._prompts = self._bytes = 0  # in the gate
        self._closed = False
        self._pace = Pace()
        self._verdicts = self._screened = 0  # of the round that runs
        self._thread = threading.Thread(target=self._run, name="memedge-gate", daemon=True)
        self._thread.start()

    @property
    def detector(self) -> Detector:
        """The detector whose verdicts these are."""
        return self._detector

    @property
    def most_prompts(self) -> int:
        """How many prompts may be in the gate at once."""
        return self._most_prompts

    @property
    def queued(self) -> int:
        """How many prompts are in the gate now."""
        return self._prompts

    def detect(self, prompt: str, early: Early = "proven", *, timeout: float | None = None) -> Verdict:
        """Return the verdict on one prompt, from any thread.

        Args:
            prompt: the prompt.
            early: as in `Detector.detect`.
            timeout: seconds after which the answer is of no use any more; None: never.

        Raises:
            OverloadedError: the gate is full, or who waits there takes longer than `timeout`; its `retry_after` says
                when to try again.
            DeadlineError: the time was over first.
            ClosedError: the gate is closed.
            InputError, NotFiniteError: as in `Detector.detect`.
        """
        return self.detect_all([prompt], early, timeout=timeout)[0]

    async def adetect(self, prompt: str, early: Early = "proven", *, timeout: float | None = None) -> Verdict:
        """Return the verdict on one prompt, from any coroutine; as `detect`. What is cancelled is not computed."""
        return (await self.adetect_all([prompt], early, timeout=timeout))[0]

    def detect_all(
        self, prompts: Sequence[str], early: Early = "proven", *, timeout: float | None = None
    ) -> list[Verdict]:
        """Return a verdict per prompt; as `detect`. All are admitted, or none."""
        answers, deadline = self._admit(prompts, early, timeout)
        try:
            return [answer.result(_left(deadline)) for answer in answers]
        except TimeoutError:
            raise DeadlineError(_LATE) from None
        finally:
            _cancel(answers)

    async def adetect_all(
        self, prompts: Sequence[str], early: Early = "proven", *, timeout: float | None = None
    ) -> list[Verdict]:
        """Return a verdict per prompt; as `adetect`. All are admitted, or none."""
        answers, deadline = self._admit(prompts, early, timeout)
        try:
            async with asyncio.timeout(_left(deadline)):
                return [await asyncio.wrap_future(answer) for answer in answers]
        except TimeoutError:
            raise DeadlineError(_LATE) from None
        finally:
            _cancel(answers)

    def warmup(self, seconds: float = 10.0) -> float:
        """Run batches as they will come, and measure; return prompts per second.

        From then on the gate takes what the engine does in so many seconds, unless `most_prompts` was given.

        Args:
            seconds: of work that may wait.
        """
        self._engine.backend.prepare()
        self._engine.backend.record(self._engine.rows_per_call)
        rows, most = self._engine.rows_per_call, min(WARM_PROMPTS, self._most_prompts)
        for size in dict.fromkeys((1, min(most, rows), most)):
            prompts = [f"warm up {size} {place}" for place in range(size)]
            self.detect_all(prompts)
            if self._detector.info.rule.screens:
                self.detect_all(prompts, "screen")
        start = time.perf_counter()
        self.detect_all([f"measured {place}" for place in range(most)], "off")
        speed = most / (time.perf_counter() - start)
        self._pace.measured(speed)
        if self._measured:
            self._most_prompts = max(1, round(speed * seconds))
        return speed

    def close(self, timeout: float | None = None) -> bool:
        """Take nothing more, finish what is in the gate, and end the thread; return whether it ended in time.

        Args:
            timeout: seconds to wait; after them, what is left gets a ClosedError.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                left, self._waiting = list(self._waiting), deque()
            for job in left:
                self._leave(job, ClosedError("The gate was closed before this prompt's turn: ask another one."))
            return False
        return True

    def __enter__(self) -> "Gate":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _admit(self, prompts: Sequence[str], early: Early, timeout: float | None) -> tuple[list[Answer], float]:
        """Queue the prompts, or refuse them all; return their answers and their deadline."""
        info = self._detector.info
        check_early(info.rule, early, info.path, info.key)
        texts = list(checked_prompts(prompts))
        if not texts:
            raise InputError("There are no prompts to judge: give at least one.")
        if timeout is not None and not timeout > 0:
            raise DeadlineError(f"The time was over before the prompt was asked for (timeout {timeout:g} s).")
        size = sum(len(text.encode()) for text in texts)
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with self._changed:
            if self._closed:
                raise ClosedError("The gate is closed: ask another one.")
            if self._prompts + len(texts) > self._most_prompts or self._bytes + size > self._most_bytes:
                raise self._overloaded(len(texts), size)
            # Who cannot be in time is told so at once. Behind nobody, it is tried.
            if timeout is not None and self._prompts and self._pace.wait(self._prompts + len(texts)) > timeout:
                raise self._too_slow(timeout)
            answers: list[Answer] = []
            for text in texts:
                waiter = Waiter(Future(), deadline)
                answers.append(waiter.answer)
                if job := self._in_flight.get((text, early)):
                    job.waiters.append(waiter)
                    continue
                job = self._in_flight[text, early] = Job(text, early, [waiter])
                self._waiting.append(job)
                self._prompts += 1
                self._bytes += len(text.encode())
            self._changed.notify_all()
        return answers, deadline

    def _overloaded(self, prompts: int, size: int) -> MemedgeError:
        if prompts > self._most_prompts or size > self._most_bytes:
            return TooLargeError(
                f"{prompts} prompts of {size} bytes are more than the gate ever takes, {self._most_prompts} and "
                f"{self._most_bytes}: send fewer at a time."
            )
        wait = self._pace.wait(self._prompts) or 1.0
        return OverloadedError(
            f"{self._prompts} prompts wait, and the gate takes {self._most_prompts}: try again in {wait:.1f} s.",
            wait,
        )

    def _too_slow(self, timeout: float) -> OverloadedError:
        wait = self._pace.wait(self._prompts)
        return OverloadedError(
            f"{self._prompts} prompts wait, which takes {wait:.1f} s, and there are {timeout:g} s: allow more time, or "
            "try again later.",
            max(0.0, wait - timeout),
        )

    def _run(self) -> None:
        """Serve until closed. Whatever ends the thread otherwise, nobody is left waiting."""
        cohorts: list[Cohort] = []
        try:
            self._serve(cohorts)
        except BaseException as error:
            with self._changed:
                self._closed = True
                left, self._waiting = [*self._waiting], deque()
            for job in [*left, *(job for cohort in cohorts for job in cohort.give_up())]:
                self._leave(job, ClosedError(f"The gate broke ({type(error).__name__}: {error}): open another one."))
            raise

    def _serve(self, cohorts: list[Cohort]) -> None:
        seconds = 0.0  # of the last round
        while True:
            with self._changed:
                rows = sum(len(cohort.row) for cohort in cohorts)
                if self._waiting or cohorts:
                    if self._verdicts:  # who was answered may come back: a fuller call is worth a moment
                        self._changed.wait_for(partial(self._is_full, rows), MOMENT * seconds)
                else:
                    self._changed.wait_for(lambda: self._waiting or self._closed)
                    if not self._waiting:
                        return
                jobs = self._next(rows)
            start = time.monotonic()
            waited = [job.turn - job.waiters[0].since for job in jobs]
            self._verdicts = self._screened = 0
            cohorts += self._begin(jobs)
            rows, prompts = self._round(cohorts)
            cohorts[:] = [cohort for cohort in cohorts if len(cohort.row)]
            if not rows and not self._screened:
                continue
            seconds = time.monotonic() - start
            if self._waiting:
                self._pace.took(self._verdicts, seconds)
            if self._observe:
                self._observe(Round(rows, prompts, seconds, tuple(waited), self._prompts))

    def _is_full(self, taken: int) -> bool:
        most = self._engine.rows_per_call
        return self._closed or taken + sum(map(self._rows, islice(self._waiting, most))) >= most

    def _rows(self, job: Job) -> int:
        """Return how many rows a job's first call has."""
        return self._engine.passes if job.early == "off" else self._engine.draws

    def _next(self, taken: int) -> list[Job]:
        """Take as many jobs as their rows have room beside those `taken`; one at least, if nothing is taken."""
        jobs: list[Job] = []
        now = time.monotonic()
        soonest = now + self._pace.turn  # what is begun too late to be in time is work for nothing
        room = self._engine.rows_per_call - taken
        while self._waiting:
            job = self._waiting[0]
            rows = self._rows(job)
            if rows > room and (jobs or taken):
                break
            self._waiting.popleft()
            if not any(True for _ in job.waiting(soonest)):
                self._forget(job)
                job.fail(DeadlineError(_LATE))
                continue
            job.turn = now
            jobs.append(job)
            room -= rows
        return jobs

    def _begin(self, jobs: list[Job]) -> list[Cohort]:
        """Return the jobs as cohorts, one for each way of leaving passes out; what the cache knows is answered."""
        info, cohorts = self._detector.info, []
        if not jobs:
            return []
        try:
            ids, truncated = self._engine.tokenize([job.prompt for job in jobs])
        except Exception as error:
            for job in jobs:
                self._leave(job, error)
            return []
        for early in dict.fromkeys(job.early for job in jobs):
            rows = [row for row, job in enumerate(jobs) if job.early == early and not self._known(job, ids[row])]
            if not rows:
                continue
            some = [jobs[row] for row in rows]
            try:
                cohort = Cohort(self._engine, info.rule, info.key, some, ids[rows], truncated[rows])
            except Exception as error:
                for job in some:
                    self._leave(job, error)
                continue
            for job, result in cohort.screened:
                self._leave(job, result)
            self._screened += len(cohort.screened)
            cohorts += [cohort] if len(cohort.row) else []
        return cohorts

    def _known(self, job: Job, ids: Indices) -> bool:
        """Answer a job from the cache, if there is one that knows; return whether it did."""
        if self._cache is None:
            return False
        job.ids = ids.tobytes()
        found = self._cache.find((job.ids, job.early), job.prompt)
        if found is not None:
            self._leave(job, found)
        return found is not None

    def _round(self, cohorts: list[Cohort]) -> tuple[int, int]:
        """Run the rows that the cohorts need next, together; return how many rows and prompts that were."""
        if not cohorts:
            return 0, 0
        first = np.cumsum([0, *(len(cohort.states) for cohort in cohorts)])
        prompt = np.concatenate([cohort.prompt + start for cohort, start in zip(cohorts, first, strict=False)])
        row = np.concatenate([cohort.row for cohort in cohorts])
        try:
            states = self._engine.backend.memory.upload(np.concatenate([cohort.states for cohort in cohorts]))
            found = self._engine.measure(states, prompt, row, self._detector.info.rule.operands)
            ends = np.cumsum([len(cohort.row) for cohort in cohorts])[:-1]
            for cohort, part in zip(cohorts, np.split(found, ends, axis=1), strict=True):
                for job, result in cohort.take(part):
                    self._leave(job, result)
        except Exception as error:
            for cohort in cohorts:
                for job in cohort.give_up():
                    self._leave(job, error)
        return len(row), len(np.unique(prompt))

    def _leave(self, job: Job, result: Verdict | BaseException) -> None:
        """Answer a job, and make room for another."""
        with self._changed:
            self._forget(job)
        if isinstance(result, BaseException):
            job.fail(result)
            return
        self._verdicts += 1
        if result.passes:
            self._pace.had_its_turn(time.monotonic() - job.turn)
            if self._cache is not None:
                self._cache.keep((job.ids, job.early), result)
        job.settle(result)

    def _forget(self, job: Job) -> None:
        if self._in_flight.pop((job.prompt, job.early), None):
            self._prompts -= 1
            self._bytes -= len(job.prompt.encode())


def _left(deadline: float) -> float | None:
    """Return the seconds until a deadline, or None if there is none."""
    return None if deadline == math.inf else max(0.0, deadline - time.monotonic())


def _cancel(answers: list[Answer]) -> None:
    """Tell the gate that nobody waits any more for what is not there yet."""
    for answer in answers:
        answer.cancel()
