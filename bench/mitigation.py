"""Does mitigation work, what does it leave of the prompt, what does it cost: the embedded model's memorized captions.

    python bench/mitigation.py DATA_DIR [--captions N | --full] [--seeds N] [--sheet bench/mitigation.png] [--json FILE]
    python bench/mitigation.py DATA_DIR --sweep [--captions N] [--seeds N]

DATA_DIR is what bench/tiny/prepare.py writes. Captions are held-out ones that replicate (memedge/data/captions.csv), 12
of them, of each group in proportion; with --full all of them, which takes some hours. Each method is followed by 16
generations from 16 seeds that it has not seen (bench/tiny/generate.py); those of SAIL start from the noise that it made
from 16 other seeds, a draw each. A second table is of as many frequent captions, which are not memorized, those that
score highest: what a false alarm costs them. --sweep is of steering alone, on *calibration* captions, from which the
scale and the timestep of memedge/integrations/steering.py were chosen.

- nothing: the caption as it is.
- k random words: at random places of the caption (Somepalli et al., 2023).
- norm: the embeddings moved until ‖Δ‖ is at a target (Wen et al.). score: until the detector's score is at a target,
  its threshold or the median of clean calibration captions (Asthana & Belagiannis). Both on the engine's own noise.
  "near": with the distance from the caption's own embeddings penalised; "score to clean, near" is the default.
- SAIL: the noise moved (Jeon et al.).
- steer: guidance of the opposite sign until a timestep, then the usual (Jain et al.), as `guard(action="steer")` does.
  "by score": the scale falls from the usual at the clean median to that of "steer" at the threshold, and on to −4.
  "norm to 1, near, steer": weaker steering of embeddings that were moved too.

Columns: replicas, the share of generations that are copies of a training picture, as bench/tiny/label.py counts them;
memorized, captions with more than half such. Concept: the share of generations that show the caption's concept, so
that it is among the 5 % of concepts that are nearest; once against its drawings by all vendors, and once without the
one that the caption showed most. new: generations that show the concept (by the former) and are no replicas: what a
user wants. norm: on the engine's own noise, which the embeddings were fitted on, and on the noise of
the generations. distance: of embeddings or noise from where they started, relative. Medians, but for the shares.

As a check of the measure, its last row is of no method: noise.
Seconds are per mitigation, by torch and by the engine's gradient graphs in turn, in the same run.
"""

import argparse
import json
import random
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from memedge.decision.rule import Rule
from memedge.detector import Detector
from memedge.embedded import captions
from memedge.integrations.steering import SCALE, UNTIL
from memedge.mitigation.mitigator import MitigatedNoise, Mitigation, Mitigator

TINY = Path(__file__).parent / "tiny"
sys.path.insert(0, str(TINY))

from concepts import Data, Gallery, Judged, judge  # noqa: E402
from dataset import Caption  # noqa: E402
from generate import GUIDANCE, Generator, noise  # noqa: E402
from label import SEEDS  # noqa: E402
from model import Model  # noqa: E402
from pictures import SIZE  # noqa: E402
from vae import decode  # noqa: E402

Results = list[Mitigation] | list[MitigatedNoise]
CHECKPOINT = TINY / "emoji"
WORDS = (1, 2, 4)
SAIL_STEPS = 10
STRONGEST = -4.0  # scale, by score
WEAKER = {"early": -1.0, "until": 750}  # steering, of embeddings that were moved too
SWEPT = [(-1, 650), (-2, 650), (-3, 650), (-2, 550), (-3, 750), (-4, 750), (-4, 850)]


def random_words(caption: str, count: int, vocabulary: list[str], seed: int) -> str:
    """Return a caption with `count` words of the vocabulary put in at random places."""
    chance = random.Random(f"{caption} {count} {seed}")
    words = caption.split()
    for _ in range(count):
        words.insert(chance.randint(0, len(words)), chance.choice(vocabulary))
    return " ".join(words)


