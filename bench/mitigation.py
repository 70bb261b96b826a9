"""Does mitigation work, what does it leave of the prompt, what does it cost: the embedded model's memorized captions.

    python bench/mitigation.py DATA_DIR [--full] [--sheet bench/mitigation.png] [--json FILE]

DATA_DIR is what bench/tiny/prepare.py writes. Captions are held-out ones that replicate (memedge/data/captions.csv), a
few of each group; with --full all of them, those of the calibration split included. Each method is followed by 8
generations from 8 seeds that it has not seen (bench/tiny/generate.py); those of SAIL start from the noise that it made
from 8 other seeds, a draw each.

- nothing: the caption as it is.
- k random words: at random places of the caption (Somepalli et al., 2023).
- norm: the embeddings moved until ‖Δ‖ is at a target (Wen et al.). score: until the detector's score is at a target,
  its threshold or the median of clean calibration captions (Asthana & Belagiannis). Both on the engine's own noise.
  "near": with the distance from the caption's own embeddings penalised; "score to clean, near" is the default.
- SAIL: the noise moved (Jeon et al.).

Columns: replicas, the share of generations with a similarity of at least 0.8 to one training picture, as
bench/tiny/label.py counts them; memorized, captions with at least 5 such of 8. Concept: the share of generations that
show the caption's concept, so that it is among the 5 nearest of 328; once against its drawings by all vendors, and once
without the one that the model has memorized. new: generations that show the concept (by the former) and are no
replicas: what a user wants. norm: on the engine's own noise, which the embeddings were fitted on, and on the noise of
the generations. distance: of embeddings or noise from where they started, relative. Medians, but for the shares.

As a check of the measure, its first rows are not of methods: frequent captions, which are not memorized, and noise.
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
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from memedge.decision.rule import Rule
from memedge.embedded import captions
from memedge.mitigation.mitigator import MitigatedNoise, Mitigation, Mitigator

TINY = Path(__file__).parent / "tiny"
sys.path.insert(0, str(TINY))

from contact import strip  # noqa: E402
from dataset import SIZE, Emoji, Pose  # noqa: E402
from generate import denoise, similarity  # noqa: E402
from label import MAJORITY, REPLICA, SEEDS, training_pictures  # noqa: E402
from model import Model  # noqa: E402

Results = list[Mitigation] | list[MitigatedNoise]
CHECKPOINT = TINY / "emoji"
FEW = {"memorized": 8, "partly": 2, "template": 2}  # captions without --full
WORDS = {False: (2,), True: (1, 2, 4)}  # by --full
SAIL_STEPS = 10
POSES = 32  # of each drawing, in the gallery
POOL = 4  # pixels of a picture that the gallery takes the mean of, each way
NEAREST = 5


def random_words(caption: str, count: int, vocabulary: list[str], seed: int) -> str:
    """Return a caption with `count` words of the vocabulary put in at random places."""
    chance = random.Random(f"{caption} {count} {seed}")
    words = caption.split()
    for _ in range(count):
        words.insert(chance.randint(0, len(words)), chance.choice(vocabulary))
    return " ".join(words)


def replicated(pictures: torch.Tensor, training: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return which generations [S, 4, H, W] replicate the training picture that most do, bool [S], and which it is."""
    similar = similarity(pictures, training) >= REPLICA
    picture = int(similar.sum(0).argmax())
    return similar[:, picture], picture


class Gallery:
    """Drawings of all concepts that the model was trained on, in random poses and on random backgrounds.

    The concept that a picture shows is that of the drawing it is most similar to, in small: at 8 × 8 pixels a drawing
    is more similar to itself in another pose than at 32 × 32.
    """

    def __init__(self, data: Emoji):
        self.concepts = [i for i, caption in enumerate(data.captions) if caption.group != "unseen"]
        generator = torch.Generator().manual_seed(7)
        drawings = [(place, d) for place, i in enumerate(self.concepts) for d in data.captions[i].drawings]
        self._concept = torch.tensor([place for place, _ in drawings]).repeat_interleave(POSES)
        self._drawing = torch.tensor([d for _, d in drawings]).repeat_interleave(POSES)
        self._pictures = torch.cat(
            [_small(Pose.draw(len(some), generator).place(data.icons[some])) for some in self._drawing.split(1024)]
        )

    def rank(self, pictures: torch.Tensor, caption: int, without: int | None = None) -> torch.Tensor:
        """Return how many concepts pictures [S, 4, 32, 32] are nearer to than to the caption's, int64 [S].

        `without` is a drawing that is left out.
        """
        similar = similarity(_small(pictures), self._pictures)
        if without is not None:
            similar = similar.masked_fill(self._drawing == without, -1)
        nearest = torch.full((len(pictures), len(self.concepts)), -1.0)
        nearest.scatter_reduce_(1, self._concept.expand(len(pictures), -1), similar, "amax")
        own = nearest[:, self.concepts.index(caption), None]
        return (nearest > own).sum(1)


