"""What each endpoint answers, to real clients too; and what it says of requests that are wrong."""

import json
import math
import re

import httpx
import msgspec
import pytest

from memedge.embedded import captions
from memedge.results import Verdict

PROMPTS = [
    "the left luggage sign",
    "a green star on a hill",
    "",
    "猫",
    *(caption.prompt for caption in captions()[:20]),
]


def fails(answer: httpx.Response, status: int, words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    message = error["message"] if isinstance(error, dict) else error
    assert re.search(words, message) and message.isprintable() and len(message) < 500
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("early", ["proven", "conformal", "off"])
def test_verdicts(client, detector, early):
    answer = client.post("/v1/verdicts", json={"prompts": PROMPTS, "early": early})
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    found = msgspec.convert(answer.json()["verdicts"], list[Verdict])
    expected = detector.detect(PROMPTS, early)
    assert [(one.prompt, one.memorized, one.passes) for one in found] == [
        (one.prompt, one.memorized, one.passes) for one in expected
    ]
    assert [one.norm for one in found] == pytest.approx([one.norm for one in expected], rel=1e-5)
    assert answer.json()["engine"] == detector.info.fingerprint


def test_moderations_by_openais_client(server, detector):
    openai = pytest.importorskip("openai")
    with httpx.Client(trust_env=False) as http:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http, max_retries=0)
        answer = client.moderations.create(input=["the left luggage sign", "a green star on a hill", ""], model="any")
        single = client.moderations.create(input="the left luggage sign")
    assert answer.id.startswith("modr-") and answer.model == "emoji"
    assert [one.flagged for one in answer.results] == [True, False, False]
    assert single.results[0].flagged
    for one, verdict in zip(
        answer.results, detector.detect(["the left luggage sign", "a green star on a hill", ""]), strict=True
    ):
        assert one.categories.model_extra["memorization"] == one.flagged
        value = one.category_scores.model_extra["memorization"]
        scale = detector.info.calibration.scale
        if verdict.norm:
            assert value == pytest.approx(1 / (1 + math.exp((verdict.threshold - verdict.score) / scale)), rel=1e-3)
        assert (value >= 0.5) == one.flagged
        assert one.model_extra["verdict"]["passes"] == 2  # everything is computed


def test_inference_by_tritons_client(server, detector):
    triton = pytest.importorskip("tritonclient.http")
    import numpy as np

    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("memedge")
    assert client.get_server_metadata()["name"] == "memedge"
    assert client.get_model_metadata("memedge")["inputs"] == [{"name": "prompt", "datatype": "BYTES", "shape": [-1]}]
    prompts = ["the left luggage sign", "a green star on a hill", "猫"]
    expected = detector.detect(prompts)
    for shape in ([3], [3, 1]):
        for binary in (True, False):
            given = triton.InferInput("prompt", shape, "BYTES")
            array = np.array([one.encode() for one in prompts], dtype=np.object_).reshape(shape)
            given.set_data_from_numpy(array, binary_data=binary)
            found = client.infer("memedge", [given])
            assert found.as_numpy("memorized").tolist() == [one.memorized for one in expected]
            np.testing.assert_allclose(found.as_numpy("norm"), [one.norm for one in expected], rtol=1e-5)
            assert found.as_numpy("reason").tolist() == [one.reason.encode() for one in expected]
            assert found.as_numpy("passes").tolist() == [one.passes for one in expected]
            some = [triton.InferRequestedOutput("score", binary_data=binary)]
            found = client.infer("memedge", [given], outputs=some, request_id="7")
            assert found.get_response()["id"] == "7" and found.as_numpy("norm") is None
    with pytest.raises(triton.InferenceServerException, match="There is no output 'colour': use memorized"):
        client.infer("memedge", [given], outputs=[triton.InferRequestedOutput("colour")])
    client.close()


def test_explanations(client, detector):
    answer = client.post("/v1/explanations", json={"prompt": "the left luggage sign"})
    found = answer.json()["explanation"]
    expected = detector.explain("the left luggage sign")
    assert [word["text"] for word in found["words"]] == [word.text for word in expected.words]
    assert found["score"] == pytest.approx(expected.score, rel=1e-4)
    answer = client.post("/v1/explanations", json={"prompt": "the left luggage sign", "method": "gradient"})
    assert answer.json()["explanation"]["method"] == "gradient"


