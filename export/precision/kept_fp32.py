"""What of an fp16 engine stays float32 because its rounding was measured to matter.

Rounding adds an error to Δ that is about as large for a quiet prompt as for a loud one. Where that is too much, the
parts of the graphs whose rounding contributes most stay float32, one more at a time, until the tolerance holds.
"""

import gc
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from memedge.engine.directory import TEXT_ENCODER, UNET, Tensors
from memedge.engine.precision import ENGINE
from memedge.export.from_checkpoint import Job, Model
from memedge.export.parity import Excess, Predict, Statistics, epsilon, excess
from memedge.export.precision import fp16, simulate_fp16
from memedge.export.precision.ranges import Ranges

# Of the UNet, with about equally many nodes each: to measure one takes two passes of the UNet.
PARTS = 16


@dataclass(frozen=True)
class Part:
    """Nodes of one of the two graphs, which follow each other, by the names of their first outputs."""

    graph: str
    nodes: frozenset[str]


@dataclass(frozen=True)
class Graphs:
    """The float32 graphs in the folder `originals`, and what is needed to write mixed ones into the job's folder."""

    job: Job
    model: Model
    cached: Tensors  # in fp16
    originals: Path
    ranges: dict[str, Ranges]  # by the graph's name

    def convert(self, kept: Collection[Part]) -> None:
        """Write both mixed graphs, with these parts in float32."""
        for name, found in self.ranges.items():
            for old in self.job.folder.glob(f"{name}*"):
                old.unlink()  # rather than written over: it may still be mapped
            names = {node for part in kept if part.graph == name for node in part.nodes}
            fp16.convert(self.originals / name, self.job.folder / name, found, names)
        gc.collect()  # of the float32 graphs, whose files stay mapped till then

    def simulate(self) -> Statistics:
        """Return the probes' statistics as a GPU would compute them with the graphs that were written last."""
        found = simulate_fp16.epsilon(self.job.folder, self.cached, self.model.ids, self.job.draws)
        return Statistics.of(found, self.model.noise.norm_factor)

    def excess(self, found: Statistics) -> Excess:
        return excess(found, self.model.reference, self.job.precision)

    def size(self) -> int:
        """Return the bytes of the graphs that were written last."""
        return sum(file.stat().st_size for name in self.ranges for file in self.job.folder.glob(f"{name}*"))

    def parts(self) -> list[Part]:
        """Return the text encoder, and the UNet in parts."""
        nodes = {name: [str(n.outputs[0].name) for n in ir.load(self.originals / name).graph] for name in self.ranges}
        share = -(-len(nodes[UNET]) // PARTS)
        unet = [frozenset(nodes[UNET][start : start + share]) for start in range(0, len(nodes[UNET]), share)]
        return [Part(TEXT_ENCODER, frozenset(nodes[TEXT_ENCODER])), *(Part(UNET, some) for some in unet)]

    def only(self, part: Part | None) -> Predict:
        """Return what predicts with the UNet in float32, but for a part of it."""
        path = self.originals / UNET
        model = ir.load(path)
        narrow = part.nodes if part is not None and part.graph == UNET else frozenset()
        fp16.narrow(model, _but(model.graph, narrow) | fp16.wide(model.graph, self.ranges[UNET]))
        return simulate_fp16.predictor(simulate_fp16.open_model(model, path), self.cached)


def write(graphs: Graphs) -> tuple[Statistics, tuple[str, ...]]:
    """Write the mixed graphs, with as much float32 as it takes; return what was simulated, and a note if it took any.

    Where float32 itself would be too far from the original, nothing more is kept than in any engine.
    """
    job = graphs.job
    graphs.convert(())
    job.progress("computing the probes as a GPU rounds")
    plain, small = graphs.simulate(), graphs.size()
    found = graphs.excess(plain)
    if found.within:
        return plain, ()
    job.progress("measuring what each part's rounding does")
    states = graphs.model.states
    exact = epsilon(graphs.only(None), states, job.draws)
    if not graphs.excess(Statistics.of(exact, graphs.model.noise.norm_factor)).within:
        return plain, ()  # the cached inputs' rounding, or no rounding at all
    contributions = _contributions(graphs, exact, plain, found)
    ordered = sorted(contributions, key=contributions.__getitem__, reverse=True)
    left = total = sum(contributions.values())
    for count, part in enumerate(ordered, 1):
        left -= contributions[part]
        # Independent errors add in squares, and so does what they make of a norm: too much is left to be tried.
        if left * max(found.norm, found.alignment) > total and count < len(ordered):
            continue
        job.progress(f"keeping {count} of {len(ordered)} parts in fp32")
        graphs.convert(ordered[:count])
        simulated = graphs.simulate()
        if graphs.excess(simulated).within:
            return simulated, (_note(found, count, len(ordered), graphs.size(), small),)
    graphs.convert(())
    return plain, ()


def _contributions(
    graphs: Graphs, exact: npt.NDArray[np.float32], plain: Statistics, found: Excess
) -> dict[Part, float]:
    """Return ‖Δ − Δ_exact‖² of every part, in fp16 alone, where it matters: the worst probe at the worst timestep."""
    model, reference = graphs.model, graphs.model.reference
    step = int(found.alignment > found.norm)
    allowed = ENGINE[graphs.job.precision].of_norms(reference.norm)
    errors = plain.alignment - reference.alignment if step else (plain.norm - reference.norm) / allowed
    worst = 1 + int(np.abs(errors).argmax())  # behind the empty prompt
    pair, row = [0, worst], step * graphs.job.draws
    states = simulate_fp16.states(graphs.job.folder, model.ids[pair])

    def contribution(part: Part) -> float:
        predict = graphs.only(part)
        embeddings = states if part.graph == TEXT_ENCODER else model.states[pair]
        error = [predict(state, row) - exact[one, step, 0] for one, state in zip(pair, embeddings, strict=True)]
        return float(np.square(error[1] - error[0], dtype=np.float64).sum())

    return {part: contribution(part) for part in graphs.parts()}


def _but(graph: ir.Graph, names: frozenset[str]) -> set[ir.Node]:
    return {node for node in graph if node.outputs[0].name not in names}


def _note(found: Excess, count: int, parts: int, large: int, small: int) -> str:
    times = max(found.norm, found.alignment)
    return (
        f"{count} of {parts} parts of the graphs stay in fp32, which takes {(large - small) / 1e6:.1f} MB "
        f"({large / small - 1:.0%}) more: all in fp16 they would be {times:.2g} times as far from the original "
        "as fp16 allows."
    )