@dataclass(frozen=True)
class Run:
    """One method on one caption.

    Attributes:
        pictures: uint8 [16, 64, 64, 3].
        results: what the mitigator returned: one, 16 of SAIL, or none of the other methods.
        seconds: per mitigation; NaN where there is none.
        norms: ‖Δ‖ on the engine's own noise, and its mean on the noise of the generations.
    """

    pictures: np.ndarray
    results: Results
    seconds: float
    norms: tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """What a method would generate from: embeddings [1, L, D], noise [S, 4, 16, 16], and guidance, as of `denoise`."""

    states: torch.Tensor
    noisy: torch.Tensor
    results: Results
    seconds: float
    early: float
    until: float


class Bench:
    def __init__(self, data: Data, model: Model, mitigator: Mitigator, threads: int, seeds: int):
        self.data, self.model, self.mitigator = data, model, mitigator
        self.generator = Generator(model, threads)
        self.detector = Detector.load(provider="cpu", threads=threads)
        self.noise = noise(range(seeds))
        directory = mitigator.engine.directory
        self.own_noise, self.timestep = torch.from_numpy(directory.baseline.sample), directory.manifest.timesteps[0]
        self.empty = self.encode("")

    @torch.inference_mode()
    def encode(self, prompt: str) -> torch.Tensor:
        """Return prompt embeddings [1, L, D]."""
        return self.model.text_encoder(input_ids=self.model.tokenize([prompt]))[0]

    def run(self, plans: list[Plan]) -> list[Run]:
        """Generate for each plan of one method, all in one call."""
        of = [len(plan.noisy) for plan in plans]
        states = torch.cat([plan.states.expand(count, -1, -1) for plan, count in zip(plans, of, strict=True)])
        noisy = torch.cat([plan.noisy for plan in plans])
        early = torch.tensor([plan.early for plan in plans]).repeat_interleave(torch.tensor(of))
        pictures = decode(self.model.vae, self.generator.denoise(states, noisy, early, plans[0].until))
        return [
            Run(
                some,
                plan.results,
                plan.seconds,
                (self.norm(plan.states, self.own_noise), self.norm(plan.states, plan.noisy)),
            )
            for plan, some in zip(plans, np.split(pictures, np.cumsum(of)[:-1]), strict=True)
        ]

    @torch.inference_mode()
    def norm(self, states: torch.Tensor, noisy: torch.Tensor) -> float:
        """Return the mean of ‖Δ‖ at the noisiest timestep."""
        both = [
            self.model.unet(noisy, self.timestep, e.expand(len(noisy), -1, -1)).sample for e in (states, self.empty)
        ]
        return float((both[0] - both[1]).flatten(1).norm(dim=1).mean())

    def prompt(self, prompt: str, early: float = GUIDANCE, until: float = 0.0) -> Plan:
        """Generate for a prompt as it is, or steered."""
        return Plan(self.encode(prompt), self.noise, [], float("nan"), early, until)

    def by_score(self, prompt: str) -> Plan:
        """Steer a prompt the more the higher it scores."""
        rule = self.detector.info.rule
        share = (self.detector.score([prompt]).score[0] - rule.clean_score) / (rule.threshold - rule.clean_score)
        early = float(np.clip(GUIDANCE + (SCALE - GUIDANCE) * share, STRONGEST, GUIDANCE))
        return self.prompt(prompt, early, UNTIL)

    def embedding(self, prompt: str, early: float = GUIDANCE, until: float = 0.0, **options: Any) -> Plan:
        """Generate for a prompt's mitigated embeddings."""
        result, seconds = timed(lambda: self.mitigator.embedding(prompt, **options))
        return Plan(torch.from_numpy(result.states[None]), self.noise, [result], seconds, early, until)

    def sail(self, prompt: str) -> Plan:
        """Generate from mitigated noise, each from a seed of its own."""
        found = [
            timed(lambda seed=seed: self.mitigator.noise(prompt, draws=1, steps=SAIL_STEPS, seed=seed))
            for seed in range(len(self.noise))
        ]
        noisy = torch.from_numpy(np.stack([result.noise for result, _ in found]))
        seconds = float(np.median([seconds for _, seconds in found]))
        return Plan(self.encode(prompt), noisy, [result for result, _ in found], seconds, GUIDANCE, 0.0)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


