"""What the GPU providers do on this machine: agreement, latency, transfers, CUDA graphs, and whether memory stays flat.

    python bench/gpu.py [ENGINE_DIR] [--provider NAME ...] [--calls N] [--json FILE]

Default: the embedded engine, on every GPU provider that can run here; TensorRT needs plans (`memedge build`). The
provider `cpu` runs the same measurements on the processor, which is how they are tested where there is no GPU.

- agreement: with provider `cpu` on the same engine, beside what engine/precision.py allows.
- latency: `memedge bench`'s, per batch; the first call of a shape apart.
- screen: one prompt's changes at each tap, the cheapest first; a calibrated screen uses one of them.
- transfers: bytes to and from the device per call, counted at its memory.
- graph: the UNet and the reduction as a CUDA graph, over the same launched one by one, medians of alternating rounds;
  with provider `cuda`, after over before one prompt's calls are recorded.
- soak: `--calls` calls of changing shapes; memory of the process and of the GPU from the first tenth to the end.

Exits with 1 if a provider disagrees by more than its precision allows, or if memory grows.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from memedge import Detector, MemedgeError
from memedge.decision.rule import DEFAULT_ALIGNMENT, DEFAULT_OPERANDS
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine import probe
from memedge.engine.engine import Engine
from memedge.engine.memory import reduced
from memedge.engine.precision import ENGINE
from memedge.engine.providers import PROVIDERS
from memedge.measure.latency import measure

PROMPTS = [f"a photo of a {thing}, number {i}" for i, thing in enumerate(["cat", "red bicycle", "ship", "clock"] * 8)]
BATCHES = (1, 4, 16)
SHAPES = (1, 2, 3, 5, 8, 1, 16, 4)  # prompts per call of the soak
ROUNDS = 50
MEBIBYTE = 1 << 20
GROWTH = 16.0  # MiB that memory may grow by in the soak: allocators keep pieces
TIMES = (("first", "first"), ("median", "p50"), ("95 %", "p95"))


def agreement(path: Path, provider: str) -> dict[str, float | None]:
    """Return the largest distance from provider `cpu`, and what the precision table allows."""
    own, true = Detector.load(path, provider), Detector.load(path, "cpu")
    # Of one cosine, whatever either is calibrated for.
    published = {"alignment": DEFAULT_ALIGNMENT, "operands": DEFAULT_OPERANDS}
    found, expected = own.score(PROMPTS, **published), true.score(PROMPTS, **published)
    allowed = ENGINE.get(own.info.precision)
    return {
        "norm_relative": float(np.abs(found.norm / expected.norm - 1).max()),
        "alignment_absolute": float(np.abs(found.alignment - expected.alignment).max()),
        "allowed_norm": allowed.norm if allowed else None,
        "allowed_alignment": allowed.alignment if allowed else None,
    }


def screen(engine: Engine) -> list[float]:
    """Return the median of one prompt's changes at each tap, in seconds; empty where there is no screen to be had."""
    if not engine.backend.screens:
        return []
    states = engine.encode(engine.tokenize(PROMPTS[:1])[0])
    found = []
    for tap in range(1, 1 + len(engine.directory.manifest.taps)):
        seconds = []
        for _ in range(3 + ROUNDS):  # plain, captured; from then on by its graph, where there are any
            start = time.perf_counter()
            engine.changes(states, tap)
            seconds.append(time.perf_counter() - start)
        found.append(float(np.median(seconds[3:])))
    return found


