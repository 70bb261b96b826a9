"""What breaks beneath a server: predictions that are not finite, a full disk, an engine that is deleted."""

import asyncio
import shutil

import httpx
from engines import spoil_second_prompt
from servers import ask, serving

from memedge.embedded import EMBEDDED_ENGINE
from memedge.server.app import make_app
from memedge.server.settings import Settings

CPU = ("--provider", "cpu")


def test_predictions_that_are_not_finite_cost_that_request_alone(monkeypatch):
    async def ask_both() -> list[httpx.Response]:
        app = make_app(Settings(provider="cpu", threads=1))
        state = app.state.memedge
        detector = (await state.reload()).detector
        measure = detector.engine.measure
        spoil_second_prompt(detector.engine, monkeypatch)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            asked = [
                client.post("/v1/verdicts", json={"prompts": [text]}) for text in ("the left luggage sign", "a star")
            ]
            answers = await asyncio.gather(*asked)  # in one call of the UNet: the second one is row 1
            monkeypatch.setattr(detector.engine, "measure", measure)
            answers.append(await client.post("/v1/verdicts", json={"prompts": ["a star"]}))
        await state.close()
        return answers

    good, not_finite, later = asyncio.run(ask_both())
    assert [good.status_code, not_finite.status_code, later.status_code] == [200, 503, 200]
    assert good.json()["verdicts"][0]["memorized"]
    assert not_finite.headers["Retry-After"]
    assert "run it in a higher precision" in not_finite.json()["error"]["message"]


def test_a_log_that_cannot_be_written(tmp_path):
    with (
        serving(tmp_path, *CPU, stdout="/dev/full") as server,  # as a disk that is full
        httpx.Client(base_url=server.url, trust_env=False, timeout=30) as client,
    ):
        for _ in range(3):
            assert client.post("/v1/verdicts", json={"prompts": ["a red bicycle"]}).status_code == 200
        assert server.end() == 0
    assert server.said().count("the log cannot be written (No space left on device)") == 1
    assert "Traceback" not in server.said()


def test_an_engine_that_is_deleted_goes_on(tmp_path):
    engine = shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine", ignore=shutil.ignore_patterns("baseline.*-*"))
    with serving(tmp_path, *CPU, "--engine", engine) as server:
        shutil.rmtree(engine)
        assert ask(server.url, ["a red bicycle"]).status_code == 200
        reloaded = httpx.post(f"{server.url}/v1/engine/reload", timeout=30, trust_env=False)
        assert reloaded.status_code == 500  # nothing that the client did wrong
        assert "engine" in reloaded.json()["error"]["message"]
        asked = {"prompt": "the left luggage sign"}
        explained = httpx.post(f"{server.url}/v1/explanations", json=asked, timeout=30, trust_env=False)
        assert explained.status_code == 200
        assert ask(server.url, ["the left luggage sign"]).status_code == 200
        assert server.end() == 0
