"""`memedge bench`: what scoring costs here in time and memory, beside what the processor could do."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

import memedge
from memedge.detector import Detector
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine import probe
from memedge.engine.arrays import Floats, Indices
from memedge.engine.backend import Backend
from memedge.engine.engine import Engine
from memedge.engine.machine import load_average, peak_memory, processor_name
from memedge.engine.manifest import Flops
from memedge.engine.memory import Memory, Tensor
from memedge.engine.providers import PROVIDERS
from memedge.measure.peak import gemm_gflops

CALLS = 200  # per case, unless they take more than SECONDS, but LEAST_CALLS in any case
SECONDS = 10.0
LEAST_CALLS = 3
GEMM_SECONDS = 0.5  # after each case; the fastest counts, because other processes may slow down any of them


@dataclass(frozen=True)
class Case:
    """The cost of `Detector.score` on `batch` prompts with `draws` noise draws.

    Attributes:
        batch, draws: prompts per call, and draws per prompt.
        calls: timed calls, after the first one.
        first_call_s: the first call of this shape. In the first case, that is the first call of the process.
        p50_s, p95_s, p99_s: percentiles of the seconds per call.
        prompts_per_s: over all timed calls.
        flops_per_prompt: floating-point operations that ran, of the text encoder and the UNet.
        gemm_fraction: operations per second at the median, over those of a float32 matrix product. None where that is
            no yardstick: in other precisions than fp32, not on the processor, or if the case was faster than it.
        host_us: microseconds per call outside the text encoder and the UNet, the median.
        host_fraction: that, over the median of the call.
    """

    batch: int
    draws: int
    calls: int
    first_call_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    prompts_per_s: float
    flops_per_prompt: int
    gemm_fraction: float | None
    host_us: float
    host_fraction: float


@dataclass(frozen=True)
class Bench:
    """What was measured, on what.

    Attributes:
        engine, checkpoint, provider, precision, threads: what ran.
        memedge: the version.
        processor: the name of what computed.
        date: in UTC, as in ISO 8601.
        load: processes that ran or waited on this machine in the minute before, this one among them; None if unknown.
        load_s: opening the engine: verification, the runtime's import, compilation, and ε_0 if it was not stored.
        gemm_gflops: 10⁹ operations per second of a float32 matrix product in NumPy, on as many threads, in this run.
            None in other precisions than fp32, and for providers that do not compute on the processor.
        cases: one per pair of batch and draws.
        peak_memory_bytes: largest resident size of the process, over all cases.
    """

    engine: Path
    checkpoint: str
    provider: str
    precision: str
    threads: int
    memedge: str
    processor: str
    date: str
    load: float | None
    load_s: float
    gemm_gflops: float | None
    cases: list[Case]
    peak_memory_bytes: int


def measure(
    path: Path | None,
    provider: str,
    precision: str | None,
    threads: int | None,
    batches: Sequence[int],
    draws: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bench:
    """Measure every pair of `batches` and `draws` (default: the engine's own), one after the other.

    `progress` is called with (cases done, cases in all). Raises EngineError as `Detector.load` does.
    """
    date, load = datetime.now(UTC).isoformat(timespec="seconds"), load_average()
    start = time.perf_counter()
    engine = Engine.open(path or EMBEDDED_ENGINE, provider, precision, threads)
    load_s = time.perf_counter() - start
    engine.backend.record(engine.rows_per_call)
    backend, manifest = engine.backend, engine.directory.manifest
    on_gpu = PROVIDERS[backend.provider].on_gpu
    comparable = not on_gpu and backend.precision == "fp32"  # NumPy's matrix products are the processor's, in float32
    cases, peaks = [], []
    pairs = list(product(draws or [engine.draws], batches))
    for done, (count, batch) in enumerate(pairs):
        if progress:
            progress(done, len(pairs))
        cases.append(_case(engine, batch, count))
        if comparable:
            peaks.append(gemm_gflops(backend.threads, GEMM_SECONDS))
    peak = max(peaks, default=None)
    return Bench(
        engine=engine.directory.path,
        checkpoint=manifest.source.id,
        provider=backend.provider,
        precision=backend.precision,
        threads=backend.threads,
        memedge=memedge.__version__,
        processor=probe.driver().gpus[0].name if on_gpu and probe.driver().gpus else processor_name(),
        date=date,
        load=load,
        load_s=load_s,
        gemm_gflops=peak,
        cases=[case if peak is None else _compare(case, peak) for case in cases],
        peak_memory_bytes=peak_memory(),
    )


def _case(engine: Engine, batch: int, draws: int) -> Case:
    """Measure one case; its gemm_fraction is left open."""
    meter = Meter(engine.backend, engine.draws, draws)
    detector = Detector(with_draws(engine, meter))
    prompts = [f"picture of a red bicycle, number {i}" for i in range(batch)]
    first = _timed(detector, prompts)
    meter.reset()
    seconds: list[float] = []
    host: list[float] = []
    while len(seconds) < LEAST_CALLS or (len(seconds) < CALLS and sum(seconds) < SECONDS):
        before = meter.seconds
        seconds.append(_timed(detector, prompts))
        host.append(seconds[-1] - (meter.seconds - before))
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]).tolist()
    return Case(
        batch=batch,
        draws=draws,
        calls=len(seconds),
        first_call_s=first,
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        prompts_per_s=batch * len(seconds) / sum(seconds),
        flops_per_prompt=round(meter.flops(engine.directory.manifest.flops) / (batch * len(seconds))),
        gemm_fraction=None,
        host_us=1e6 * float(np.median(host)),
        host_fraction=float(np.median(host)) / p50,
    )


def _compare(case: Case, gemm: float) -> Case:
    """Return the case with its share of the peak, unless the case shows that it is none."""
    share = case.batch * case.flops_per_prompt / case.p50_s / (1e9 * gemm)
    return dataclasses.replace(case, gemm_fraction=share if share <= 1 else None)


def _timed(detector: Detector, prompts: list[str]) -> float:
    start = time.perf_counter()
    detector.score(prompts)
    return time.perf_counter() - start


def with_draws(engine: Engine, meter: "Meter") -> Engine:
    """Return the engine on the meter, with the meter's number of draws."""
    manifest = msgspec.structs.replace(engine.directory.manifest, draws=meter.draws)
    return Engine(dataclasses.replace(engine.directory, manifest=manifest), meter, engine.uncond)


class Meter(Backend):
    """A backend that counts what another one does, and pretends that it has other draws.

    Each draw stands for one of the backend's own, over and over: how long a row takes does not depend on its noise.
    A backend that prepares itself for its own number of draws, as OpenVINO does for small models, stays so.
    """

    def __init__(self, backend: Backend, own_draws: int, draws: int):
        self.provider, self.precision = backend.provider, backend.precision
        self.threads, self.identity, self.most_rows = backend.threads, backend.identity, backend.most_rows
        self.one_shape = backend.one_shape
        self.draws = draws
        self._backend, self._own_draws = backend, own_draws
        self.reset()

    def reset(self) -> None:
        self.seconds, self._prompts, self._rows = 0.0, 0, 0

    def flops(self, each: Flops) -> int:
        """Return the operations of all calls since the reset."""
        return self._prompts * each.text_encoder + self._rows * each.remaining

    def own_rows(self, row: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return which cached rows of the backend stand for rows of the pretended draws."""
        step, draw = np.divmod(row, self.draws)
        own: npt.NDArray[np.int64] = step * self._own_draws + draw % self._own_draws
        return own

    @property
    def memory(self) -> Memory:
        return self._backend.memory

    def record(self, most: int) -> None:
        self._backend.record(most)

    def padded(self, rows: int, most: int) -> int:
        return self._backend.padded(rows, most)

    def encode(self, ids: Indices) -> Tensor:
        start = time.perf_counter()
        states = self._backend.encode(ids)
        self.seconds += time.perf_counter() - start
        self._prompts += len(ids)
        return states

    def predict(self, states: Tensor, prompt: Indices, row: Indices) -> Tensor:
        return self._backend.predict(states, prompt, self.own_rows(row))

    def statistics(self, states: Tensor, prompt: Indices, row: Indices, uncond: Tensor, operands: str) -> Floats:
        start = time.perf_counter()
        found = self._backend.statistics(states, prompt, self.own_rows(row), uncond, operands)
        self.seconds += time.perf_counter() - start
        self._rows += len(row)
        return found