def transfers(engine: Engine) -> dict[str, list[int]]:
    """Return the bytes of each transfer of one detection of one prompt, after the first."""
    memory, detector = engine.backend.memory, Detector(engine)
    detector.score(PROMPTS[:1])
    sizes: dict[str, list[int]] = {"to_device": [], "from_device": []}

    def counted(original: Callable[..., Any], place: str) -> Callable[..., Any]:
        def call(thing: Any, *rest: Any) -> Any:  # an array or a tensor first
            sizes[place].append(thing.nbytes)
            return original(thing, *rest)

        return call

    # A GPU's upload is an allocation and a write.
    writing = ("write",) if memory.device == "cuda" else ("upload", "write")
    methods = {**dict.fromkeys(writing, "to_device"), "download": "from_device"}
    for name, place in methods.items():
        setattr(memory, name, counted(getattr(memory, name), place))
    try:
        detector.score(PROMPTS[:1])
    finally:
        for name in methods:
            delattr(memory, name)
    return sizes


def graph(engine: Engine) -> dict[str, float] | None:
    """Return the medians of one prompt's UNet calls and reduction as a CUDA graph and not; None without graphs."""
    if engine.backend.provider == "cuda":
        return recorded(engine)
    if not engine.backend.provider.startswith("tensorrt"):
        return None
    states = engine.encode(engine.tokenize(PROMPTS[:1])[0]).tensor
    prompt, row = np.zeros(engine.passes, dtype=np.int64), np.arange(engine.passes)
    count = min(engine.passes, engine.rows_per_call)
    prompt, row = prompt[:count], row[:count]
    seconds: dict[str, list[float]] = {"plain": [], "graph": []}
    for _ in range(ROUNDS):
        for name, call in (
            ("graph", lambda: engine.backend.statistics(states, prompt, row, engine.uncond, "uncond_delta")),
            ("plain", lambda: plain(engine, states, prompt, row)),
        ):
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return medians(seconds)


def recorded(engine: Engine) -> dict[str, float]:
    """Return the medians of one prompt's statistics before ONNX Runtime's calls are recorded, and after."""
    states = engine.encode(engine.tokenize(PROMPTS[:1])[0])
    seconds: dict[str, list[float]] = {"plain": [], "graph": []}
    for name, values in seconds.items():
        if name == "graph":
            engine.backend.record(engine.rows_per_call)
        engine.statistics(states, DEFAULT_ALIGNMENT, DEFAULT_OPERANDS)
        for _ in range(ROUNDS):
            start = time.perf_counter()
            engine.statistics(states, DEFAULT_ALIGNMENT, DEFAULT_OPERANDS)
            values.append(time.perf_counter() - start)
    return medians(seconds)


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    found = {name: float(np.median(values)) for name, values in seconds.items()}
    return {"plain_s": found["plain"], "graph_s": found["graph"], "ratio": found["graph"] / found["plain"]}


def plain(engine: Engine, states: Any, prompt: np.ndarray, row: np.ndarray) -> None:
    memory = engine.backend.memory
    prediction = engine.backend.predict(states, prompt, row)
    reduced(memory, prediction, engine.uncond, memory.upload(row), "uncond_delta")