def test_engine(client, detector):
    found = client.get("/v1/engine").json()
    assert found["digest"] == detector.info.fingerprint and found["most_prompts"] > 10
    assert found["info"]["manifest"]["source"]["id"] == "emoji" and found["info"]["provider"] == "cpu"


def test_health_and_metrics(client):
    client.post("/v1/verdicts", json={"prompts": ["the left luggage sign"]})
    assert client.get("/health/live").json() == {"live": True}
    assert client.get("/health/ready").json() == {"ready": True}
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    samples = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert float(samples['memedge_requests_total{route="/v1/verdicts",status="200"}']) >= 1
    assert float(samples['memedge_verdicts_total{verdict="memorized"}']) >= 1
    assert float(samples["memedge_unet_rows_total"]) >= 2
    assert float(samples["memedge_queue_prompts"]) >= 0
    assert "the left luggage sign" not in answer.text


def test_openapi(client):
    found = client.get("/openapi.json").json()
    assert found["openapi"].startswith("3.1")
    for path, methods in found["paths"].items():
        for method in methods:
            answer = client.request(method, path, content=b"{", headers={"content-type": "application/json"})
            assert answer.status_code not in (404, 405), path
    assert "VerdictsRequest" in found["components"]["schemas"]


WRONG = json.dumps({"prompts": ["a", None], "input": [7], "prompt": []}).encode()


@pytest.mark.parametrize("path", ["/v1/verdicts", "/v1/moderations", "/v1/explanations"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"prompts": 7}', b'{"prompts": ["\xed\xa0\x80"]}', b"[" * 10_000, WRONG],
)
def test_bodies_that_are_wrong(client, path, body):
    fails(client.post(path, content=body), 422, r"The body is not as expected \(.*\): see /openapi.json")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompts": []}, 422, "no prompts to judge"),
        ({"prompts": ["a"], "early": "late"}, 422, "Invalid enum value 'late'"),
        ({"prompts": ["a"], "more": 1}, 422, "unknown field `more`"),
        ({"prompts": ["a" * 10_000_000]}, 413, "more than 1048576 bytes"),
        ({"prompts": ["a"] * 100_000}, 413, r"100000 prompts of \d+ bytes are more than the gate ever takes"),
    ],
)
def test_requests_that_are_wrong(client, body, status, words):
    fails(client.post("/v1/verdicts", json=body), status, words)


def test_an_unknown_route_and_method(client):
    fails(client.get("/v1/nothing"), 404, "There is no GET /v1/nothing: see /openapi.json")
    fails(client.get("/v1/verdicts"), 405, "/v1/verdicts does not take GET")
    fails(client.post("/v1/verdicts/", json={}), 404, "There is no POST /v1/verdicts/")
    fails(client.get("/metrics/"), 404, "There is no GET /metrics/")


@pytest.mark.parametrize(
    ("body", "headers", "words"),
    [
        ({"inputs": []}, {}, "needs one input, `prompt`"),
        ({"inputs": [{"name": "prompt", "shape": [1], "datatype": "FP32", "data": [1]}]}, {}, "of datatype BYTES"),
        (
            {"inputs": [{"name": "prompt", "shape": [2], "datatype": "BYTES", "data": ["a"]}]},
            {},
            "shape .* and 1 texts",
        ),
        ({"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [7]}]}, {}, "give a list of texts"),
        ({"inputs": []}, {"Inference-Header-Content-Length": "99999"}, "and the body has"),
        ({"inputs": []}, {"Inference-Header-Content-Length": "-1"}, "and the body has"),
    ],
)
def test_inference_that_is_wrong(client, body, headers, words):
    fails(client.post("/v2/models/memedge/infer", json=body, headers=headers), 400, words)


def test_binary_tensors_that_are_cut_off(client):
    header = json.dumps(
        {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 9}}]}
    ).encode()
    for tail, words in (
        (b"\x05\0\0\0abc", "is cut off"),
        (b"\x05\0", "is cut off"),
        (b"\x01\0\0\0\xff", "not valid UTF-8"),
        (b"\xff\xff\xff\xff", "is cut off"),
    ):
        answer = client.post(
            "/v2/models/memedge/infer",
            content=header + tail,
            headers={"Inference-Header-Content-Length": str(len(header))},
        )
        fails(answer, 400, words)
