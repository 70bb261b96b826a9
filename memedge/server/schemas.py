"""What requests hold, and what answers do."""

from typing import Literal

import msgspec

from memedge.decision.early import Early
from memedge.explain import Explanation, ExplanationMethod
from memedge.results import Verdict


class VerdictsRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`POST /v1/verdicts`: prompts, and which passes may be left out (`Detector.detect`)."""

    prompts: list[str]
    early: Early = "proven"


class VerdictsAnswer(msgspec.Struct):
    """A verdict for each prompt, as `memedge detect --json` prints it; `engine` is the digest of what gave them."""

    verdicts: list[Verdict]
    engine: str


class ModerationsRequest(msgspec.Struct):
    """`POST /v1/moderations`, as OpenAI's API has it; other fields are passed over, `model` may be any."""

    input: str | list[str]
    model: str | None = None


class Moderation(msgspec.Struct):
    """One input's result.

    `category_scores` are 1 / (1 + exp(−(score − threshold) / s)) with the calibration's s: .5 at the threshold.
    """

    flagged: bool
    categories: dict[Literal["memorization"], bool]
    category_scores: dict[Literal["memorization"], float]
    category_applied_input_types: dict[Literal["memorization"], list[Literal["text"]]]
    verdict: Verdict


class ModerationsAnswer(msgspec.Struct):
    """OpenAI's fields, and the digest of the engine."""

    id: str
    model: str
    results: list[Moderation]
    engine: str


class ExplanationsRequest(msgspec.Struct, forbid_unknown_fields=True):
    """`POST /v1/explanations`: a prompt whose words are to be weighed (`Detector.explain`)."""

    prompt: str
    method: ExplanationMethod = "mask"


class ExplanationsAnswer(msgspec.Struct):
    """The explanation, as `memedge explain --json` prints it."""

    explanation: Explanation
    engine: str
