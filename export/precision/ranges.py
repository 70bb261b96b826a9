"""How large the values of a float32 graph become: what may be fp16, whose largest number is 65504, and what may not."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from memedge.engine.directory import Tensors
from memedge.export.graphs.edit import add, constant
from memedge.export.precision.scratch_session import open_session

Feeds = Mapping[str, npt.NDArray[Any]]
# Noise draws looked at per timestep. A draw is thousands of independent numbers and meets every prompt: what further
# draws add is little beside the margin that other prompts need (export/precision/fp16.py).
DRAWS = 4


@dataclass(frozen=True)
class Ranges:
    """The largest magnitudes seen.

    Attributes:
        values: of every float32 value but the weights, by its name.
        logits: of what a fused attention computes inside, by the name of its output: max‖q‖ · max‖k‖ / √d, the largest
            over heads, which no logit exceeds (Cauchy–Schwarz).
    """

    values: dict[str, float]
    logits: dict[str, float]


def observe(path: Path, calls: Iterable[Feeds]) -> Ranges:
    """Run the float32 graph at `path` on the inputs of every call; return what it reached.

    The graph itself reduces each value to one number, as soon as it is computed, so that values need not be kept.
    """
    model = ir.load(path)
    graph = model.graph
    values = [v for v in (*graph.inputs, *(v for node in graph for v in node.outputs)) if v.dtype == ir.DataType.FLOAT]
    attentions = [node for node in graph if node.op_type == "MultiHeadAttention"]
    scales = [_scale(node) for node in attentions]
    largest = [_largest(graph, value) for value in values]
    lengths = [_longest(graph, node, index) for node in attentions for index in (0, 1)]
    graph.outputs.extend([*largest, *lengths])
    session = open_session(model, path)
    found = Ranges({str(v.name): 0.0 for v in values}, {str(node.outputs[0].name): 0.0 for node in attentions})
    names = [value.name for value in (*largest, *lengths)]
    for feeds in calls:
        results = session.run(names, feeds)
        _raise(found.values, map(float, results[: len(values)]))
        pairs = zip(results[len(values) :: 2], results[len(values) + 1 :: 2], scales, strict=True)
        _raise(found.logits, [float((query * key).max()) * factor for query, key, factor in pairs])
    return found


def unet_calls(states: npt.NDArray[np.float32], cached: Tensors) -> Iterator[Feeds]:
    """Yield the UNet's inputs for every one of the states [B, L, D] on the first `DRAWS` draws of both timesteps."""
    draws = len(next(iter(cached.values()))) // 2
    first = np.zeros(1, dtype=np.int64)
    for state in states:
        for step in (0, 1):
            for draw in range(min(draws, DRAWS)):
                yield {"states": state[None], "prompt": first, "row": first + step * draws + draw, **cached}


def _scale(attention: ir.Node) -> float:
    """Return what a MultiHeadAttention without a scale of its own multiplies q · k by: 1/√d."""
    query = attention.inputs[0]
    assert query is not None and query.shape is not None
    return 1 / math.sqrt(int(query.shape[2]) / _heads(attention))  # type: ignore[arg-type]


def _heads(attention: ir.Node) -> int:
    return attention.attributes["num_heads"].as_int()


def _raise(known: dict[str, float], found: Iterable[float]) -> None:
    for name, value in zip(known, found, strict=True):
        known[name] = float(np.maximum(known[name], value))  # NaN stays NaN, which Python's max would lose


def _largest(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Add max |value|, a number."""
    magnitude = add(graph, "Abs", [value], f"{value.name}.abs", behind=value)
    return add(graph, "ReduceMax", [magnitude], f"{value.name}.largest", behind=magnitude, shape=[], keepdims=0)


def _longest(graph: ir.Graph, attention: ir.Node, index: int) -> ir.Value:
    """Add the length of the longest vector in each head, [H], of an attention's queries or keys [R, S, H · K]."""
    value, name = attention.inputs[index], f"{attention.outputs[0].name}.input{index}"
    assert value is not None
    count = _heads(attention)
    apart = constant(graph, f"{name}.shape", np.array([0, 0, count, -1]))
    axis, others = constant(graph, "ranges.axis", np.array([-1])), constant(graph, "ranges.others", np.array([0, 1]))
    vectors = add(graph, "Reshape", [value, apart], f"{name}.heads", behind=value, shape=[None] * 4)
    length = add(graph, "ReduceL2", [vectors, axis], f"{name}.length", behind=vectors, shape=[None] * 3, keepdims=0)
    return add(graph, "ReduceMax", [length, others], f"{name}.longest", behind=length, shape=[count], keepdims=0)
