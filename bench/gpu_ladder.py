"""Seconds per list of prompts on one NVIDIA GPU: the published method in torch, fp16, and the engine; in one run.

    python bench/gpu_ladder.py CHECKPOINT [ENGINE] [--provider cuda] [--prompts 1,16] [--draws 1,4] [--rows 0,16]
                               [--rounds N] [--json FILE]

CHECKPOINT is a diffusers directory with ε-prediction, ENGINE its export; without one torch alone is timed. Rungs:
- published: 4 UNet calls on [unconditional, conditional] × prompts × draws, as the released code makes
- minimal: the 2 calls that the formulas need
- the same in channels-last, which is another layout of the same numbers
- engine: `Detector.score` whole, with at most so many rows per UNet call (0: what the engine chooses by itself)
Torch encodes the prompts and "" in each call, in fp16, its attention is scaled_dot_product_attention, and nothing is
compiled or captured. Times are medians of interleaved rounds, up to the results on the host; each rung is called twice
before. Where the engine is wrong the bench fails: its own draws must agree with torch in fp32 within the precision
table. With other draws than its own it runs those over and over: what a row takes does not depend on its noise.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, CLIPTextModel

from memedge import Detector
from memedge.decision.rule import DEFAULT_ALIGNMENT, DEFAULT_OPERANDS
from memedge.engine.precision import ENGINE
from memedge.measure.latency import Meter, with_draws

SEED = 42  # of the noise, as `memedge export` draws it
CALLS = {"published": 4, "minimal": 2}


@dataclass
class Rung:
    """One rung; seconds are for the whole list of prompts."""

    prompts: int
    draws: int
    rung: str
    median_s: float
    best_s: float
    first_s: float


class Torch:
    """A checkpoint on a device."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, *, channels_last: bool = False):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.device, self.dtype = device, dtype
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).eval().to(device)
        self.unet.to(memory_format=layout)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        scheduler.set_timesteps(50)
        self.timesteps = scheduler.timesteps[[0, -3]].to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[str], draws: int, calls: int) -> tuple[np.ndarray, np.ndarray]:
        """Return norm and alignment of each prompt: the means over the draws."""
        config = self.unet.config
        shape = (draws, config.in_channels, config.sample_size, config.sample_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(self.device, self.dtype)
        states = self.encode([""] * len(prompts) + prompts).repeat_interleave(draws, 0)
        sample = noise.repeat(2 * len(prompts), 1, 1, 1)
        outputs = [self.unet(sample, t, states, return_dict=False)[0].float().chunk(2) for t in self.timesteps]
        for t in self.timesteps.repeat(calls // 2 - 1):
            self.unet(sample, t, states, return_dict=False)
        (uncond_first, cond_first), (uncond, cond) = outputs
        norm = (cond_first - uncond_first).flatten(1).norm(dim=1)
        cosine = F.cosine_similarity(uncond, cond - uncond, dim=1).mean((1, 2))
        return tuple(x.view(len(prompts), draws).mean(1).cpu().numpy() for x in (norm, cosine))

    def encode(self, prompts: list[str]) -> torch.Tensor:
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.device))[0]


def captions(count: int) -> list[str]:
    return [f"a photo of a {['cat', 'ship', 'clock'][i % 3]}, number {i}" for i in range(count)]


def compare(name: str, found: tuple[Any, Any], expected: tuple[Any, Any], precision: str | None) -> None:
    """Say how far a rung is from torch in fp32; fail if a precision is given and promises more."""
    norm = float(np.abs(found[0] / expected[0] - 1).max())
    alignment = float(np.abs(found[1] - expected[1]).max())
    print(f"{name}: norm {norm:.1e} (relative), alignment {alignment:.1e} from torch in fp32", flush=True)
    if precision and not (norm <= ENGINE[precision].norm and alignment <= ENGINE[precision].alignment):
        raise SystemExit(f"{name} is not the published method")


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call: its first, then one per round, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        seconds[name].append(_seconds(call))
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(_seconds(call))
    return seconds


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def engine_calls(detector: Detector, prompts: list[str], draws: int, rows: list[int]) -> dict[str, Callable[[], Any]]:
    """Return a whole score for each number of rows per UNet call that there are rows for."""
    calls = {}
    for count in rows:
        engine = detector.engine
        own = with_draws(engine, Meter(engine.backend, engine.draws, draws))
        own.rows_per_call = min(count or own.rows_per_call, 2 * draws * len(prompts))
        calls[f"engine, {own.rows_per_call} rows"] = partial(Detector(own).score, prompts)
    return calls


def show(rungs: list[Rung]) -> None:
    table = Table("prompts", "draws", "rung", box=None)
    for column in ("median ms", "best ms", "first ms", "× published", "× minimal"):
        table.add_column(column, justify="right")
    base = {(r.prompts, r.draws, r.rung): r.median_s for r in rungs}
    for r in rungs:
        times = [f"{1e3 * s:.2f}" for s in (r.median_s, r.best_s, r.first_s)]
        ratios = [f"{r.median_s / base[r.prompts, r.draws, rung]:.3f}" for rung in CALLS]
        table.add_row(str(r.prompts), str(r.draws), r.rung, *times, *ratios)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("engine", type=Path, nargs="?")
    parser.add_argument("--provider", default="cuda")
    parser.add_argument("--device", default="cuda", help="torch's; cpu is how this is tested")
    parser.add_argument("--prompts", default="1,16")
    parser.add_argument("--draws", default="1,4")
    parser.add_argument("--rows", default="0,8,16,32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prompts, draws, rows = (
        [int(n) for n in text.split(",")] for text in (arguments.prompts, arguments.draws, arguments.rows)
    )
    torch.backends.cudnn.allow_tf32 = False  # in the reference; fp16 is not concerned
    detector = Detector.load(arguments.engine, arguments.provider) if arguments.engine else None

    own = detector.info.manifest.draws if detector else draws[0]
    expected = Torch(arguments.checkpoint, arguments.device, torch.float32)(captions(4), own, 2)
    torch.cuda.empty_cache()
    layouts = {
        name: Torch(arguments.checkpoint, arguments.device, torch.float16, channels_last=bool(name))
        for name in ("", ", channels-last")
    }
    for name, model in layouts.items():
        compare(f"torch fp16{name}", model(captions(4), own, 2), expected, None)
    if detector:
        scores = detector.score(captions(4), alignment=DEFAULT_ALIGNMENT, operands=DEFAULT_OPERANDS)
        compare(detector.info.key, (scores.norm, scores.alignment), expected, detector.info.precision)

    rungs: list[Rung] = []
    for draw in draws:
        for count in prompts:
            texts = captions(count)
            calls: dict[str, Callable[[], Any]] = {
                rung + name: partial(model, texts, draw, needed)
                for name, model in layouts.items()
                for rung, needed in CALLS.items()
            }
            if detector:
                calls |= engine_calls(detector, texts, draw, rows)
            for name, (first, *rest) in timed(calls, arguments.rounds).items():
                rungs.append(Rung(count, draw, name, median(rest), min(rest), first))
                print(f"{count} prompts, {draw} draws, {name}: {1e3 * rungs[-1].median_s:.2f} ms", flush=True)
            if arguments.json:  # after each case, because later ones are longer
                arguments.json.write_text(json.dumps([asdict(rung) for rung in rungs], indent=1) + "\n")
    show(rungs)
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, median of {arguments.rounds} rounds")


if __name__ == "__main__":
    main()
