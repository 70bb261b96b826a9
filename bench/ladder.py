"""Seconds per verdict, rung by rung, from the published code's cost to memedge's: one process, same threads, n = 1.

    python bench/ladder.py [--model emoji|sd14] [--precision fp32,bf16] [--int8 ENGINE] [--work DIR] [--json FILE]

Rungs, each with all that the one before leaves out:
- published: torch, 4 UNet calls on [unconditional, conditional], as the released code makes
- minimal: torch, the 2 calls that the formulas need
- cached: torch, unconditional predictions computed once
- prefix: torch, all that no prompt changes computed once
- engine: the engine, `Detector.score` whole (tokenizer, text encoder, UNet, reduction), for each provider
- early_proven, early_conformal, early_screen: `Detector.detect` on a mix of prompts of which 1 % are memorized
Torch computes bf16 in channels-last, its fastest layout. Times are medians of interleaved rounds, each rung called once
before. Where a rung is wrong the bench fails: norm and alignment must agree within the precision table.

sd14 is Stable Diffusion 1.4's architecture with random weights (bench/architectures.py). It is built and exported into
--work, if it is not there, which takes 5 minutes and 8 GB of disk. Its early decisions are not its own: the shares of
verdicts that take no pass, one and two are those of the embedded engine on the same mix; what each takes is measured.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch_stages import Torch

from memedge import Detector
from memedge.decision.rule import DEFAULT_ALIGNMENT, DEFAULT_OPERANDS
from memedge.embedded import captions
from memedge.engine.openvino import precisions
from memedge.engine.precision import ENGINE

EMOJI = Path(__file__).parent / "tiny" / "emoji"
ROUNDS = {"emoji": 9, "sd14": 2}
MEMORIZED_SHARE = 0.01
MOST = 200  # captions of each kind, for the share of verdicts that take one pass
PROMPT = "skull icon"
EARLY = ("proven", "conformal", "screen")


@dataclass
class Rung:
    """One rung; `skipped_share` is the share of conditional UNet passes left out by early decisions."""

    model: str
    backend: str
    precision: str
    stage: str
    seconds_per_verdict: float
    skipped_share: float = 0.0


def held_out() -> tuple[list[str], list[str]]:
    """Return so many clean and memorized held-out captions of the embedded model, evenly over the file."""
    rows = [row for row in captions() if row.split == "held-out"]
    kinds = ([row.prompt for row in rows if row.memorized == label] for label in (False, True))
    clean, memorized = ([kind[i * len(kind) // MOST] for i in range(MOST)] for kind in kinds)
    return clean, memorized


def shares(detector: Detector, early: str) -> np.ndarray:
    """Return the shares of verdicts after no whole pass, one and two, on the mix; check that they are those of score().

    The screen may change clean prompts' verdicts from memorized, which costs nothing, and at most α of the others'.
    """
    found = []
    for memorized, prompts in zip((False, True), held_out(), strict=True):
        verdicts, scores = detector.detect(prompts, early), detector.score(prompts)
        changed = np.array([v.memorized for v in verdicts]) != scores.memorized
        allowed = 0 if early == "proven" else detector.info.calibration.conformal.delta * len(prompts) + 2
        if early == "screen" and memorized:
            allowed += detector.info.calibration.screen.alpha * scores.memorized.sum()
        assert changed.sum() <= allowed, f"{changed.sum()} verdicts of early={early} differ from score()"
        whole = np.array([int(v.passes) for v in verdicts])
        found.append([np.mean(whole == 0), np.mean(whole == 1), np.mean(whole >= 2)])
    return np.array(found).T @ (1 - MEMORIZED_SHARE, MEMORIZED_SHARE)


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each call over interleaved rounds; each has been called before."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def engine_calls(detector: Detector, tap: int) -> dict[str, Callable[[], Any]]:
    """Return a whole score, and the parts that a verdict is made of which is decided earlier."""
    engine = detector.engine
    states = engine.encode(engine.tokenize([PROMPT])[0])
    return {
        "engine": lambda: detector.score([PROMPT]),
        "encode": lambda: engine.encode(engine.tokenize([PROMPT])[0]),
        "one_pass": lambda: engine.norm(engine.encode(engine.tokenize([PROMPT])[0])),
        "screen": lambda: engine.changes(states, tap),
    }


PARTS = ("encode", "one_pass", "screen")


def early_seconds(seconds: dict[str, float], key: str, early: str, parts: np.ndarray) -> float:
    """Return what a verdict takes on average, given the shares after no whole pass, one and two."""
    encode, screen, one, two = (seconds[f"{key}/{name}"] for name in ("encode", "screen", "one_pass", "engine"))
    return float(parts @ (encode, one, two)) + (screen if early == "screen" else 0.0)


def agree(name: str, found: tuple[float, float], expected: tuple[float, float], precision: str) -> None:
    """Fail unless norm and alignment agree with fp32 torch within the precision table (int8 is reported)."""
    norm, alignment = abs(found[0] / expected[0] - 1), abs(found[1] - expected[1])
    print(f"{name}: norm {norm:.1e} (relative), alignment {alignment:.1e} from torch fp32", flush=True)
    limit = ENGINE.get(precision)
    # Torch's own bf16 is what the published code runs; its distance is shown, not judged.
    if limit and not name.startswith("torch"):
        assert norm <= limit.norm and alignment <= limit.alignment, f"{name} is not the published method"


def climb(model: str, precision: str, folder: Path, engines: list[tuple[Path, str, str]], expected, threads: int):
    """Return the rungs in one precision and the statistics of fp32 torch, which `expected` is once it is known."""
    reference = Torch(folder, precision)
    stages = reference.stages()
    calls: dict[str, Callable[[], Any]] = {}
    for name, stage in stages.items():
        found = stage(PROMPT)
        expected = expected or found
        agree(f"torch {precision} {name}", found, expected, precision)
        calls[f"torch/{precision}/{name}"] = lambda stage=stage: stage(PROMPT)
    detectors = {}
    for path, provider, own in engines:
        detector = Detector.load(path, provider=provider, precision=own, threads=threads)
        scores = detector.score([PROMPT], alignment=DEFAULT_ALIGNMENT, operands=DEFAULT_OPERANDS)
        agree(f"{provider} {own}", (scores.norm[0], scores.alignment[0]), expected, own)
        detectors[f"{provider}/{own}"] = detector
        tap = decider(f"{provider}/{own}", threads).info.calibration.screen
        for name, call in engine_calls(detector, tap.tap if tap else 1).items():
            call()
            calls[f"{provider}/{own}/{name}"] = call
    seconds = timed(calls, ROUNDS[model])
    rungs = [
        Rung(model, *name.split("/"), seconds_per_verdict=value)
        for name, value in seconds.items()
        if not name.endswith(PARTS)
    ]
    for key in detectors:
        # Decisions are the embedded engine's: a model of random weights has none of its own.
        judge = decider(key, threads)
        for early in EARLY:
            if early == "screen" and judge.info.calibration.screen is None:
                print(f"The embedded engine has no screen for {key}: left out.")
                continue
            parts = shares(judge, early)
            value = early_seconds(seconds, key, early, parts)
            rungs.append(Rung(model, *key.split("/"), f"early_{early}", value, float(parts @ (1, 0.5, 0))))
    return rungs, expected


def decider(key: str, threads: int) -> Detector:
    """Return the embedded engine on a backend, or in fp32 where it has no calibration for it (int8)."""
    provider, precision = key.split("/")
    if precision == "int8":
        precision = "fp32"
    return Detector.load(provider=provider, precision=precision, threads=threads)


def prepare(model: str, work: Path) -> tuple[Path, Path | None]:
    """Return the checkpoint and its engine (None: the embedded one), made if they are not there."""
    if model == "emoji":
        return EMOJI, None
    import architectures

    from memedge.export.export import export

    folder, engine = work / "sd14", work / "sd14-engine"
    if not (folder / "scheduler").is_dir():
        architectures.build("sd1", folder, full=True)
    if not engine.is_dir():
        export(folder, engine, progress=print)
    return folder, engine


def show(rungs: list[Rung], threads: int, rounds: int) -> None:
    table = Table("backend", "precision", "rung", box=None)
    for column in ("s / verdict", "× published", "× minimal", "passes skipped"):
        table.add_column(column, justify="right")
    base = {(r.precision, r.stage): r.seconds_per_verdict for r in rungs if r.backend == "torch"}
    for r in rungs:
        precision = r.precision if (r.precision, "published") in base else "fp32"
        ratios = [r.seconds_per_verdict / base[precision, stage] for stage in ("published", "minimal")]
        cells = [f"{r.seconds_per_verdict:.4g}", *(f"{ratio:.3f}" for ratio in ratios), f"{r.skipped_share:.1%}"]
        table.add_row(r.backend, r.precision, r.stage, *cells)
    Console(width=120).print(table)
    load = os.getloadavg()[0]
    print(f"{rungs[0].model}, {threads} thread(s), n = 1, median of {rounds} interleaved rounds, load {load:.1f}")
    print("bf16 is measured against torch in bf16 (channels-last), int8 against torch in fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("emoji", "sd14"), default="emoji")
    parser.add_argument("--precision", default="fp32,bf16", help="bf16 is left out where the CPU doesn't compute in it")
    parser.add_argument("--int8", type=Path, help="an engine of the same model, exported in int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("ladder-work"), help="where sd14 is kept")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder, engine = prepare(arguments.model, arguments.work)
    able = precisions("fp32")
    rungs: list[Rung] = []
    expected = None
    for precision in arguments.precision.split(","):
        if precision == "bf16" and precision not in able:
            print("This CPU does not compute in bf16: left out.")
            continue
        engines = [(engine, "openvino", precision)]
        if precision == "fp32":
            engines.insert(0, (engine, "cpu", "fp32"))
            engines += [(arguments.int8, "cpu", "int8")] if arguments.int8 else []
        found, expected = climb(arguments.model, precision, folder, engines, expected, arguments.threads)
        rungs += found
        gc.collect()  # before the next precision's models come
    show(rungs, arguments.threads, ROUNDS[arguments.model])
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(rung) for rung in rungs], indent=1) + "\n")


if __name__ == "__main__":
    main()
