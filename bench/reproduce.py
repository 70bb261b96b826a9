"""The papers' tables on a model of yours: AUC and TPR of every statistic with intervals, beside the published figures.

    python bench/reproduce.py --model CompVis/stable-diffusion-v1-4 --memorized FILE --clean FILE [--draws 1 4 16]

Every prompt is evaluated once with the largest number of draws; fewer draws are the first of these, which are the noise
of an engine exported with that many. For each n: the norm alone, the alignment alone, and the score with the weights
published for the model's family; where none are, with (1, 1); and with those of the engine's own calibration, if it has
one for what runs and for the published cosine. Higher means memorized: where nothing is published and the calibration's
weight of the alignment is negative, the alignment alone is taken negative too.

TPRs are given by two conventions, as the papers do not say which is theirs: strict, at an FPR of at most 1 (3) %, and
nearest, at the FPR nearest to it. Intervals are the 2.5 and 97.5 percentiles of 2000 resamples, positives and negatives
resampled separately. Seconds are per 10 prompts: the median time of a UNet row, with its share of the text encoder,
times the rows that the statistic needs (n for the norm or the alignment alone, else 2n). Peak memory is of the process
that scores.

OUTPUT.json (everything, each prompt's statistics on each draw too) and the tables as Markdown beside it appear at the
end. Until then OUTPUT.partial.jsonl holds what is measured, and the same command goes on from there after it was cut
off.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from comparison import Prompt, evaluate, markdown

from memedge.commands.terminal import progress_bar
from memedge.decision.rule import DEFAULT_ALIGNMENT, DEFAULT_OPERANDS
from memedge.detector import Detector
from memedge.engine import atomic
from memedge.engine.engine import Engine
from memedge.engine.errors import InputError, MemedgeError
from memedge.engine.machine import peak_memory
from memedge.engine.manifest import FILE_NAME, read_manifest
from memedge.prompts.files import read_prompts

FEWEST = 2  # prompts per list: of one, all resamples are the same


@dataclass(frozen=True)
class Batch:
    """What one call measured of B prompts: norm and alignment [B][draw], and what it took."""

    prompts: list[str]
    norm: list[list[float]]
    alignment: list[list[float]]
    truncated: list[bool]
    seconds: float
    peak_memory_bytes: int


class Journal:
    """What is measured so far: a line that names the model, one that names the engine, one per batch.

    There is a file from `begin` on. `continued` says that it was there before, `batches` what it held.
    """

    def __init__(self, path: Path, model: str):
        """Read the journal if there is one; raises InputError if it is of another model, or no journal."""
        self.path = path
        self.model = model
        self.engine: str | None = None
        self.batches: dict[tuple[str, ...], Batch] = {}
        self.continued = path.exists()
        if not self.continued:
            return
        content = path.read_bytes()
        content = content[: content.rfind(b"\n") + 1]  # a line without its end was cut off
        try:
            head, *lines = map(json.loads, content.splitlines())
            self._refuse("model", head["model"] != model)
            if lines:
                self.engine = lines[0]["engine"]
            batches = msgspec.convert(lines[1:], list[Batch])
        except (ValueError, LookupError, TypeError):
            raise InputError(f"{path} is no journal of this program, or damaged: delete it.") from None
        self.batches = {tuple(batch.prompts): batch for batch in batches}
        atomic.write(path, content)

    def begin(self) -> None:
        """Make the file, before there is an engine to be found by the next run."""
        if not self.path.exists():
            atomic.write(self.path, _line({"model": self.model}))

    def bind(self, fingerprint: str) -> None:
        """Say which engine measures; raises InputError if another one did before."""
        self._refuse("engine, calibration, provider or precision", self.engine not in (None, fingerprint))
        self.begin()
        if self.engine is None:
            self._append({"engine": fingerprint})

    def put(self, batch: Batch) -> Batch:
        self._append(batch)
        return batch

    def _refuse(self, what: str, differs: bool) -> None:
        if differs:
            raise InputError(f"{self.path} is of a run with another {what}: delete it, or name another output with -o.")

    def _append(self, value: object) -> None:
        with self.path.open("ab") as file:
            file.write(_line(value))


def _line(value: object) -> bytes:
    return msgspec.json.encode(value) + b"\n"


def read_lists(memorized: Path, clean: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """Return the prompts of both files, or the first ones.

    Raises:
        InputError: a file cannot be read or has fewer than 2 prompts, or a prompt is in both.
    """
    lists = [list(read_prompts(path))[:limit] for path in (memorized, clean)]
    for path, prompts in zip((memorized, clean), lists, strict=True):
        if len(prompts) < FEWEST:
            raise InputError(f"{path} gives {len(prompts)} prompt: at least {FEWEST} of each kind are needed.")
    if both := set(lists[0]) & set(lists[1]):
        raise InputError(
            f"{memorized} and {clean} have prompts in common ({len(both)}), such as {min(both)[:60]!r}: leave each "
            "in the file where it belongs."
        )
    return lists[0], lists[1]


def find_engine(model: str, target: Path, draws: int, precision: str | None, journal: Journal) -> Path:
    """Return the engine directory: the model itself, or `target`, where it is exported to if an earlier run did not.

    Raises:
        InputError: something else is at `target`, or the engine has too few draws.
        SystemExit: the export failed, and said why.
    """
    path = Path(model)
    if not (path / FILE_NAME).is_file():
        path = target
        if not target.exists():
            journal.begin()
            _export(model, target, draws, precision, journal)
        elif not journal.continued:
            raise InputError(f"{target} is there already: give it as --model if it is the engine, or remove it.")
    if (there := read_manifest(path).draws) < draws:
        raise InputError(
            f"{path} has draws for n = {there} at most, not {draws}: export it with --draws {draws}, or ask for fewer."
        )
    return path


def _export(model: str, target: Path, draws: int, precision: str | None, journal: Journal) -> None:
    """Run `memedge export`, in a process of its own, so that its memory is not counted with what scoring takes."""
    of_graphs = precision if precision in ("fp16", "int8") else "fp32"
    options = ["--draws", str(draws), "--precision", of_graphs]
    done = subprocess.run([sys.executable, "-P", "-m", "memedge", "export", model, "-o", target, *options])
    if done.returncode:
        if not journal.continued:
            journal.path.unlink()
        raise SystemExit(done.returncode)


def measure(
    engine: Engine, prompts: Sequence[str], journal: Journal, progress: Callable[[int, int], None]
) -> list[Batch]:
    """Return the statistics of distinct prompts in their order, those from the journal that are in it."""
    size = max(1, engine.rows_per_call // engine.passes)
    batches = []
    for start in range(0, len(prompts), size):
        progress(start, len(prompts))
        some = list(prompts[start : start + size])
        batches.append(journal.batches.get(tuple(some)) or journal.put(_measure(engine, some)))
    progress(len(prompts), len(prompts))
    return batches


def _measure(engine: Engine, prompts: list[str]) -> Batch:
    start = time.perf_counter()
    ids, truncated = engine.tokenize(prompts)
    norm, alignment = engine.per_draw(engine.encode(ids), DEFAULT_ALIGNMENT, DEFAULT_OPERANDS)
    seconds = time.perf_counter() - start
    return Batch(prompts, norm.tolist(), alignment.tolist(), truncated.tolist(), seconds, peak_memory())


def rows(lists: tuple[list[str], list[str]], batches: list[Batch]) -> list[Prompt]:
    """Return the memorized and the clean prompts with what was measured of them."""
    found = {
        prompt: measured
        for b in batches
        for prompt, *measured in zip(b.prompts, b.truncated, b.norm, b.alignment, strict=True)
    }
    return [
        Prompt(prompt, memorized, *found[prompt])
        for memorized, prompts in zip((True, False), lists, strict=True)
        for prompt in prompts
    ]


def run(arguments: argparse.Namespace) -> None:
    draws = sorted(set(arguments.draws))
    if draws[0] < 1:
        raise InputError(f"--draws {draws[0]} is no number of draws: give at least 1.")
    if arguments.limit is not None and arguments.limit < FEWEST:
        raise InputError(f"--limit {arguments.limit} leaves too few prompts: give at least {FEWEST}.")
    output: Path = arguments.output
    if not output.parent.is_dir() or not output.name:
        raise InputError(f"The folder of {output} does not exist: make it, or name another output with -o.")
    lists = read_lists(arguments.memorized, arguments.clean, arguments.limit)
    journal = Journal(output.with_name(f"{output.name}.partial.jsonl"), arguments.model)
    kept: Path | None = arguments.engine_out
    temporary = output.with_name(f"{output.name}.partial-engine")
    path = find_engine(arguments.model, kept or temporary, draws[-1], arguments.precision, journal)
    engine = Engine.open(path, arguments.provider, arguments.precision, arguments.threads)
    detector = Detector(engine)
    journal.bind(detector.info.fingerprint)
    with progress_bar("scoring") as progress:
        batches = measure(engine, list(dict.fromkeys(lists[0] + lists[1])), journal, progress)
    seconds_per_row = float(np.median([b.seconds / (len(b.prompts) * engine.passes) for b in batches]))
    peak = max(b.peak_memory_bytes for b in batches)
    report = evaluate(arguments.model, detector.info, rows(lists, batches), draws, seconds_per_row, peak)
    text = markdown(report)
    atomic.write(output.with_name(f"{output.name}.json"), msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    atomic.write(output.with_name(f"{output.name}.md"), text.encode())
    journal.path.unlink()
    if path == temporary:
        shutil.rmtree(path)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="what `memedge export` takes, or an engine directory")
    parser.add_argument("--memorized", type=Path, required=True, help="prompts: .txt, .csv, .tsv, .jsonl or .parquet")
    parser.add_argument("--clean", type=Path, required=True)
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N prompts of each file")
    parser.add_argument("--engine-out", type=Path, metavar="DIR", help="keep the exported engine there")
    parser.add_argument("--provider", default="auto")
    parser.add_argument("--precision", help="of the provider; fp16 and int8 are also what is exported")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path, default=Path("reproduction"), help="without .json and .md")
    try:
        run(parser.parse_args())
    except MemedgeError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        print(f"reproduce: {error.filename or 'A file'}: {error.strerror or error}.", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("reproduce: interrupted; the same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
