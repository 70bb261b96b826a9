"""Reading a request: bounded in size and time, and given up when its client goes away."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from memedge.engine.errors import shown
from memedge.server.answers import BadRequestError

Body = TypeVar("Body")
Result = TypeVar("Result")


async def read(request: Request, most: int, seconds: float) -> bytes:
    """Return a request's body.

    Raises:
        BadRequestError: it is larger than `most` bytes, or takes longer than `seconds`.
        ClientDisconnect: the client went away.
    """
    too_large = BadRequestError(f"The body has more than {most} bytes: send fewer prompts at a time.", 413)
    if request.headers.get("content-length", "0").isdecimal() and int(request.headers.get("content-length", 0)) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise BadRequestError(f"The body was not there after {seconds:g} s: send it faster.", 408) from None
    return b"".join(parts)


def parse(body: bytes, kind: type[Body]) -> Body:
    """Return a body as one of our types; raises BadRequestError with what is wrong and where."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequestError(f"The body is not as expected ({shown(str(error))}): see /openapi.json.", 422) from None


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return what the work returns; if the client goes away first, cancel it.

    Raises:
        ClientDisconnect: the client went away.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