@dataclass(frozen=True)
class Row:
    """What the table says of a method; see the module's docstring."""

    method: str
    captions: int
    replicas: float
    memorized: int
    concept: float
    other_drawings: float
    new: float
    norm_own: float
    norm_unseen: float
    at_target: int | None
    iterations: float | None
    distance: float | None
    passes: float | None
    backward_passes: float | None
    seconds: float | None


def summarise(method: str, runs: list[Run], judged: list[Judged]) -> Row:
    """Return one row of runs, one per caption, and of what was found in their pictures."""
    replica, concept, others = (np.stack([getattr(j, name) for j in judged]) for name in Judged.__dataclass_fields__)
    results = [result for run in runs for result in run.results]
    norms = np.median([run.norms for run in runs], axis=0)

    def median(name: str) -> float | None:
        return float(np.median([getattr(result, name) for result in results])) if results else None

    succeeded = [result.succeeded for result in results if result.succeeded is not None]
    return Row(
        method=method,
        captions=len(runs),
        replicas=float(replica.mean()),
        memorized=int((replica.mean(1) > 0.5).sum()),
        concept=float(concept.mean()),
        other_drawings=float(others.mean()),
        new=float((concept & ~replica).mean()),
        norm_own=float(norms[0]),
        norm_unseen=float(norms[1]),
        at_target=sum(succeeded) if succeeded else None,
        iterations=median("iterations"),
        distance=median("distance"),
        passes=median("passes"),
        backward_passes=median("backward_passes"),
        seconds=float(np.median([run.seconds for run in runs])) if results else None,
    )


def methods(bench: Bench) -> dict[str, Callable[[str], Plan]]:
    """Return what is compared, by name."""
    vocabulary = sorted({word for caption in bench.data.captions for word in caption.text.split() if word.isalpha()})

    def with_words(count: int, prompt: str) -> Plan:
        return bench.prompt(random_words(prompt, count, vocabulary, 0))

    words = {f"{count} random word{'s' * (count > 1)}": partial(with_words, count) for count in WORDS}
    far, engine = {"distance_weight": 0.0}, bench.mitigator.engine
    rule = Rule.of(engine.directory.manifest, engine.backend.key)
    options: dict[str, dict[str, Any]] = {
        "norm to 1": {"loss": "norm", "target": 1.0, **far},
        "norm to 1, near": {"loss": "norm", "target": 1.0},
        "score to threshold": {"target": rule.threshold, **far},
        "score to clean": {"target": rule.clean_score, **far},
        "score to clean, near": {},
    }
    embeddings = {name: partial(bench.embedding, **some) for name, some in options.items()}
    steering: dict[str, Callable[[str], Plan]] = {
        "steer": partial(bench.prompt, early=SCALE, until=UNTIL),
        "steer by score": bench.by_score,
        "norm to 1, near, steer": partial(bench.embedding, **WEAKER, **options["norm to 1, near"]),
    }
    return {"nothing": bench.prompt, **words, **embeddings, "SAIL": bench.sail, **steering}


def grid(bench: Bench) -> dict[str, Callable[[str], Plan]]:
    """Return what --sweep compares, by name."""
    return {f"{early:g} until {until}": partial(bench.prompt, early=early, until=until) for early, until in SWEPT}


def chosen(data: Data, count: int | None, split: str = "held-out") -> list[Caption]:
    """Return captions of a split that replicate and were trained on: all, or `count`, of each group in proportion."""
    of = {caption.text: caption for caption in data.captions}
    rows = [row for row in captions() if row.memorized and row.group != "unseen" and row.split == split]
    rows.sort(key=lambda row: row.group)  # stable: of one group in the file's order
    picked = range(len(rows)) if count is None else np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    return [of[rows[place].prompt] for place in picked]


