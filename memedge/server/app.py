"""The application: its routes, what runs before the first request and after the last, and the access log."""

import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memedge.server import answers, inference, verdicts
from memedge.server.context import route
from memedge.server.document import document
from memedge.server.meters import Meters
from memedge.server.page import page
from memedge.server.settings import Settings
from memedge.server.state import State

ACCESS = logging.getLogger("memedge.access")


def make_app(settings: Settings, meters: Meters | None = None) -> Starlette:
    """Return the application. Whoever runs it opens the engine (State.reload); at its end it is drained."""
    state = State(settings, meters or Meters())

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await state.close()

    async def live(_request: Request) -> Response:
        return answers.json({"live": True})

    async def ready(_request: Request) -> Response:
        return answers.json({"ready": state.ready}, 200 if state.ready else 503)

    async def metrics(_request: Request) -> Response:
        return Response(state.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def nowhere(request: Request, _error: Exception) -> Response:
        message = f"There is no {request.method} {request.url.path}: see /openapi.json."
        return answers.json({"error": {"message": message, "type": "input", "code": 404}}, 404)

    async def not_so(request: Request, _error: Exception) -> Response:
        message = f"{request.url.path} does not take {request.method}: see /openapi.json."
        return answers.json({"error": {"message": message, "type": "input", "code": 405}}, 405)

    app = Starlette(
        routes=[
            Route("/v1/verdicts", route(verdicts.verdicts), methods=["POST"]),
            Route("/v1/moderations", route(verdicts.moderations), methods=["POST"]),
            Route("/v1/explanations", route(verdicts.explanations), methods=["POST"]),
            Route("/v1/engine", route(verdicts.engine), methods=["GET"]),
            Route("/v1/engine/reload", route(verdicts.reload), methods=["POST"]),
            *inference.routes(),
            Route("/health/live", live),
            Route("/health/ready", ready),
            Route("/metrics", metrics),
            Route("/openapi.json", document),
            Route("/", page),
        ],
        lifespan=lifespan,
        exception_handlers={404: nowhere, 405: not_so},
    )
    app.router.redirect_slashes = False  # scrapers and clients of POST do not follow
    app.state.memedge = state
    app.add_middleware(AccessLog, state=state)
    return app


class AccessLog:
    """Counts and logs every request: one line of JSON."""

    def __init__(self, app: ASGIApp, state: State):
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        noted: dict[str, object] = {}
        scope.setdefault("state", {})["noted"] = noted

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            seconds = time.perf_counter() - start
            # The route's own path: what a client makes up is no label.
            matched = getattr(scope.get("route"), "path", None) if status != 404 else None
            self._state.meters.request(matched or "none", status, seconds)
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "client": (scope.get("client") or ("",))[0],
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 6),
                **noted,
            }
            ACCESS.info(json.dumps(line))
