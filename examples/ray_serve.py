"""The gate in Ray Serve: each replica opens the engine, and judges the prompts of its requests together.

    python -m pip install 'memedge[cpu]' 'ray[serve]'
    serve run --app-dir examples ray_serve:app
    curl localhost:8000 -d '{"prompts": ["a red bicycle"]}'

Another deployment asks it by its handle: `(await gatekeeper.verdicts.remote(["a red bicycle"]))[0]["memorized"]`.
"""

import os
from typing import Any

import msgspec
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from memedge import DeadlineError, Detector, Gate, InputError, OverloadedError


# Requests beyond these wait in Ray, and 503 answers those beyond its own queue; the gate's own bound is in prompts.
@serve.deployment(max_ongoing_requests=100, max_queued_requests=400)
class Gatekeeper:
    def __init__(self, engine: str | None = None):
        self.gate = Gate(Detector.load(engine))
        self.gate.warmup()

    async def verdicts(self, prompts: list[str]) -> list[dict[str, Any]]:
        """Return a verdict per prompt, as `memedge detect --json` prints it."""
        return msgspec.to_builtins(await self.gate.adetect_all(prompts, timeout=10))

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            asked = msgspec.json.decode(await request.body(), type=dict[str, list[str]])
            return JSONResponse({"verdicts": await self.verdicts(asked.get("prompts", []))})
        except (InputError, msgspec.MsgspecError) as error:
            return JSONResponse({"error": str(error)}, 422)
        except OverloadedError as error:
            return JSONResponse({"error": str(error)}, 429, {"Retry-After": str(1 + int(error.retry_after))})
        except DeadlineError as error:
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})


app = Gatekeeper.bind(os.environ.get("ENGINE"))
