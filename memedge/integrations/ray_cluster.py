"""Batches of prompts scored by actors of a Ray cluster: `memedge score --ray`.

This process reads the prompts and keeps the results. An actor opens the engine once, and has two batches at most: one
that it scores, one that waits for it. What an actor had when it died goes to another. Actors are as many as the living
nodes have room for, looked at again and again, so nodes may go and come.
"""

import logging
import os
import pickle
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from memedge.detector import EngineInfo
from memedge.engine.errors import InputError, MemedgeError, not_installed, shown
from memedge.engine.machine import usable_processors
from memedge.engine.providers import PROVIDERS
from memedge.scoring.mapper import Batches, Mapper, Results
from memedge.scoring.workers import Scorer
from memedge.wording import counted

AHEAD = 2  # batches that an actor has
LOOK = 2.0  # seconds after which the cluster's nodes are counted again
PATIENCE = 60.0  # seconds without a node for an actor, or in which all of them die: nodes are replaced meanwhile
DEATHS = 4  # actors that a batch, or opening the engine, may end; machines that are taken away end fewer


@contextmanager
def on_ray(scorer: Scorer[EngineInfo], address: str | None = None) -> Iterator[Mapper]:
    """Yield a mapper whose batches the actors of a Ray cluster score; at the end they are gone.

    An actor takes a GPU where the engine's provider needs one, else as many CPUs as the engine has threads.

    Args:
        scorer: a detector of Detector.load, or what scores with one. It is pickled. Each node has memedge, and the
            engine at the same path.
        address: of a cluster, such as "auto" or "host:6379". None: the one that this process is connected to already,
            or else one on this machine for this run alone.

    Raises:
        MemedgeError: Ray is not installed.
        InputError: there is no cluster at the address, or it cannot be used from here; a detector made by hand.
    """
    try:
        import ray
    except ImportError:
        raise MemedgeError(not_installed("Scoring on Ray", "ray", "ray")) from None
    pickled = pickle.dumps(scorer)
    connected = ray.is_initialized()
    if connected and address is not None:
        raise InputError("This process is connected to a Ray cluster already: leave the address out, to use that one.")
    with ExitStack() as stack:
        if not connected:
            # Whatever log_to_driver is, what befalls nodes is printed on stdout, where results may go. Ray's own
            # debugger switches it off like this.
            ray._private.worker._worker_logs_enabled = False
            stack.callback(setattr, ray._private.worker, "_worker_logs_enabled", True)
            stack.callback(ray.shutdown)
            _connect(ray, address, scorer.info.threads)
        actors = _Actors(ray, pickled, _needs(scorer.info))
        stack.callback(actors.kill)
        yield actors.map


def _connect(ray: Any, address: str | None, threads: int) -> None:
    """Connect to the cluster at an address, or start one for `threads` or more; raises InputError."""
    if address is None:
        _quietly(ray, address="local", num_cpus=max(threads, usable_processors()), include_dashboard=False)
        return
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address  # as Ray does
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        _quietly(ray, address=address)
    except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(
            f"There is no Ray cluster at {address!r} that this process can use ({_reason(error)}): start one with "
            "`ray start --head` and give its address, or leave the address out for one on this machine."
        ) from error