def false_alarms(bench: Bench, count: int) -> list[Caption]:
    """Return the frequent held-out captions that do not replicate, and score highest: `count` of them."""
    of = {caption.text: caption for caption in bench.data.captions}
    some = [
        row.prompt for row in captions() if row.group == "frequent" and row.split == "held-out" and not row.memorized
    ]
    order = np.argsort(-bench.detector.score(some).score)
    return [of[some[place]] for place in order[:count]]


def of_noise(bench: Bench, gallery: Gallery, some: list[Caption]) -> Row:
    """Return what the measures say where the answer is known."""
    pictures = decode(bench.model.vae, bench.noise)
    nothing = Run(pictures, [], float("nan"), (float("nan"), float("nan")))
    return summarise("(noise)", [nothing] * len(some), [judge(bench.data, gallery, one, pictures) for one in some])


SHOWN = ("nothing", "2 random words", "score to clean, near", "SAIL", "steer")
EACH = 3  # generations per method
GAP = 12
LABEL, LETTERS = 210, 27  # of a caption's line
HEAD = 58
ROWS, ROW = 10, SIZE + 24


def sheet(data: Data, some: list[Caption], runs: dict[str, list[Run]]) -> Image.Image:
    """Return the contact sheet: a row per caption, the memorized picture, then generations of the same seeds."""
    title, text = ImageFont.load_default(16), ImageFont.load_default(13)
    left = [LABEL] + [LABEL + SIZE + GAP + k * (EACH * SIZE + GAP) for k in range(len(SHOWN))]
    image = Image.new("RGB", (left[-1] + EACH * SIZE + GAP, HEAD + len(some[:ROWS]) * ROW), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), "Memorized captions of the embedded model, before and after mitigation", "black", title)
    for x, name in zip(left, ("training", *SHOWN), strict=True):
        draw.text((x, HEAD - 22), name, "black", text)
    for row, caption in enumerate(some[:ROWS]):
        y = HEAD + row * ROW
        found = {name: data.replicated(runs[name][row].pictures) for name in SHOWN}
        memory = int(np.bincount(found["nothing"][1]).argmax())
        draw.text((8, y + 10), textwrap.fill(caption.text, LETTERS), "black", text)
        for x, name in zip(left[1:], SHOWN, strict=True):
            draw.text((x, y + SIZE + 2), f"{found[name][0].sum()} of {len(found[name][0])} replicate", "dimgrey", text)
        shown = [data.pictures[memory][None], *(runs[name][row].pictures[:EACH] for name in SHOWN)]
        for x, pictures in zip(left, shown, strict=True):
            image.paste(Image.fromarray(np.concatenate(list(pictures), axis=1)), (x, y))
    return image.quantize(256)


@dataclass(frozen=True)
class Source:
    """Median seconds of one mitigation, by torch's autograd and by the engine's gradient graphs."""

    method: str
    torch: float
    onnx: float
    ratio: float


