"""Running the application: uvicorn, signals, a bound on how long a request's head may take, and several processes."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Generator
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from memedge.engine.errors import InputError, MemedgeError
from memedge.server import logs
from memedge.server.app import make_app
from memedge.server.meters import Meters
from memedge.server.settings import Settings
from memedge.server.state import State

LOG = logging.getLogger("memedge.server")
HEAD_SECONDS = 10.0  # at most, that a request's head may take: half-open connections hold a descriptor each
KEEP_ALIVE_SECONDS = 75
# A thread that wants the interpreter waits so long for another, at most. The gate's wants it several times a call of
# the UNet: by Python's own 5 ms a busy event loop would cost it half of its speed.
SWITCH_SECONDS = 0.0005
BACKLOG = 2048


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections on which no request has begun in time, as slow or half-open ones."""

    head_seconds = HEAD_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head = self.loop.call_later(self.head_seconds, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.cancel()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.cycle is None:
            self.transport.close()


class Server(uvicorn.Server):
    """Ends with 0 after SIGTERM or SIGINT, once what is under way is done; SIGHUP opens the engine again."""

    state: State

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._tasks.add(loop.create_task(self._reload())))
        self._tasks: set[asyncio.Task[None]] = set()
        yield
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)

    async def _reload(self) -> None:
        try:
            await self.state.reload()
        except MemedgeError as error:
            LOG.error("the engine was not opened again, and the old one goes on: %s", error)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raises InputError where that cannot be."""
    found = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        if found is not None:
            found.close()
        raise InputError(f"Cannot listen on {host}, port {port} ({error.strerror or error}): name another.") from None
    found.set_inheritable(True)
    return found


def serve(settings: Settings, where: socket.socket, workers: int = 1) -> int:
    """Serve until a signal; return the exit code."""
    if workers == 1:
        return _serve(settings, where, Meters(), alone=True)
    with tempfile.TemporaryDirectory(prefix="memedge-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # before Prometheus' client is imported in the workers
        return _serve_many(settings, where, workers)


def _serve(settings: Settings, where: socket.socket, meters: Meters, *, alone: bool) -> int:
    app = make_app(settings, meters)
    protocol = type("Protocol", (BoundedProtocol,), {"head_seconds": min(HEAD_SECONDS, settings.timeout)})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=round(settings.drain_seconds),
    )
    sys.setswitchinterval(SWITCH_SECONDS)
    server = Server(config)
    server.state = app.state.memedge
    asyncio.run(_until_ended(server, where, alone=alone))
    return 0


async def _until_ended(server: Server, where: socket.socket, *, alone: bool) -> None:
    """Serve, and open the engine meanwhile: the process lives before it is ready. One of several is ready first.

    Raises:
        MemedgeError: the engine cannot be opened.
    """
    opening = asyncio.create_task(server.state.reload())

    def opened(task: asyncio.Task[Any]) -> None:
        server.should_exit = server.should_exit or task.cancelled() or task.exception() is not None

    opening.add_done_callback(opened)
    if not alone:
        parent = parent_process()
        if parent is not None:  # a worker without its supervisor would never end
            asyncio.get_running_loop().add_reader(parent.sentinel, server.handle_exit, signal.SIGTERM, None)
        await opening  # others answer until then
    await server.serve(sockets=[where])
    if opening.done():
        opening.result()
    opening.cancel()


def _worker(settings: Settings, where: socket.socket) -> None:
    logs.begin()
    try:
        sys.exit(_serve(settings, where, Meters(several_processes=True), alone=False))
    except MemedgeError as error:
        LOG.error("memedge: %s", error)
        sys.exit(1)


def _serve_many(settings: Settings, where: socket.socket, workers: int) -> int:
    """Run as many processes on one socket; one that dies is started again, all end with this one."""
    context, ended, again = get_context("spawn"), False, False
    processes: list[Any] = []

    def end(*_: object) -> None:
        nonlocal ended
        ended = True
        for process in processes:
            process.terminate()

    def reload(*_: object) -> None:
        for process in processes:
            os.kill(process.pid, signal.SIGHUP)

    for number, handler in ((signal.SIGTERM, end), (signal.SIGINT, end), (signal.SIGHUP, reload)):
        signal.signal(number, handler)

    def start() -> Any:
        process = context.Process(target=_worker, args=(settings, where))
        process.start()
        return process

    processes += [start() for _ in range(workers)]
    code = 0
    while not ended:
        for place, process in enumerate(processes):
            process.join(0.2 / workers)
            if process.exitcode is not None and not ended:
                LOG.error("worker %d ended with %d: another takes its place", process.pid, process.exitcode)
                if again and process.exitcode == 1:  # it never came up
                    end()
                    code = 1
                    break
                again = process.exitcode == 1
                processes[place] = start()
    for process in processes:
        process.join()
    return code


def read_token(path: Path | None, value: str | None) -> str | None:
    """Return the bearer token of a file or a value, or None if there is neither.

    Raises:
        InputError: both, a file that cannot be read, or an empty token.
    """
    if path is not None and value is not None:
        raise InputError("Two tokens were given, a file and a value: give one of them.")
    if path is not None:
        try:
            value = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}): give a file that holds the token.") from None
    if value is not None and not value.strip():
        raise InputError("The token is empty: give one, or leave it out.")
    return value