def _quietly(ray: Any, **options: Any) -> None:
    """Connect without Ray's chatter, and leave SIGTERM as it was."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _needs(info: EngineInfo) -> dict[str, int]:
    """Return what an actor takes of a node."""
    return {"GPU": 1, "CPU": 1} if PROVIDERS[info.provider].on_gpu else {"CPU": info.threads}


class _Scorer:
    """What an actor runs. It opens the engine not when it is made: Ray would hide the error."""

    def __init__(self, pickled: bytes):
        self._pickled = pickled

    def open(self) -> None:
        self._scorer: Scorer[EngineInfo] = pickle.loads(self._pickled)

    def score(self, prompts: list[str]) -> Results:
        return self._scorer.score(prompts)


class _Actors:
    """The actors of a run."""

    def __init__(self, ray: Any, pickled: bytes, needs: dict[str, int]):
        self._ray = ray
        self._needs = needs
        self._pickled = pickled
        self._remote: Any = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_restarts=0)(_Scorer)
        self._opening: dict[Any, Any] = {}  # actors that open the engine, or wait for room, by what they answer then
        self._ready: list[Any] = []
        self._unopened = 0  # deaths while opening, in a row,
        self._failing = 0.0  # since when
        self._looked = -LOOK
        self._able = time.monotonic()  # when there last was an actor, or a node for one

    def kill(self) -> None:
        """End all actors."""
        for actor in (*self._ready, *self._opening.values()):
            self._drop(actor)

    def map(self, batches: Batches) -> Iterator[tuple[list[str], Results]]:
        """Do what a Mapper does.

        Raises:
            MemedgeError: there is no actor, and none can come; or they die again and again.
        """
        running: dict[Any, tuple[Any, list[str]]] = {}  # by what the actor answers
        returned: deque[list[str]] = deque()  # of actors that died
        deaths: Counter[int] = Counter()  # by batch, as long as it is not done
        while True:
            self._look()
            self._hand_out(batches, returned, running)
            if not running and self._ready:
                return  # there is no batch left
            done, _ = self._ray.wait([*running, *self._opening], timeout=LOOK)
            for answer in done:
                if answer in self._opening:
                    self._opened(answer)
                    continue
                actor, batch = running.pop(answer)
                try:
                    scores = self._ray.get(answer)
                except self._ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except self._ray.exceptions.RayError as error:
                    self._drop(actor)
                    returned.append(batch)
                    deaths[id(batch)] += 1
                    if deaths[id(batch)] == DEATHS:
                        raise _dying(f"{DEATHS} processes", "score the same prompts", error) from None
                else:
                    deaths.pop(id(batch), None)
                    yield batch, scores

    def _hand_out(
        self, batches: Batches, returned: deque[list[str]], running: dict[Any, tuple[Any, list[str]]]
    ) -> None:
        """Give each actor what it lacks, first one batch to each."""
        has = Counter(id(actor) for actor, _ in running.values())
        for count in range(AHEAD):
            for actor in self._ready:
                if has[id(actor)] <= count:
                    batch = returned.popleft() if returned else next(batches, None)
                    if batch is None:
                        return
                    running[actor.score.remote(batch)] = actor, batch
                    has[id(actor)] += 1

    def _look(self) -> None:
        """Count the nodes now and then, and have as many actors as they have room for, or one that waits for a node."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(int(min(node.get(what, 0) // count for what, count in self._needs.items())) for node in nodes)
        if room or self._ready:
            self._able = now
        elif now - self._able > PATIENCE:
            raise MemedgeError(
                f"No node of the Ray cluster has {self._wanted} for a process that scores: add a node, or use fewer "
                "--threads, then go on with --resume."
            )
        for _ in range(max(room, 1) - len(self._ready) - len(self._opening)):
            actor = self._remote.remote(self._pickled)
            self._opening[actor.open.remote()] = actor

    @property
    def _wanted(self) -> str:
        return " and ".join(counted(count, what) for what, count in self._needs.items())

    def _opened(self, answer: Any) -> None:
        """Take an actor that has opened the engine, or the reason why it has not."""
        actor = self._opening.pop(answer)
        try:
            self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            self._drop(actor)
            if isinstance(error.cause, MemedgeError):
                raise MemedgeError(f"A node of the Ray cluster cannot open the engine: {error.cause}") from None
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            self._drop(actor)
            self._failing = self._failing if self._unopened else time.monotonic()
            self._unopened += 1
            # On a node that died, actors may be started until the cluster notices.
            if self._unopened >= DEATHS and time.monotonic() - self._failing > PATIENCE:
                raise _dying(f"{self._unopened} processes", "open the engine", error) from None
        else:
            self._unopened = 0
            self._ready.append(actor)

    def _drop(self, actor: Any) -> None:
        """End an actor, which may be dead."""
        if actor in self._ready:
            self._ready.remove(actor)
        with suppress(Exception):  # whatever Ray says of one that is gone, or with the cluster
            self._ray.kill(actor)


def _dying(who: str, doing: str, error: Exception) -> MemedgeError:
    """Return the error of actors that die again and again."""
    return MemedgeError(
        f"{who} on the Ray cluster ended when they were to {doing} ({_reason(error)}): look for the "
        "reason in Ray's logs, then go on with --resume."
    )


def _reason(error: Exception) -> str:
    """Return what an error says, as part of a sentence."""
    return shown(" ".join(str(error).split()), 300).rstrip(".") or type(error).__name__
