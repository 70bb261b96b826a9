"""What an operator may set of a server; each has a flag of `memedge serve` and an environment variable."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LogPrompts = Literal["none", "hash", "text"]


@dataclass(frozen=True)
class Settings:
    """A server's settings.

    Attributes:
        engine, provider, precision, threads, threshold, target_fpr: as in `Detector.load`.
        most_prompts: prompts in the gate at once; None: what the engine does in `queue_seconds`, measured at warm-up.
        queue_seconds: see there.
        most_bytes: of their text.
        cache: verdicts that are kept for prompts of the same tokens.
        body_bytes: of one request.
        timeout: seconds that a request may take, its body included.
        full_status: what is answered where the gate is full.
        token: what requests have to bear, or None: anybody may ask.
        log_prompts: what the access log says of prompts.
        drain_seconds: that requests under way get after a SIGTERM.
    """

    engine: Path | None = None
    provider: str = "auto"
    precision: str | None = None
    threads: int | None = None
    threshold: float | None = None
    target_fpr: float | None = None
    most_prompts: int | None = None
    queue_seconds: float = 10.0
    most_bytes: int = 16 << 20
    cache: int = 0
    body_bytes: int = 1 << 20
    timeout: float = 30.0
    full_status: Literal[429, 503] = 429
    token: str | None = None
    log_prompts: LogPrompts = "none"
    drain_seconds: float = 20.0
