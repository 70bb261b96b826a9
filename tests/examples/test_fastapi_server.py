"""examples/fastapi_server.py: each request chooses what is done about a memorized prompt."""

import asyncio
import base64
import io
from pathlib import Path

import fastapi_server
import httpx
import pytest
from PIL import Image

from memedge import DeadlineError, InputError, OverloadedError

MEMORIZED = "the left luggage sign"


@pytest.fixture(autouse=True)
def model(monkeypatch):
    monkeypatch.setattr(fastapi_server, "MODEL", str(Path(__file__).parents[2] / "bench/tiny/emoji"))


def ask(*bodies: dict, gate=None) -> list[httpx.Response]:
    """Start the server, send all requests at once, and return their answers."""

    async def run() -> list[httpx.Response]:
        app = fastapi_server.app
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client,
        ):
            if gate is not None:
                app.state.gate = gate
            return await asyncio.gather(*(client.post("/images", json=body) for body in bodies))

    return asyncio.run(run())


def test_block_mitigate_and_flag():
    def asked(action: str, prompt: str = MEMORIZED) -> dict:
        return {"prompt": prompt, "action": action, "steps": 4, "seed": 1}

    answers = ask(asked("block"), asked("mitigate"), asked("flag"), asked("block", "a red bicycle"), asked("shrug"), {})
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 422, 422]
    found = [answer.json() for answer in answers[:4]]
    assert [one["done"] for one in found] == ["blocked", "mitigated", "flagged", "passed"]
    assert found[0]["image"] is None and "threshold" in found[0]["reason"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(one["image"]))) for one in found[1:]]
    assert {picture.size for picture in pictures} == {(64, 64)}
    assert pictures[0].tobytes() != pictures[1].tobytes()  # of the same seed


def test_what_the_gate_refuses():
    errors = {
        "much": OverloadedError("It is full.", 1.5),
        "late": DeadlineError("It is late."),
        "wrong": InputError("It is wrong."),
    }

    class Refusing:
        async def adetect(self, prompt, **_options):
            raise errors[prompt]

    answers = ask(*({"prompt": prompt} for prompt in errors), gate=Refusing())
    found = [(answer.status_code, answer.headers.get("retry-after")) for answer in answers]
    assert found == [(429, "2"), (503, "1"), (422, None)]
    assert [answer.json()["detail"] for answer in answers] == [str(error) for error in errors.values()]
