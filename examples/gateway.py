"""A gateway that asks `memedge serve` before it forwards a request for images to a server with OpenAI's API.

    python -m pip install httpx openai starlette uvicorn
    memedge serve --port 8001 &
    MODERATIONS=http://localhost:8001/v1 IMAGES=http://localhost:8002/v1 uvicorn --app-dir examples gateway:app

LiteLLM calls the same endpoint: `litellm.moderation(prompt, api_base="http://localhost:8001/v1", api_key="none")`.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import openai
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

MODERATIONS = os.environ.get("MODERATIONS", "http://localhost:8001/v1")
IMAGES = os.environ.get("IMAGES", "http://localhost:8002/v1")
TOKEN = os.environ.get("MODERATIONS_TOKEN", "none")  # what memedge serve was started with, if it was


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    moderations = openai.AsyncOpenAI(base_url=MODERATIONS, api_key=TOKEN, timeout=10)  # it tries 429 and 503 again
    async with moderations as app.state.moderations, httpx.AsyncClient(timeout=300) as app.state.images:
        yield


def refused(status: int, code: str, message: str) -> JSONResponse:
    """Return an error as OpenAI's clients expect it."""
    return JSONResponse({"error": {"message": message, "type": "image_generation_user_error", "code": code}}, status)


async def generations(request: Request) -> Response:
    try:
        asked = await request.json()
        prompt = asked["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        return refused(400, "invalid_request", "The body holds no prompt: send JSON with one.")
    try:
        moderation = await request.app.state.moderations.moderations.create(input=prompt)
    except openai.UnprocessableEntityError:
        return refused(400, "invalid_prompt", "The prompt cannot be read: send plain text.")
    except openai.APIError:  # no verdict is no green light
        return refused(503, "moderation_unavailable", "The prompt could not be judged: try again in a moment.")
    if moderation.results[0].flagged:
        return refused(400, "content_policy_violation", "This prompt would bring a training image back: change it.")
    kept = {name: request.headers[name] for name in ("authorization",) if name in request.headers}
    # Written anew: of a body that names its prompt twice, another parser could read the other one.
    answer = await request.app.state.images.post(f"{IMAGES}/images/generations", json=asked, headers=kept)
    return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))


app = Starlette(routes=[Route("/v1/images/generations", generations, methods=["POST"])], lifespan=lifespan)
