"""What every route needs of its application and its request: the engine, the time left, and the counts."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from memedge.decision.early import Early
from memedge.results import Verdict
from memedge.server import answers
from memedge.server.answers import BadRequestError
from memedge.server.request import read, unless_gone
from memedge.server.state import Served, State

CLIENT_GONE = 499  # nobody reads it; what nginx calls this in its logs


class Context:
    """One request being answered."""

    def __init__(self, request: Request):
        self.request = request
        self.state: State = request.app.state.memedge
        self.settings = self.state.settings
        self._end = time.monotonic() + self.settings.timeout

    async def body(self) -> bytes:
        """Return the request's body; raises BadRequestError."""
        return await read(self.request, self.settings.body_bytes, self._left())

    async def verdicts(self, prompts: list[str], early: Early) -> tuple[list[Verdict], Served]:
        """Return the verdicts and whose they are, and count them; raises what Gate.detect raises."""
        self.note(prompts)
        found, served = await self.unless_gone(self.state.verdicts(prompts, early, self._left()))
        self.state.meters.verdicts(found, served.detector.engine.passes)
        self.request.state.noted["memorized"] = sum(one.memorized is True for one in found)
        return found, served

    async def unless_gone(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Return what the work returns; it is cancelled where the client goes away."""
        return await unless_gone(self.request, work)

    async def in_time(self, work: Awaitable[Any]) -> Any:
        """Return what the work returns; raises BadRequestError where the time is over first."""
        try:
            async with asyncio.timeout(self._left()):
                return await work
        except TimeoutError:
            raise BadRequestError(
                f"The answer was not there after {self.settings.timeout:g} s: try again, or send less.", 503
            ) from None

    def note(self, prompts: list[str]) -> None:
        """Note for the access log what was asked, as far as it may say so."""
        noted = self.request.state.noted
        noted["prompts"] = len(prompts)
        if self.settings.log_prompts == "text":
            noted["texts"] = prompts
        elif self.settings.log_prompts == "hash":
            noted["hashes"] = [hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest() for text in prompts]

    def _left(self) -> float:
        left: float = max(0.001, self._end - time.monotonic())
        return left


Endpoint = Callable[[Context], Awaitable[Response]]


def route(endpoint: Endpoint, *, plain_errors: bool = False) -> Callable[[Request], Awaitable[Response]]:
    """Return Starlette's endpoint of ours: the token is asked for, and every error is one sentence in JSON."""

    async def answer(request: Request) -> Response:
        context = Context(request)
        try:
            _check_token(request, context.settings.token)
            return await endpoint(context)
        except ClientDisconnect:
            context.state.meters.rejected("client gone")
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            found, reason = answers.of_error(error, full_status=context.settings.full_status, plain=plain_errors)
            context.state.meters.rejected(reason)
            return found

    return answer


def _check_token(request: Request, token: str | None) -> None:
    if token is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise BadRequestError("The request bears no valid token: send it as `Authorization: Bearer …`.", 401)
