"""What compiling Stable Diffusion 1.4's size for GPUs takes: TensorRT-RTX plans, built on this machine, without a GPU.

    python bench/build_rtx.py WORK [--targets SM75,SM89,SM120] [--engine ENGINE_DIR]

Makes a checkpoint with random weights (bench/architectures.py) in the folder WORK, exports it in fp16 (minutes, and
4 GB of disk for the checkpoint, 2 for the engine and as much for each target), and builds its plans, each target in a
process of its own, whose peak memory is then its alone. With --engine, an engine that is there already is built
instead. Prints a line per plan. Times do not depend on the weights; how fast plans run can only be measured on the
GPUs.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def export(work: Path) -> Path:
    """Return the fp16 engine in `work`, made if it is not there."""
    engine, checkpoint = work / "engine", work / "checkpoint"
    if not engine.exists():
        run(Path(__file__).with_name("architectures.py"), "sd1", checkpoint, "--full")
        run("-m", "memedge", "export", checkpoint, "-o", engine, "--precision", "fp16")
    return engine


def run(*arguments: object) -> str:
    """Run Python; its output. What it says on stderr is seen."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True)
    print(f"{' '.join(map(str, arguments))}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--targets", default="SM75,SM89,SM120")
    parser.add_argument("--engine", type=Path)
    arguments = parser.parse_args()
    engine = arguments.engine or export(arguments.work)
    print("plan                                          rows  seconds  peak GB  size GB")
    for target in arguments.targets.split(","):
        command = ("-m", "memedge", "build", engine, "--provider", "tensorrt-rtx", "--gpu", target, "--json")
        for p in json.loads(run(*command)):
            name = f"{p['component']}-{p['backend']}-{p['target']}-{p['version']}"
            print(
                f"{name:44} {p['most']:5} {p['seconds']:8.1f} {p['peak_memory'] / 1e9:8.2f} {p['size'] / 1e9:8.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
