"""The screen's graphs: the UNet up to a tap, where a prompt's first effects can be read (docs/methods.md §5).

A tap is a residual sum that the prompt changes, near the beginning: the first one stands right behind the first
cross-attention. Nothing goes by the names of layers. A graph is cut from the one that the engine runs, in whatever
precision, and reads its weights from the same file.
"""

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from memedge.engine.directory import SCREENS, UNET
from memedge.engine.manifest import MOST_TAPS, Tap
from memedge.export.graphs import cost
from memedge.export.graphs.edit import SINGLE
from memedge.export.graphs.prefix_split import ROWS
from memedge.export.graphs.terms import Terms

DEAREST = 0.2  # of a row after the prefix: a screen is there to spare passes
STEP = 1.5  # a tap takes so many times the work of the one before, or is left out


def find_taps(graph: ir.Graph) -> tuple[Tap, ...]:
    """Return the taps of a UNet's graph (states, prompt, row, cached values → prediction), the cheapest first."""
    total = sum(map(cost.flops, graph))
    taps: list[Tap] = []
    for value in _residual_sums(graph):
        flops = sum(map(cost.flops, _before(value)))
        if flops <= DEAREST * total and len(taps) < MOST_TAPS and (not taps or flops >= STEP * taps[-1].flops):
            assert value.name is not None
            assert value.shape is not None
            taps.append(Tap(value.name, tuple(map(int, value.shape[1:])), flops))  # type: ignore[arg-type]
    return tuple(taps)


def write(folder: Path, taps: Iterable[Tap]) -> None:
    """Write a graph for each tap beside the UNet's in a folder.

    Inputs beside the UNet's: reference, float32 [n, ...], the tap's value for the empty prompt on each row. Outputs:
    tap, float32 [R, ...], its value; change, float32 [R, C], the L2 norm over the pixels of tap − reference.
    """
    for file, tap in zip(SCREENS, taps, strict=False):
        model = ir.load(folder / UNET)
        _cut(model, tap.value)
        ir.save(model, folder / file)


def _cut(model: ir.Model, name: str) -> None:
    graph = model.graph
    value = next(value for node in graph for value in node.outputs if value.name == name)
    row = next(value for value in graph.inputs if value.name == "row")
    terms = Terms(graph, "screen")
    assert value.shape is not None
    single = value
    if value.dtype != SINGLE:
        single = terms.node("Cast", [value], dtype=SINGLE, to=SINGLE)
    reference = ir.Value(name="reference", shape=ir.Shape(["references", *value.shape[1:]]), type=ir.TensorType(SINGLE))
    graph.inputs.append(reference)
    delta = terms.node("Sub", [single, terms.node("Gather", [reference, row], [*value.shape], axis=0)])
    pixels = [1] if len(value.shape) == 3 else [2, 3]
    squares = terms.reduced("ReduceSum", terms.node("Mul", [delta, delta]), pixels)
    change = terms.reshaped(terms.node("Sqrt", [squares]), [ROWS, _channels(value)])
    single.name, change.name = "tap", "change"
    graph.outputs.clear()
    graph.outputs.extend([single, change])
    RemoveUnusedNodesPass()(model)
    for unused in [value for value in graph.inputs if not value.uses() and value is not row]:
        graph.inputs.remove(unused)


def _residual_sums(graph: ir.Graph) -> list[ir.Value]:
    """Return the sums of two computed values, [R, T, C] or [R, C, H, W], that the prompt changes; in order."""
    changed = {value for value in graph.inputs if value.name in ("states", "prompt")}
    found = []
    for node in graph:
        if not any(value in changed for value in node.inputs):
            continue
        changed.update(node.outputs)
        if node.op_type == "Add" and _sums_computed(node):
            found.append(node.outputs[0])
    return found


def _sums_computed(node: ir.Node) -> bool:
    """Return whether both of an Add's inputs are computed, and have its output's shape."""
    shape = node.outputs[0].shape
    alike = (value is not None and value.const_value is None and value.shape == shape for value in node.inputs)
    return shape is not None and _has_rows(shape) and all(alike)


def _has_rows(shape: ir.Shape) -> bool:
    return len(shape) in (3, 4) and str(shape[0]) == ROWS and all(isinstance(size, int) for size in shape[1:])


def _channels(value: ir.Value) -> int:
    assert value.shape is not None
    return int(value.shape[-1] if len(value.shape) == 3 else value.shape[1])  # type: ignore[arg-type]


def _before(value: ir.Value) -> set[ir.Node]:
    """Return all nodes that a value is computed by."""
    found: set[ir.Node] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            waiting += [one for one in node.inputs if one is not None]
    return found
