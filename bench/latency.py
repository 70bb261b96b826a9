"""Seconds per prompt of the embedded engine, beside the published and the minimal method in torch.

    python bench/latency.py [--threads N] [--json FILE]

In one process, on the same threads, in fp32, one prompt at a time, n = 1; medians of interleaved rounds.
- published: what the released code evaluates per prompt: 4 UNet calls on a batch of 2n, and the text encoder
- minimal: the 2 UNet calls on a batch of 2n that the formulas need
- memedge: Detector.score, whole: tokenizer, text encoder, 2 conditional UNet rows, reduction
Memory is the peak resident size of a fresh process that loads one side and scores one prompt.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

MODEL = Path(__file__).parent / "tiny" / "emoji"
ROUNDS = 30
PROMPT = "picture of a red bicycle"


class Torch:
    """The plain implementation: `calls` UNet evaluations of [unconditional, conditional]."""

    def __init__(self, calls: int, threads: int):
        import torch
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.calls = torch, calls
        self.unet = UNet2DConditionModel.from_pretrained(MODEL / "unet", torch_dtype=torch.float32).eval()
        self.text_encoder = CLIPTextModel.from_pretrained(MODEL / "text_encoder", dtype=torch.float32).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
        self.sample = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(42))

    def __call__(self, prompt: str) -> tuple[float, float]:
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(["", prompt], padding="max_length", max_length=length, return_tensors="pt").input_ids
        states = self.text_encoder(ids)[0]
        both = self.torch.cat([self.sample, self.sample])
        for t in (981, 41) * (self.calls // 2):
            e0, ec = self.unet(both, t, states).sample.chunk(2)
            delta = ec - e0
            if t == 981:
                norm = delta.flatten(1).norm(dim=1).mean().item()
        return norm, self.torch.nn.functional.cosine_similarity(e0, delta, dim=1).mean().item()


def memedge(threads: int):
    from memedge import Detector

    detector = Detector.load(threads=threads)

    def score(prompt: str) -> tuple[float, float]:
        scores = detector.score([prompt])
        return scores.norm[0], scores.alignment[0]

    return score


SIDES = {
    "published": lambda threads: Torch(4, threads),
    "minimal": lambda threads: Torch(2, threads),
    "memedge": memedge,
}


def peak_memory(side: str, threads: int) -> float:
    """Return the peak resident size in MB of a fresh process that scores one prompt."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import latency;"
        f"latency.SIDES[{side!r}]({threads})({PROMPT!r});"
        # Not getrusage: a child inherits its parent's peak there.
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    sides = {name: make(arguments.threads) for name, make in SIDES.items()}
    results = {name: side(PROMPT) for name, side in sides.items()}  # the first call of each, not timed
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            start = time.perf_counter()
            side(PROMPT)
            seconds[name].append(time.perf_counter() - start)
    rows = [
        {
            "side": name,
            "milliseconds": 1e3 * median(times),
            "times_published": median(times) / median(seconds["published"]),
            "peak_MB": peak_memory(name, arguments.threads),
            "norm": float(results[name][0]),
            "alignment": float(results[name][1]),
        }
        for name, times in seconds.items()
    ]
    table = Table(*rows[0], box=None)
    for row in rows:
        table.add_row(*(v if isinstance(v, str) else f"{v:.4g}" for v in row.values()))
    Console(width=120).print(table)
    print(f"{arguments.threads} thread(s), median of {ROUNDS} interleaved rounds, embedded model, n = 1, fp32")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