def sources(prompts: list[str], by_torch: Mitigator, by_graphs: Mitigator) -> list[Source]:
    """Time both sources on the same prompts, in turn; the first prompt warms both up. A ratio is a median of pairs."""
    calls: dict[str, Callable[[Mitigator, str], object]] = {
        "norm, 5 steps": lambda m, p: m.embedding(p, loss="norm", target=0.0, steps=5),
        "score, 5 steps": lambda m, p: m.embedding(p, loss="score", target=-100.0, steps=5),
        "SAIL, 5 steps": lambda m, p: m.noise(p, draws=1, steps=5),
    }
    found = []
    for name, call in calls.items():
        pairs = [[timed(partial(call, m, p))[1] for m in (by_torch, by_graphs)] for p in prompts][1:]
        both = np.median(pairs, axis=0)
        found.append(Source(name, *map(float, both), float(np.median([a / b for a, b in pairs]))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--captions", type=int, default=12)
    size.add_argument("--full", action="store_true", help="all captions that replicate")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="generations for each caption")
    parser.add_argument(
        "--sweep", action="store_true", help="scales and timesteps of steering, on calibration captions"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="write the contact sheet here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = Model.load(CHECKPOINT)
    data = Data(arguments.data, model.vae)
    gallery = Gallery(data)
    by_graphs = Mitigator.load(provider="cpu", threads=arguments.threads)
    bench = Bench(data, model, by_graphs, arguments.threads, arguments.seeds)
    console = Console(width=160)
    count = None if arguments.full else arguments.captions
    if arguments.sweep:
        compared(console, bench, gallery, chosen(data, count, "calibration"), grid(bench))
        return
    some = chosen(data, count)
    rows, runs = compared(console, bench, gallery, some, methods(bench))
    console.print("Frequent captions, which are not memorized:")
    clean, _ = compared(console, bench, gallery, false_alarms(bench, len(some)), methods(bench))
    clean.append(of_noise(bench, gallery, some))
    show(console, clean[-1:])
    by_torch = Mitigator.load(provider="cpu", threads=arguments.threads, checkpoint=str(CHECKPOINT))
    if arguments.sheet:
        sheet(data, some, runs).save(arguments.sheet, optimize=True)
    timings = sources([caption.text for caption in some[:6]], by_torch, by_graphs)
    for timing in timings:
        console.print(
            f"{timing.method}: torch {timing.torch:.3f} s, engine's graphs {timing.onnx:.3f} s, "
            f"ratio {timing.ratio:.2f}; {arguments.threads} thread(s), median of {len(some[:6]) - 1}"
        )
    if arguments.json:
        tables = {"table": [asdict(row) for row in rows], "clean": [asdict(row) for row in clean]}
        found = tables | {"sources": [asdict(timing) for timing in timings]}
        arguments.json.write_text(json.dumps(found, indent=1))


def compared(
    console: Console, bench: Bench, gallery: Gallery, some: list[Caption], by: dict[str, Callable[[str], Plan]]
) -> tuple[list[Row], dict[str, list[Run]]]:
    """Run methods on captions, and print the table; returns it, and what was made."""
    rows, runs = [], {}
    for name, method in by.items():
        start = time.perf_counter()
        runs[name] = bench.run([method(caption.text) for caption in some])
        judged = [judge(bench.data, gallery, one, run.pictures) for one, run in zip(some, runs[name], strict=True)]
        rows.append(summarise(name, runs[name], judged))
        console.print(f"{name}: {time.perf_counter() - start:.0f} s for {len(some)} captions")
    show(console, rows)
    return rows, runs


def show(console: Console, rows: list[Row]) -> None:
    titles = ("after", "replicas", "memorized", "concept", "by other drawings", "new", "norm own", "unseen")
    costs = ("at target", "steps", "distance", "passes", "backward", "s")
    table = Table(*titles, *costs, box=None)
    for row in rows:
        shares = [f"{share:.0%}" for share in (row.replicas, row.concept, row.other_drawings, row.new)]
        norms = [f"{norm:.2f}" for norm in (row.norm_own, row.norm_unseen)]
        table.add_row(
            row.method,
            shares[0],
            f"{row.memorized} of {row.captions}",
            *shares[1:],
            *("–" if norm == "nan" else norm for norm in norms),
            *_cells(row),
        )
    console.print(table)


def _cells(row: Row) -> list[str]:
    values = (row.at_target, row.iterations, row.distance, row.passes, row.backward_passes, row.seconds)
    formats = ("d", "g", ".2f", "g", "g", ".2f")
    return ["–" if value is None else format(value, spec) for value, spec in zip(values, formats, strict=True)]


if __name__ == "__main__":
    main()