def soak(engine: Engine, calls: int, console: Console) -> dict[str, Any]:
    """Score that many lists of changing length; return memory in MiB after the first tenth and at the end."""
    detector = Detector(engine)
    marks = {max(1, calls // 10), calls}
    process, device = [], []
    start = time.perf_counter()
    for call in track(range(1, calls + 1), "soak", console=console):
        detector.score(PROMPTS[: SHAPES[call % len(SHAPES)]])
        if call in marks:
            process.append(resident())
            device.append(device_memory(engine))
    return {
        "calls": calls,
        "seconds": time.perf_counter() - start,
        "process_MiB": process,
        "device_MiB": device if None not in device else None,
    }


def resident() -> float:
    """Return this process's resident size now, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def device_memory(engine: Engine) -> float | None:
    """Return what is taken of the GPU's memory, by whatever process, in MiB; None on the processor."""
    if engine.backend.memory.device != "cuda":
        return None
    from cuda.bindings import driver

    with engine.backend.memory.current():
        error, free, total = driver.cuMemGetInfo()
    return (total - free) / MEBIBYTE if error == driver.CUresult.CUDA_SUCCESS else None


def run(path: Path, provider: str, calls: int, console: Console) -> dict[str, Any]:
    """Measure one provider."""
    engine = Engine.open(path, provider, None, None)
    return {
        "identity": engine.backend.identity,
        "precision": engine.backend.precision,
        "agreement": agreement(path, provider),
        "screen_s": screen(engine),
        "transfers": transfers(engine),
        "graph": graph(engine),
        "latency": [
            {"batch": case.batch, "first_s": case.first_call_s, "p50_s": case.p50_s, "p95_s": case.p95_s}
            for case in measure(path, provider, None, None, BATCHES).cases
        ],
        "soak": soak(engine, calls, console),
    }


def problems(result: dict[str, Any]) -> list[str]:
    """Return what is wrong with a provider, one sentence each."""
    found, agreed, soaked = [], result["agreement"], result["soak"]
    for name, allowed in (("norm_relative", "allowed_norm"), ("alignment_absolute", "allowed_alignment")):
        if agreed[allowed] is not None and not agreed[name] <= agreed[allowed]:
            found.append(f"It differs from cpu by {agreed[name]:.1e} ({name}), and {agreed[allowed]:g} is allowed.")
    for place in ("process", "device"):
        sizes = soaked[f"{place}_MiB"]
        if sizes and sizes[-1] > sizes[0] + GROWTH:
            found.append(f"Memory ({place}) grew by {sizes[-1] - sizes[0]:.0f} MiB in {soaked['calls']} calls.")
    return found


def show(provider: str, result: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{provider}-{result['precision']}: {result['identity']}", show_header=False, box=None)
    agreed = result["agreement"]
    table.add_row(
        "agreement with cpu",
        f"norm {agreed['norm_relative']:.1e} (allowed {agreed['allowed_norm']}), "
        f"alignment {agreed['alignment_absolute']:.1e} (allowed {agreed['allowed_alignment']})",
    )
    for case in result["latency"]:
        times = ", ".join(f"{name} {1e3 * case[f'{key}_s']:.2f} ms" for name, key in TIMES)
        table.add_row(f"{case['batch']} prompts", times)
    if taps := result["screen_s"]:
        table.add_row("1 prompt, screen", ", ".join(f"tap {i} {1e3 * s:.2f} ms" for i, s in enumerate(taps, start=1)))
    for place, sizes in result["transfers"].items():
        table.add_row(place.replace("_", " "), f"{sum(sizes)} bytes in {len(sizes)} transfers")
    if result["graph"]:
        table.add_row("CUDA graph / plain", f"{result['graph']['ratio']:.3f}")
    soaked = result["soak"]
    for place in ("process", "device"):
        if sizes := soaked[f"{place}_MiB"]:
            table.add_row(f"{place} memory", f"{sizes[0]:.1f} → {sizes[-1]:.1f} MiB over {soaked['calls']} calls")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", nargs="?", type=Path, default=EMBEDDED_ENGINE)
    parser.add_argument("--provider", action="append", help="default: every GPU provider that can run here")
    parser.add_argument("--calls", type=int, default=10_000, help="of the soak")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    results, failed = {}, False
    for gpu in probe.driver().gpus:
        console.print(f"{gpu.name}, {gpu.target}, {gpu.memory / 2**30:.0f} GiB", markup=False)
    for provider in arguments.provider or [row.name for row in PROVIDERS.values() if row.on_gpu]:
        try:
            results[provider] = run(arguments.engine, provider, arguments.calls, console)
        except MemedgeError as error:
            console.print(f"{provider}: not measured: {error}", markup=False)
            continue
        show(provider, results[provider], Console())
        for problem in (wrong := problems(results[provider])):
            console.print(f"{provider}: {problem}", markup=False)
        failed = failed or bool(wrong)
    if arguments.json:
        gpus = [gpu.name for gpu in probe.driver().gpus]
        arguments.json.write_text(json.dumps({"gpus": gpus, "providers": results}, indent=2))
    if failed or not results:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
