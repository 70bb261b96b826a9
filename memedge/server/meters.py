"""What Prometheus reads: requests, verdicts, the queue and the UNet's rows. Units are seconds; prompts are not here."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from memedge.detector import EngineInfo
from memedge.results import Verdict
from memedge.serving.gate import Round

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Meters:
    """A process's counters."""

    def __init__(self, *, several_processes: bool = False):
        """Start at 0; `several_processes`: count together with others, in the folder that Prometheus' client shares."""
        own = self._own = CollectorRegistry()
        self._read = own
        if several_processes:
            self._read = CollectorRegistry()
            MultiProcessCollector(self._read)  # type: ignore[no-untyped-call]
        self._requests = Counter("memedge_requests", "Requests by route and status.", ["route", "status"], registry=own)
        self._request = Histogram(
            "memedge_request_seconds",
            "From a request's first byte to its answer.",
            ["route"],
            buckets=SECONDS,
            registry=own,
        )
        self._rejected = Counter(
            "memedge_rejected", "Requests that got no verdict, by reason.", ["reason"], registry=own
        )
        self._verdicts = Counter(
            "memedge_verdicts", "Verdicts: memorized, clean, or none without a calibration.", ["verdict"], registry=own
        )
        self._passes = Counter("memedge_unet_passes_spared", "UNet rows that a verdict did not need.", registry=own)
        self._queue = Histogram(
            "memedge_queue_seconds", "What prompts waited before their first pass.", buckets=SECONDS, registry=own
        )
        self._batch = Histogram("memedge_batch_rows", "Rows of one UNet call.", buckets=ROWS, registry=own)
        self._rows = Counter("memedge_unet_rows", "UNet rows computed.", registry=own)
        self._inference = Histogram(
            "memedge_inference_seconds", "One round: tokenizer, text encoder, UNet.", buckets=SECONDS, registry=own
        )
        self._waiting = Gauge(
            "memedge_queue_prompts", "Prompts in the gate.", registry=own, multiprocess_mode="livesum"
        )
        self._engine = None if several_processes else Info("memedge_engine", "What is served.", registry=own)

    def engine(self, info: EngineInfo, digest: str) -> None:
        """Say what is served from now on."""
        if self._engine is not None:  # Prometheus' client shares no texts between processes
            self._engine.info({"checkpoint": info.manifest.source.id, "key": info.key, "digest": digest})

    def round(self, one: Round) -> None:
        """Count a call of the UNet."""
        self._batch.observe(one.rows)
        self._rows.inc(one.rows)
        self._inference.observe(one.seconds)
        self._waiting.set(one.queued)
        for waited in one.waited:
            self._queue.observe(waited)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(route, str(status)).inc()
        self._request.labels(route).observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count a request that got no verdict."""
        self._rejected.labels(reason).inc()

    def verdicts(self, verdicts: Sequence[Verdict], passes: int) -> None:
        """Count verdicts; each would have taken so many passes if none had been left out."""
        for one in verdicts:
            name = {True: "memorized", False: "clean", None: "none"}[one.memorized]
            self._verdicts.labels(name).inc()
            self._passes.inc(max(0, passes - one.passes))

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self._read)
