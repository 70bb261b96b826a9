"""The engine that a server serves, and how another takes its place without dropping a request."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from memedge.decision.early import Early
from memedge.detector import Detector
from memedge.explain import Explanation, ExplanationMethod
from memedge.results import Verdict
from memedge.server.meters import Meters
from memedge.server.settings import Settings
from memedge.serving.errors import ClosedError
from memedge.serving.gate import Gate


@dataclass(frozen=True)
class Served:
    """An opened engine, and the gate before it.

    `digest` names what verdicts depend on: the engine's files, its calibration, what runs it, the threshold.
    """

    detector: Detector
    gate: Gate
    digest: str


class State:
    """What all requests of one process share."""

    def __init__(self, settings: Settings, meters: Meters):
        self.settings, self.meters = settings, meters
        self._served: Served | None = None
        self._reloading = asyncio.Lock()
        self._explainer = ThreadPoolExecutor(1, "memedge-explain")

    @property
    def ready(self) -> bool:
        """Whether an engine is open and warm."""
        return self._served is not None

    @property
    def served(self) -> Served:
        """The engine that is served now.

        Raises:
            ClosedError: there is none yet, or none any more.
        """
        if self._served is None:
            raise ClosedError("The engine is not open yet, or not any more: try again in a moment.")
        return self._served

    async def reload(self) -> Served:
        """Open the engine again, warm it, and let it take over; what the old one has begun it finishes.

        Raises:
            MemedgeError: it cannot be opened; then the old one goes on.
        """
        async with self._reloading:
            new = await asyncio.to_thread(self._open)
            old, self._served = self._served, new
            self.meters.engine(new.detector.info, new.digest)
            if old is not None:
                await asyncio.to_thread(old.gate.close)
            return new

    async def close(self) -> None:
        """Finish what is under way, and take nothing more."""
        old, self._served = self._served, None
        if old is not None:
            await asyncio.to_thread(old.gate.close, self.settings.drain_seconds)

    async def verdicts(self, prompts: Sequence[str], early: Early, timeout: float) -> tuple[list[Verdict], Served]:
        """Return the verdicts, and whose they are; raises what Gate.detect raises."""
        while True:
            served = self.served
            try:
                return await served.gate.adetect_all(prompts, early, timeout=timeout), served
            except ClosedError:
                if served is self._served:  # else another one took over: ask that
                    raise

    async def explain(self, prompt: str, method: ExplanationMethod) -> tuple[Explanation, Served]:
        """Return an explanation and whose it is. They are made one at a time: each costs as much as ten prompts."""
        served = self.served
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._explainer, served.detector.explain, prompt, method), served

    def _open(self) -> Served:
        wanted = self.settings
        detector = Detector.load(
            wanted.engine,
            wanted.provider,
            wanted.precision,
            wanted.threads,
            threshold=wanted.threshold,
            target_fpr=wanted.target_fpr,
        )
        gate = Gate(
            detector,
            most_prompts=wanted.most_prompts,
            most_bytes=wanted.most_bytes,
            cache=wanted.cache,
            observe=self.meters.round,
        )
        gate.warmup(wanted.queue_seconds)
        return Served(detector, gate, detector.info.fingerprint)
