"""Processes on this machine that score a job's batches, each with an engine of its own, and a GPU where there are some.

The job's own process reads, keeps the journal and writes; so there is one journal, and a worker that dies loses nothing
but time. Batches travel by pipes: a worker ends when its pipe does, whatever ended the job.
"""

import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Generic, Protocol, TypeVar, cast

from memedge.engine import probe
from memedge.engine.errors import InputError, MemedgeError
from memedge.scoring.mapper import Mapper, Results

LOG = logging.getLogger("memedge.scoring")
AHEAD = 2  # batches that a worker has: one that it scores, and the next
ON_PROCESSORS = ("cpu", "openvino")  # the providers that need no GPU
_VISIBLE = "CUDA_VISIBLE_DEVICES"

Info = TypeVar("Info")
Info_co = TypeVar("Info_co", covariant=True)


class Scorer(Protocol[Info_co]):
    """What scores batches, such as a detector."""

    @property
    def info(self) -> Info_co:
        """What runs."""
        ...

    def score(self, prompts: list[str], /) -> Results:
        """Return the results of prompts."""
        ...


@dataclass
class Team(Generic[Info]):
    """Workers that are ready: what they run, and the mapper that uses them."""

    info: Info
    mapper: Mapper


@dataclass(eq=False)
class _Worker:
    process: SpawnProcess
    pipe: Connection
    batches: deque[list[str]] = field(default_factory=deque)  # sent, and not answered yet

    def end(self) -> str:
        """End the process, and say how it ended if it had done so before."""
        self.process.join(timeout=5)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        self.pipe.close()
        return f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"


@contextmanager
def processes(open_scorer: Callable[[], Scorer[Info]], count: int, provider: str) -> Iterator[Team[Info]]:
    """Start workers, and yield them when each has opened its engine; at the end they are ended.

    Args:
        open_scorer: opens the engine where it is called; it is pickled.
        count: how many workers.
        provider: what was asked for. Each worker has a GPU to itself if it may run on one.

    Raises:
        InputError: more workers than GPUs.
        MemedgeError: what opening the engine raised, or a worker ended.
    """
    gpus = 0 if provider in ON_PROCESSORS else len(probe.driver().gpus)
    if gpus and count > gpus:
        raise InputError(f"There are {gpus} GPUs here, and each worker needs one: give --workers {gpus} at most.")
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        for index in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, open_scorer), daemon=True)
            with _one_gpu(index if gpus else None):
                process.start()
            theirs.close()
            workers.append(_Worker(process, ours))
        infos = [cast(Info, _opened(worker)) for worker in workers]
        yield Team(infos[0], partial(_map, workers))
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.end()


def _map(workers: list[_Worker], batches: Iterator[list[str]]) -> Iterator[tuple[list[str], Results]]:
    returned: deque[list[str]] = deque()  # of workers that died
    while True:
        for worker in list(workers):
            while worker in workers and len(worker.batches) < AHEAD:
                batch = returned.popleft() if returned else next(batches, None)
                if batch is None:
                    break
                worker.batches.append(batch)
                try:
                    worker.pipe.send(batch)
                except OSError:
                    _bury(worker, workers, returned)
        busy = {worker.pipe: worker for worker in workers if worker.batches}
        if not busy:
            if not returned:
                return
            continue
        for pipe in wait(list(busy)):
            worker = busy[cast(Connection, pipe)]
            try:
                answer = worker.pipe.recv()
            except (EOFError, OSError):
                _bury(worker, workers, returned)
                continue
            if isinstance(answer, BaseException):
                raise answer
            yield worker.batches.popleft(), answer


def _bury(worker: _Worker, workers: list[_Worker], returned: deque[list[str]]) -> None:
    """Give a dead worker's batches to the others; raises MemedgeError if there are none."""
    workers.remove(worker)
    how = worker.end()
    if not workers:
        raise MemedgeError(
            f"The last worker process ended {how}: go on with --resume, and with fewer --workers if memory ran out."
        )
    LOG.warning("A worker process ended %s: the others go on with its prompts.", how)
    returned.extend(worker.batches)


def _opened(worker: _Worker) -> object:
    try:
        answer: object = worker.pipe.recv()
    except (EOFError, OSError):
        raise MemedgeError(
            f"A worker process ended {worker.end()} while it opened the engine: give fewer --workers if memory ran out."
        ) from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _work(pipe: Connection, open_scorer: Callable[[], Scorer[object]]) -> None:
    """Answer batches until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the job ends its workers itself
    try:
        scorer = open_scorer()
        answer: object = scorer.info
    except Exception as error:
        answer = error
    while True:
        try:
            _answer(pipe, answer)
            batch = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = scorer.score(batch)
        except Exception as error:
            answer = error


def _answer(pipe: Connection, answer: object) -> None:
    try:
        pipe.send(answer)
    except (TypeError, AttributeError, ValueError) as error:  # an error of a library's that cannot be pickled
        pipe.send(MemedgeError(f"Scoring failed ({type(answer).__name__}: {answer}; {error})."))


@contextmanager
def _one_gpu(index: int | None) -> Iterator[None]:
    """Let a process that is started now see one of this process's GPUs alone."""
    before = os.environ.get(_VISIBLE)
    if index is None:
        yield
        return
    os.environ[_VISIBLE] = before.split(",")[index] if before else str(index)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VISIBLE]
        else:
            os.environ[_VISIBLE] = before
