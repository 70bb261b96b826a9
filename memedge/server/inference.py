"""The Open Inference Protocol, version 2, over HTTP: what Triton's clients and KServe speak.

One model (memedge/protocol.py), whatever the engine. Its input is BYTES [N] or [N, 1]; its outputs have N values each.
Tensors come and go in JSON or in binary, as the protocol's extension for binary data says.
https://github.com/kserve/open-inference-protocol
"""

import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from starlette.responses import Response
from starlette.routing import Route

import memedge
from memedge.protocol import INPUT, NAME, OUTPUTS, VERSION
from memedge.server.answers import BadRequestError, json
from memedge.server.context import Context, route
from memedge.server.request import parse

HEADER_LENGTH = "Inference-Header-Content-Length"
EXTENSIONS = ["binary_tensor_data"]


class Input(msgspec.Struct):
    """A tensor of a request."""

    name: str
    shape: list[int]
    datatype: str
    data: Any = None
    parameters: dict[str, Any] = {}


class Wanted(msgspec.Struct):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct):
    """`POST /v2/models/memedge/infer`."""

    inputs: list[Input]
    outputs: list[Wanted] = []
    id: str = ""
    parameters: dict[str, Any] = {}


def routes() -> list[Route]:
    """Return the protocol's routes."""
    paths: list[Route] = [
        Route("/v2", route(_server, plain_errors=True)),
        Route("/v2/health/live", route(_live, plain_errors=True)),
        Route("/v2/health/ready", route(_ready, plain_errors=True)),
    ]
    for model in (f"/v2/models/{NAME}", f"/v2/models/{NAME}/versions/{VERSION}"):
        paths += [
            Route(model, route(_model, plain_errors=True)),
            Route(f"{model}/ready", route(_ready, plain_errors=True)),
            Route(f"{model}/infer", route(_infer, plain_errors=True), methods=["POST"]),
        ]
    return paths


async def _server(_context: Context) -> Response:
    return json({"name": NAME, "version": memedge.__version__, "extensions": EXTENSIONS})


async def _live(_context: Context) -> Response:
    return json({"live": True})


async def _ready(context: Context) -> Response:
    ready = context.state.ready
    return json({"ready": ready}, 200 if ready else 503)


async def _model(_context: Context) -> Response:
    outputs = [{"name": name, "datatype": kind, "shape": [-1]} for name, (kind, _, _) in OUTPUTS.items()]
    return json(
        {
            "name": NAME,
            "versions": [VERSION],
            "platform": "memedge",
            "inputs": [{"name": INPUT, "datatype": "BYTES", "shape": [-1]}],
            "outputs": outputs,
        }
    )


async def _infer(context: Context) -> Response:
    body = await context.body()
    length = context.request.headers.get(HEADER_LENGTH, str(len(body)))
    if not length.isdecimal() or int(length) > len(body):
        raise BadRequestError(f"{HEADER_LENGTH} is {length!r}, and the body has {len(body)} bytes.", 400)
    asked, rest = parse(body[: int(length)], InferRequest), body[int(length) :]
    prompts = _prompts(asked, rest)
    names = {one.name: one.parameters for one in asked.outputs} or {name: {} for name in OUTPUTS}
    if unknown := sorted(set(names) - set(OUTPUTS)):
        raise BadRequestError(f"There is no output {unknown[0]!r}: use {', '.join(OUTPUTS)}.", 400)
    early = asked.parameters.get("early", "proven")
    found, served = await context.verdicts(prompts, early)
    if served.detector.info.rule.threshold is None:
        raise BadRequestError("The engine is not calibrated, so there are no verdicts: run `memedge calibrate`.", 503)
    binary_all = bool(asked.parameters.get("binary_data_output", False))
    outputs, tails = [], []
    for name, parameters in names.items():
        kind, dtype, field = OUTPUTS[name]
        values = [field(one) for one in found]
        output: dict[str, Any] = {"name": name, "datatype": kind, "shape": [len(found)]}
        if parameters.get("binary_data", binary_all):
            tail = _bytes(values) if kind == "BYTES" else np.array(values, dtype=dtype).tobytes()
            output["parameters"] = {"binary_data_size": len(tail)}
            tails.append(tail)
        else:
            output["data"] = values
        outputs.append(output)
    header = msgspec.json.encode(
        {"model_name": NAME, "model_version": VERSION, "id": asked.id, "outputs": outputs}
        | {"parameters": {"engine": served.digest}}
    )
    if not tails:
        return Response(header, media_type="application/json")
    return Response(
        header + b"".join(tails),
        media_type="application/octet-stream",
        headers={HEADER_LENGTH: str(len(header))},
    )


def _prompts(asked: InferRequest, rest: bytes) -> list[str]:
    """Return the prompts of a request; raises BadRequestError."""
    if len(asked.inputs) != 1 or asked.inputs[0].name != INPUT or asked.inputs[0].datatype != "BYTES":
        raise BadRequestError("The request needs one input, `prompt`, of datatype BYTES.", 400)
    one = asked.inputs[0]
    size = one.parameters.get("binary_data_size")
    texts = _read_bytes(rest) if size is not None else _flat(one.data)
    count = 1
    for side in one.shape:
        count *= side
    if len(one.shape) not in (1, 2) or count != len(texts) or (len(one.shape) == 2 and one.shape[1] != 1):
        raise BadRequestError(f"`prompt` has shape {one.shape[:8]} and {len(texts)} texts: give [N] or [N, 1].", 400)
    return texts


def _flat(data: Any) -> list[str]:
    texts = data if isinstance(data, list) else []
    texts = [text for one in texts for text in (one if isinstance(one, list) else [one])]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadRequestError("`prompt` has no data: give a list of texts.", 400)
    return texts


def _read_bytes(rest: bytes) -> list[str]:
    """Return texts that each stand behind their length in four bytes, the lowest first."""
    texts, place = [], 0
    while place < len(rest):
        (size,) = struct.unpack_from("<I", rest, place) if place + 4 <= len(rest) else (1 << 32,)
        part = rest[place + 4 : place + 4 + size]
        if len(part) != size:
            raise BadRequestError("The binary data of `prompt` is cut off.", 400)
        try:
            texts.append(part.decode())
        except UnicodeDecodeError:
            raise BadRequestError(f"Prompt {len(texts) + 1} is not valid UTF-8.", 400) from None
        place += 4 + size
    return texts


def _bytes(values: Sequence[str]) -> bytes:
    parts = [value.encode() for value in values]
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)