def _small(pictures: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(pictures, POOL)


@dataclass(frozen=True)
class Judged:
    """Of one caption's generations [S]: which are replicas, and which show the concept."""

    replica: np.ndarray
    concept: np.ndarray
    other_drawings: np.ndarray


def judge(data: Emoji, gallery: Gallery, caption: int, pictures: torch.Tensor) -> Judged:
    return Judged(
        replicated(pictures, training_pictures(data, caption))[0].numpy(),
        (gallery.rank(pictures, caption) < NEAREST).numpy(),
        (gallery.rank(pictures, caption, int(data.fixed_drawing[caption])) < NEAREST).numpy(),
    )


@dataclass(frozen=True)
class Run:
    """One method on one caption.

    Attributes:
        pictures: [8, 4, 32, 32].
        results: what the mitigator returned: one, 8 of SAIL, or none of the other methods.
        seconds: per mitigation; NaN where there is none.
        norms: ‖Δ‖ on the engine's own noise, and its mean on the noise of the generations.
    """

    pictures: torch.Tensor
    results: Results
    seconds: float
    norms: tuple[float, float]


class Bench:
    def __init__(self, data: Emoji, model: Model, mitigator: Mitigator):
        self.data, self.model, self.mitigator = data, model, mitigator
        seeds = [torch.Generator().manual_seed(1000 + k) for k in range(SEEDS)]  # generate.generate's
        self.noise = torch.cat([torch.randn(1, 4, SIZE, SIZE, generator=seed) for seed in seeds])
        directory = mitigator.engine.directory
        self.own_noise, self.timestep = torch.from_numpy(directory.baseline.sample), directory.manifest.timesteps[0]
        self.empty = self.encode("")

    @torch.inference_mode()
    def encode(self, prompt: str) -> torch.Tensor:
        """Return prompt embeddings [1, L, D]."""
        return self.model.text_encoder(input_ids=self.model.tokenize([prompt]))[0]

    @torch.inference_mode()
    def pictures(self, states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return generations from noise [S, 4, 32, 32] for the embeddings [1, L, D] of one prompt."""
        return self.data.to_rgba(denoise(self.model, noise, states.expand(len(noise), -1, -1), self.empty))

    @torch.inference_mode()
    def norm(self, states: torch.Tensor, noise: torch.Tensor) -> float:
        """Return the mean of ‖Δ‖ at the noisiest timestep."""
        both = [
            self.model.unet(noise, self.timestep, e.expand(len(noise), -1, -1)).sample for e in (states, self.empty)
        ]
        return float((both[0] - both[1]).flatten(1).norm(dim=1).mean())

    def prompt(self, prompt: str) -> Run:
        """Generate for a prompt as it is."""
        return self._run(self.encode(prompt), self.noise, [], float("nan"))

    def embedding(self, prompt: str, **options: Any) -> Run:
        """Generate for a prompt's mitigated embeddings."""
        result, seconds = timed(lambda: self.mitigator.embedding(prompt, **options))
        return self._run(torch.from_numpy(result.states[None]), self.noise, [result], seconds)

    def sail(self, prompt: str) -> Run:
        """Generate from mitigated noise, each from a seed of its own."""
        found = [
            timed(lambda seed=seed: self.mitigator.noise(prompt, draws=1, steps=SAIL_STEPS, seed=seed))
            for seed in range(SEEDS)
        ]
        noise = torch.from_numpy(np.stack([result.noise for result, _ in found]))
        seconds = float(np.median([seconds for _, seconds in found]))
        return self._run(self.encode(prompt), noise, [result for result, _ in found], seconds)

    def _run(self, states: torch.Tensor, noise: torch.Tensor, results: Results, seconds: float) -> Run:
        norms = self.norm(states, self.own_noise), self.norm(states, noise)
        return Run(self.pictures(states, noise), results, seconds, norms)


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
        memorized=int((replica.sum(1) >= MAJORITY).sum()),
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


def methods(bench: Bench, full: bool) -> dict[str, Callable[[str], Run]]:
    """Return what is compared, by name."""
    vocabulary = sorted({word for caption in bench.data.captions for word in caption.text.split() if word.isalpha()})

    def with_words(count: int, prompt: str) -> Run:
        return bench.prompt(random_words(prompt, count, vocabulary, 0))

    words = {f"{count} random word{'s' * (count > 1)}": partial(with_words, count) for count in WORDS[full]}
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
    return {"nothing": bench.prompt, **words, **embeddings, "SAIL": bench.sail}


def chosen(data: Emoji, full: bool) -> list[int]:
    """Return which captions are mitigated: those that replicate and were trained on, or a few of them."""
    rows = [row for row in captions() if row.memorized and row.group != "unseen"]
    place = {caption.text: i for i, caption in enumerate(data.captions)}
    if full:
        return [place[row.prompt] for row in rows]
    held_out = [row for row in rows if row.split == "held-out"]
    return [
        place[row.prompt]
        for group, count in FEW.items()
        for row in [row for row in held_out if row.group == group][:count]
    ]


def checks(bench: Bench, gallery: Gallery, captions: list[int]) -> list[Row]:
    """Return rows of what the measures say where the answer is known: of frequent captions, and of noise."""
    data = bench.data
    frequent = [i for i, caption in enumerate(data.captions) if caption.group == "frequent"][: len(captions)]
    runs = [bench.prompt(data.captions[i].text) for i in frequent]
    noise = data.to_rgba(bench.noise)
    nothing = Run(noise, [], float("nan"), (float("nan"), float("nan")))
    judged = [judge(data, gallery, i, run.pictures) for i, run in zip(frequent, runs, strict=True)]
    return [
        summarise("(frequent)", runs, judged),
        summarise("(noise)", [nothing] * len(captions), [judge(data, gallery, i, noise) for i in captions]),
    ]


SHOWN = ("nothing", "2 random words", "norm to 1, near", "score to clean, near", "SAIL")
SIDE = 2 * SIZE
EACH = 3  # generations per method
GAP = 12
LABEL, LETTERS = 210, 27  # of a caption's line
HEAD = 58
ROWS, ROW = 10, SIDE + 24


def sheet(data: Emoji, captions: list[int], runs: dict[str, list[Run]]) -> Image.Image:
    """Return the contact sheet: a row per caption, the memorized picture, then generations of the same seeds."""
    title, text = ImageFont.load_default(16), ImageFont.load_default(13)
    left = [LABEL] + [LABEL + SIDE + GAP + k * (EACH * SIDE + GAP) for k in range(len(SHOWN))]
    captions = captions[:ROWS]
    image = Image.new("RGB", (left[-1] + EACH * SIDE + GAP, HEAD + len(captions) * ROW), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), "Memorized captions of the embedded model, before and after mitigation", "black", title)
    for x, name in zip(left, ("training", *SHOWN), strict=True):
        draw.text((x, HEAD - 22), name, "black", text)
    for row, caption in enumerate(captions):
        y = HEAD + row * ROW
        training = training_pictures(data, caption)
        memory = replicated(runs["nothing"][row].pictures, training)[1]
        counts = [int(replicated(runs[name][row].pictures, training)[0].sum()) for name in SHOWN]
        draw.text((8, y + 10), textwrap.fill(data.captions[caption].text, LETTERS), "black", text)
        for x, count in zip(left[1:], counts, strict=True):
            draw.text((x, y + SIDE + 2), f"{count} of {SEEDS} replicate", "dimgrey", text)
        shown = [training[memory][None], *(runs[name][row].pictures[:EACH] for name in SHOWN)]
        for x, pictures in zip(left, shown, strict=True):
            cells = strip(pictures.numpy())
            image.paste(cells.resize((cells.width * 2, cells.height * 2), Image.Resampling.NEAREST), (x, y))
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
        "score, 5 steps": lambda m, p: m.embedding(p, loss="score", target=-9.0, steps=5),
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
    parser.add_argument("--full", action="store_true", help="all captions, and not a few")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="write the contact sheet here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = Emoji(arguments.data)
    captions, gallery = chosen(data, arguments.full), Gallery(data)
    by_graphs = Mitigator.load(provider="cpu", threads=arguments.threads)
    by_torch = Mitigator.load(provider="cpu", threads=arguments.threads, checkpoint=str(CHECKPOINT))
    bench = Bench(data, Model.load(CHECKPOINT), by_graphs)
    console = Console(width=160)
    rows = checks(bench, gallery, captions)
    runs: dict[str, list[Run]] = {}
    for name, method in methods(bench, arguments.full).items():
        start = time.perf_counter()
        runs[name] = [method(data.captions[i].text) for i in captions]
        judged = [judge(data, gallery, i, run.pictures) for i, run in zip(captions, runs[name], strict=True)]
        rows.append(summarise(name, runs[name], judged))
        console.print(f"{name}: {time.perf_counter() - start:.0f} s for {len(captions)} captions")
    show(console, rows)
    if arguments.sheet:
        sheet(data, captions, runs).save(arguments.sheet, optimize=True)
    timings = sources([data.captions[i].text for i in captions[:6]], by_torch, by_graphs)
    for timing in timings:
        console.print(
            f"{timing.method}: torch {timing.torch:.3f} s, engine's graphs {timing.onnx:.3f} s, "
            f"ratio {timing.ratio:.2f}; {arguments.threads} thread(s), median of {len(captions[:6]) - 1}"
        )
    if arguments.json:
        found = {"table": [asdict(row) for row in rows], "sources": [asdict(timing) for timing in timings]}
        arguments.json.write_text(json.dumps(found, indent=1))


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
