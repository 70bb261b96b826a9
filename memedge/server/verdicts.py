"""memedge's own endpoints: verdicts, explanations, what is served, and serving something else."""

import math
import uuid
from typing import Any

from starlette.responses import Response

from memedge.engine.errors import InputError
from memedge.results import Verdict
from memedge.server.answers import json
from memedge.server.context import Context
from memedge.server.request import parse
from memedge.server.schemas import (
    ExplanationsAnswer,
    ExplanationsRequest,
    Moderation,
    ModerationsAnswer,
    ModerationsRequest,
    VerdictsAnswer,
    VerdictsRequest,
)
from memedge.server.state import Served
from memedge.serving.errors import ClosedError


async def verdicts(context: Context) -> Response:
    """`POST /v1/verdicts`."""
    asked = parse(await context.body(), VerdictsRequest)
    found, served = await context.verdicts(asked.prompts, asked.early)
    _check_calibrated(served)
    return json(VerdictsAnswer(found, served.digest))


async def moderations(context: Context) -> Response:
    """`POST /v1/moderations`: OpenAI's form. Everything is computed, so that there is a score."""
    asked = parse(await context.body(), ModerationsRequest)
    prompts = [asked.input] if isinstance(asked.input, str) else asked.input
    _check_calibrated(context.state.served)
    found, served = await context.verdicts(prompts, "off")
    scale = _scale(served)
    results = [_moderation(one, scale) for one in found]
    name = served.detector.info.manifest.source.id
    return json(ModerationsAnswer(f"modr-{uuid.uuid4().hex}", name, results, served.digest))


async def explanations(context: Context) -> Response:
    """`POST /v1/explanations`."""
    asked = parse(await context.body(), ExplanationsRequest)
    context.note([asked.prompt])
    work = context.state.explain(asked.prompt, asked.method)
    found, served = await context.in_time(context.unless_gone(work))
    return json(ExplanationsAnswer(found, served.digest))


async def engine(context: Context) -> Response:
    """`GET /v1/engine`: as `memedge info --json` prints it, with the digest and the gate's limits."""
    return json(_described(context.state.served))


async def reload(context: Context) -> Response:
    """`POST /v1/engine/reload`: open the engine again; requests under way end on the old one."""
    return json(_described(await context.state.reload()))


def _described(served: Served) -> dict[str, Any]:
    return {"digest": served.digest, "most_prompts": served.gate.most_prompts, "info": served.detector.info}


def _check_calibrated(served: Served) -> None:
    """Raise ClosedError if there are no verdicts: that nothing is known must not look like "not memorized"."""
    info = served.detector.info
    if info.rule.threshold is None:
        raise ClosedError(
            f"The engine is not calibrated for {info.key}, so there are no verdicts: run `memedge calibrate`, and "
            "reload."
        )


def _scale(served: Served) -> float:
    calibration = served.detector.info.calibration
    if calibration is None or calibration.scale is None:
        raise InputError(
            "The engine's calibration keeps no scale for category_scores: run `memedge calibrate` again, or ask "
            "/v1/verdicts."
        )
    return calibration.scale


def _moderation(verdict: Verdict, scale: float) -> Moderation:
    score, threshold = verdict.score, verdict.threshold
    assert score is not None and threshold is not None  # everything was computed, by a calibrated rule
    value = 0.0
    if verdict.norm:  # the empty prompt's Δ is 0, and it is never memorized
        value = 1 / (1 + math.exp(min(700.0, (threshold - score) / scale)))
    return Moderation(
        flagged=bool(verdict.memorized),
        categories={"memorization": bool(verdict.memorized)},
        category_scores={"memorization": value},
        category_applied_input_types={"memorization": ["text"]},
        verdict=verdict,
    )
