"""An image server with the gate in front: FastAPI, a pipeline of diffusers, one thread that generates.

    python -m pip install 'memedge[cpu,export]' fastapi uvicorn
    MODEL=my-model ENGINE=my-engine uvicorn --app-dir examples fastapi_server:app
    curl localhost:8000/images -d '{"prompt": "a red bicycle"}' -H 'content-type: application/json'

Without MODEL and ENGINE, in a clone of memedge: the embedded engine and the model that it was exported from.
"""

import asyncio
import base64
import io
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Literal

import torch
from diffusers import StableDiffusionPipeline
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from memedge import DeadlineError, Detector, Gate, InputError, Mitigator, OverloadedError

MODEL = os.environ.get("MODEL", "bench/tiny/emoji")
ENGINE = os.environ.get("ENGINE")


class Asked(BaseModel):
    prompt: str = Field(min_length=1, max_length=2000)
    action: Literal["block", "mitigate", "flag"] = "block"
    steps: int = Field(default=20, ge=1, le=100)
    seed: int = 0


class Answer(BaseModel):
    done: Literal["passed", "blocked", "mitigated", "flagged"]
    reason: str
    image: str | None  # PNG in base64


class Studio:
    """The pipeline and what moves embeddings. Neither may run in two threads at once, and both take all processors."""

    def __init__(self, detector: Detector):
        self.pipe = StableDiffusionPipeline.from_pretrained(MODEL)
        self.pipe.set_progress_bar_config(disable=True)
        self.mitigator = Mitigator.for_detector(detector)

    def generate(self, asked: Asked, **prompt: Any) -> str:
        generator = torch.Generator().manual_seed(asked.seed)
        (image,) = self.pipe(**prompt, num_inference_steps=asked.steps, generator=generator).images
        file = io.BytesIO()
        image.save(file, "png")
        return base64.b64encode(file.getvalue()).decode()

    def mitigate(self, asked: Asked) -> Answer:
        found = self.mitigator.embedding(asked.prompt)
        if not found.succeeded or found.memorized:
            return Answer(done="blocked", reason=found.reason, image=None)
        image = self.generate(asked, prompt_embeds=torch.from_dlpack(found.states[None]))
        return Answer(done="mitigated", reason=found.reason, image=image)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    detector = Detector.load(ENGINE)
    with Gate(detector) as app.state.gate, ThreadPoolExecutor(1, "generate") as app.state.thread:
        app.state.gate.warmup()
        app.state.studio = Studio(detector)
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/images")
async def images(asked: Asked) -> Answer:
    """Judge a prompt with all others that wait, then generate, or don't."""
    try:
        verdict = await app.state.gate.adetect(asked.prompt, timeout=10)
    except OverloadedError as error:
        raise HTTPException(429, str(error), {"Retry-After": str(1 + int(error.retry_after))}) from None
    except DeadlineError as error:
        raise HTTPException(503, str(error), {"Retry-After": "1"}) from None
    except InputError as error:
        raise HTTPException(422, str(error)) from None
    studio, run = app.state.studio, asyncio.get_running_loop().run_in_executor
    if verdict.memorized and asked.action == "block":
        return Answer(done="blocked", reason=verdict.reason, image=None)
    if verdict.memorized and asked.action == "mitigate":
        return await run(app.state.thread, studio.mitigate, asked)
    image = await run(app.state.thread, lambda: studio.generate(asked, prompt=asked.prompt))
    return Answer(done="flagged" if verdict.memorized else "passed", reason=verdict.reason, image=image)
