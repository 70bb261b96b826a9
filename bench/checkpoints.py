"""Export of every architecture: distance from the original, agreement with diffusers' own pipeline, size, time, memory.

    python bench/checkpoints.py [--names sd1,sdxl] [--precision fp32,fp16] [--full] [--work DIR] [--json FILE]

Checkpoints have random weights (bench/architectures.py), in the public architectures' file layouts; small ones, or with
--full the real sizes. Each is exported by the command line in a process of its own, whose time and peak memory are
shown: memory also as a multiple of the weights in float32. "Parity" is what the export itself measured and stored;
"agreement" is against bench/reference.py, which runs diffusers' pipeline: its text encoding, its UNet, its scheduler.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import architectures
import numpy as np
import reference
from rich.console import Console
from rich.table import Table

from memedge import Detector
from memedge.export.quiet_libraries import quiet

PROMPTS = ["a photo of a star!", "zebra on skis, oil painting"]


def measure(checkpoint: Path, precision: str, engine: Path) -> dict[str, object]:
    """Export in a process of its own; return what the table shows."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "memedge", "export", checkpoint, "-o", engine, "--precision", precision, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    manifest = json.loads(process.stdout.read() or "null")
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"export of {checkpoint} in {precision} failed")
    seconds, peak = time.perf_counter() - start, usage.ru_maxrss * 1024
    with quiet():
        expected = reference.statistics(checkpoint, PROMPTS, 1)
    scores = Detector.load(engine, "cpu").score(PROMPTS)
    norm, alignment = (np.array([e[key] for e in expected]) for key in ("norm", "uncond_delta/channel"))
    return {
        "architecture": checkpoint.name,
        "precision": precision,
        "parity": [manifest["parity"]["norm_relative"], manifest["parity"]["alignment_absolute"]],
        "agreement": [float(np.abs(scores.norm / norm - 1).max()), float(np.abs(scores.alignment - alignment).max())],
        "bytes": sum(entry["size"] for entry in manifest["files"].values()),
        "seconds": seconds,
        "peak_bytes": peak,
        "weights_bytes": sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default=",".join(architectures.ARCHITECTURES))
    parser.add_argument("--precision", default="fp32,fp16")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--work", type=Path, help="where checkpoints and engines are kept; default: nowhere")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        for name in arguments.names.split(","):
            checkpoint = work / name
            if not checkpoint.exists():
                with quiet():
                    architectures.build(name, checkpoint, full=arguments.full)
            for precision in arguments.precision.split(","):
                engine = work / f"{name}-{precision}"
                shutil.rmtree(engine, ignore_errors=True)
                results.append(measure(checkpoint, precision, engine))
    table = Table("architecture", "precision", "parity", "agreement", "MB", "s", "peak GB", "× weights", box=None)
    for r in results:
        pairs = (" / ".join(f"{value:.1e}" for value in r[key]) for key in ("parity", "agreement"))
        peak = r["peak_bytes"]
        numbers = (
            f"{r['bytes'] / 1e6:.1f}",
            f"{r['seconds']:.0f}",
            f"{peak / 1e9:.2f}",
            f"{peak / r['weights_bytes']:.1f}",
        )
        table.add_row(r["architecture"], r["precision"], *pairs, *numbers)
    console = Console(width=120)
    console.print(table)
    console.print(
        "Pairs: norm, relative / alignment, absolute. Random weights; a small model's peak is the libraries'."
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
