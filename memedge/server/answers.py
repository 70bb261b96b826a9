"""JSON answers, and which status an error has."""

import logging
import math
from typing import Any

import msgspec
from starlette.responses import Response

from memedge.engine.errors import InputError, MemedgeError, NotFiniteError
from memedge.serving.errors import ClosedError, DeadlineError, OverloadedError, TooLargeError

LOG = logging.getLogger("memedge.server")


class BadRequestError(MemedgeError):
    """A request that cannot be answered.

    Attributes:
        status: HTTP's.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return an answer in JSON."""
    return Response(msgspec.json.encode(content, enc_hook=str), status, headers, "application/json")


def of_error(error: Exception, *, full_status: int, plain: bool = False) -> tuple[Response, str]:
    """Return the answer for an error, and its reason in a word, for the counters.

    Args:
        full_status: where the gate is full, 429 or 503.
        plain: with the sentence alone, as the Open Inference Protocol wants it.
    """
    status, reason = _status(error, full_status)
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    elif status == 503:
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status == 408:
        headers["Connection"] = "close"  # what comes yet would be the rest of this body (RFC 9110, section 15.5.9)
    if isinstance(error, MemedgeError):
        message = str(error)
    else:
        LOG.error("a request failed", exc_info=error)
        message = f"The server failed ({type(error).__name__}): its log says why."
    body: Any = {"error": message} if plain else {"error": {"message": message, "type": reason, "code": status}}
    return json(body, status, headers), reason


def _status(error: Exception, full_status: int) -> tuple[int, str]:
    if isinstance(error, BadRequestError):
        return error.status, {401: "token", 408: "slow", 413: "too large"}.get(error.status, "input")
    for kind, status, reason in (
        (OverloadedError, full_status, "full"),
        (DeadlineError, 503, "deadline"),
        (ClosedError, 503, "closed"),
        (NotFiniteError, 503, "not finite"),
        (TooLargeError, 413, "too large"),
        (InputError, 422, "input"),
    ):
        if isinstance(error, kind):
            return status, reason
    return 500, "error"
