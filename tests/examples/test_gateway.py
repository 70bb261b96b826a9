"""examples/gateway.py, between OpenAI's client, a server of memedge and a stand-in for the generator."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import gateway
import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


@pytest.fixture
def forwarded(server, monkeypatch) -> list[tuple[dict, str | None]]:
    """What came to the generator: bodies and keys."""
    monkeypatch.setattr(gateway, "MODERATIONS", f"{server.url}/v1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return []


def through(forwarded: list, use: Callable[[openai.AsyncOpenAI, httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Let a client use the gateway."""

    async def generate(request: Request) -> JSONResponse:
        forwarded.append((await request.json(), request.headers.get("authorization")))
        return JSONResponse({"created": 1, "data": [{"b64_json": "aW1hZ2U="}]})

    async def run() -> Any:
        generator = Starlette(routes=[Route("/v1/images/generations", generate, methods=["POST"])])
        app = gateway.app
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(generator)) as app.state.images,
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http,
        ):
            client = openai.AsyncOpenAI(base_url="http://gateway/v1", api_key="k", http_client=http, max_retries=0)
            return await use(client, http)

    return asyncio.run(run())


def test_clean_prompts_go_through_and_memorized_ones_do_not(forwarded):
    async def use(client, _http):
        answer = await client.images.generate(prompt="a green star on a hill", model="m")
        assert answer.data[0].b64_json == "aW1hZ2U="
        with pytest.raises(openai.BadRequestError, match="would bring a training image back") as caught:
            await client.images.generate(prompt="the left luggage sign", model="m")
        assert caught.value.code == "content_policy_violation"

    through(forwarded, use)
    assert forwarded == [({"prompt": "a green star on a hill", "model": "m"}, "Bearer k")]


def test_what_is_judged_is_what_is_forwarded(forwarded):
    async def use(_client, http):
        twice = b'{"prompt": "the left luggage sign", "prompt": "a green star on a hill"}'
        answers = [await http.post("/v1/images/generations", content=body) for body in (twice, b"{", b"[]", b"7")]
        lists = await http.post(
            "/v1/images/generations", json={"prompt": ["a green star on a hill", "the left luggage sign"]}
        )
        assert [answer.status_code for answer in (*answers, lists)] == [200, 400, 400, 400, 400]

    through(forwarded, use)
    assert [body for body, _ in forwarded] == [{"prompt": "a green star on a hill"}]


def test_no_verdict_is_no_green_light(forwarded, monkeypatch):
    monkeypatch.setattr(gateway, "MODERATIONS", "http://127.0.0.1:9/v1")  # nobody listens there

    async def use(client, _http):
        with pytest.raises(openai.InternalServerError, match="could not be judged"):
            await client.images.generate(prompt="a green star on a hill", model="m")

    through(forwarded, use)
    assert forwarded == []
