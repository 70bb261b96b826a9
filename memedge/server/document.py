"""The OpenAPI document, made of the same types that requests are read by."""

from functools import cache
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import memedge
from memedge.server import schemas
from memedge.server.answers import json

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "code": {"type": "integer"}},
        }
    },
}
_STATUSES = {
    "401": "no valid token",
    "408": "the body came too slowly",
    "413": "more than is ever taken at once",
    "422": "the body is not as expected",
    "429": "the queue is full; Retry-After says when to come back",
    "503": "no verdict: a deadline, NaN, no calibration, or the server is ending",
}
# Path, method → what it does, the request's type, the answer's.
_OPERATIONS: dict[tuple[str, str], tuple[str, Any, Any]] = {
    ("/v1/verdicts", "post"): ("Judge prompts.", schemas.VerdictsRequest, schemas.VerdictsAnswer),
    ("/v1/moderations", "post"): (
        "Judge prompts in the form of OpenAI's moderations.",
        schemas.ModerationsRequest,
        schemas.ModerationsAnswer,
    ),
    ("/v1/explanations", "post"): ("Weigh a prompt's words.", schemas.ExplanationsRequest, schemas.ExplanationsAnswer),
    ("/v1/engine", "get"): ("What is served.", None, None),
    ("/v1/engine/reload", "post"): ("Open the engine again, dropping no request.", None, None),
    ("/v2/models/memedge/infer", "post"): ("Judge prompts by the Open Inference Protocol.", None, None),
    ("/v2/models/memedge", "get"): ("The model's inputs and outputs.", None, None),
    ("/health/live", "get"): ("Whether the process lives.", None, None),
    ("/health/ready", "get"): ("Whether the engine is open and warm.", None, None),
    ("/metrics", "get"): ("Counters for Prometheus.", None, None),
}


async def document(_request: Request) -> Response:
    """`GET /openapi.json`."""
    return json(openapi())


@cache
def openapi() -> dict[str, Any]:
    """Return the document."""
    types = [kind for _, asked, answered in _OPERATIONS.values() for kind in (asked, answered) if kind]
    found, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    reference = dict(zip(types, found, strict=True))
    paths: dict[str, Any] = {}
    for (path, method), (does, asked, answered) in _OPERATIONS.items():
        answer: dict[str, Any] = {"description": "done"}
        if answered:
            answer["content"] = {"application/json": {"schema": reference[answered]}}
        operation: dict[str, Any] = {"summary": does, "responses": {"200": answer}}
        if path.startswith("/v"):
            operation["responses"] |= {
                code: {"description": meaning, "content": {"application/json": {"schema": _ERROR}}}
                for code, meaning in _STATUSES.items()
            }
        if asked:
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": reference[asked]}},
            }
        paths.setdefault(path, {})[method] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "memedge", "version": memedge.__version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }
