"""The prefix split: what the prompt cannot change is computed once, at export (docs/methods.md §5).

The UNet's graph is cut in two by what depends on the prompt. The prefix takes the sample, the timestep and, where a
model is told one, the guidance scale; values that cross the cut are cached, a row for every (timestep, draw), and the
remaining graph gathers the rows it is asked for.

Where to cut is a minimum cut: a node left in the remaining graph costs its arithmetic and memory traffic, a cached
value the traffic of reading it. Where the cached values would outgrow `MEMORY_SHARE` of the weights, bytes are made
dearer until they don't: what is dropped first is what saves least per byte.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from memedge.engine.directory import Tensors
from memedge.engine.errors import ExportError
from memedge.export.graphs import cost, split_concats
from memedge.export.graphs.edit import add

ROWS = "rows"  # the name of the dynamic first dimension, in export/graphs/files.py
MEMORY_SHARE = 0.25
MEMORY_FLOOR = 64 << 20  # bytes that may be cached however small the model


@dataclass(frozen=True)
class Split:
    """The two graphs, and what was saved.

    Attributes:
        prefix: sample [R, C, H, W], timestep [R], guidance [R] if any → the cached values of those rows.
        unet: states [B, L, D], prompt [R], row [R], cached values [2n, …] → prediction [R, C, H, W].
        cached: the cached values' names.
        flops: of one row of the whole UNet.
        flops_cached: of them, what the prefix holds.
    """

    prefix: ir.Model
    unet: ir.Model
    cached: tuple[str, ...]
    flops: int
    flops_cached: int


def split(model: ir.Model, rows: int) -> Split:
    """Split a UNet's graph (sources/checkpoint.py) for `rows` = 2n cached rows; consumes it."""
    graph = model.graph
    _name_noise(graph)
    _settle_shapes(graph)
    total = sum(map(cost.flops, graph))
    sources = [value for value in graph.inputs if value.name in ("states", "prompt")]
    split_concats.separate(graph, _downstream(graph, sources))
    RemoveUnusedNodesPass()(model)
    after = _choose(graph, _downstream(graph, sources), rows)
    cached = [v for node in graph if node not in after for v in node.outputs if any(u in after for u in v.consumers())]
    names = tuple(f"cached.{number}" for number in range(len(cached)))
    for name, value in zip(names, cached, strict=True):
        value.name = name
    sample = [value for value in graph.inputs if value not in sources]
    extracted = ir.convenience.extract(graph, sample, cached)
    weights = extracted.initializers
    for name in sorted(weights):  # `extract` leaves them in an order that changes from process to process
        weights[name] = weights.pop(name)
    prefix = ir.Model(extracted, ir_version=model.ir_version)
    _feed(graph, cached, after, rows)
    for value in sample:
        graph.inputs.remove(value)
    RemoveUnusedNodesPass()(model)
    saved = total - sum(map(cost.flops, graph))
    return Split(prefix, model, names, total, saved)


def run_prefix(
    path: Path, sample: npt.NDArray[np.float32], timesteps: tuple[int, int], guidance: float | None
) -> Tensors:
    """Return the cached values [2n, …] of noise [n, C, H, W] at both timesteps, computed by ONNX Runtime row by row."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    told = {} if guidance is None else {"guidance": np.array([guidance])}
    rows = [
        session.run(names, {"sample": sample[draw : draw + 1], "timestep": np.array([timestep]), **told})
        for timestep in timesteps
        for draw in range(len(sample))
    ]
    return {name: np.concatenate(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def _name_noise(graph: ir.Graph) -> None:
    """Let the noise itself be a value that can be cached, where nothing else fits."""
    sample = next(value for value in graph.inputs if value.name == "sample")
    users = sample.uses()
    copy = add(graph, "Identity", [sample], "sample.copy", behind=sample)
    for node, index in users:
        node.replace_input_with(index, copy)


def _settle_shapes(graph: ir.Graph) -> None:
    """Make shapes constants where all but the rows is known, and fill in shapes that the exporter left open."""
    for node in graph:
        output = node.outputs[0]
        if node.op_type == "Reshape" and (source := node.inputs[1]) is not None and source.producer() is not None:
            maker = source.producer()
            like = maker.inputs[0] if maker is not None and maker.op_type == "Shape" else None
            if like is not None and like.shape is not None and all(isinstance(d, int) for d in like.shape[1:]):
                target = np.array([-1, *(int(d) for d in like.shape[1:])], dtype=np.int64)  # type: ignore[arg-type]
                name = f"{output.name}.shape"
                graph.register_initializer(shape := ir.Value(name=name, const_value=ir.tensor(target, name=name)))
                node.replace_input_with(1, shape)
                output.shape = like.shape
        elif node.op_type in split_concats.BINARY and output.shape is not None:
            output.shape = _broadcast([v.shape for v in node.inputs if v is not None and v.shape is not None])


def _broadcast(shapes: Sequence[ir.Shape]) -> ir.Shape:
    """Return the broadcast shape; a dynamic dimension stays what it is."""
    rank = max(map(len, shapes))
    padded = [(*[1] * (rank - len(shape)), *shape) for shape in shapes]
    return ir.Shape([next((d for d in dims if d != 1), 1) for dims in zip(*padded, strict=True)])


def _downstream(graph: ir.Graph, sources: Collection[ir.Value]) -> set[ir.Value]:
    """Return all values that depend on the sources."""
    found = set(sources)
    for node in graph:
        if any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _choose(graph: ir.Graph, dependent: set[ir.Value], rows: int) -> set[ir.Node]:
    """Return the nodes of the remaining graph: all that depend on the prompt, and what is cheaper there than cached."""
    weights = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    limit = max(MEMORY_FLOOR, MEMORY_SHARE * weights)
    for power in range(40):  # at the end, the noise and the timestep alone are cached
        after = _minimum_cut(graph, dependent, 2.0**power)
        crossing = {v for node in after for v in node.inputs if v is not None and v.producer() not in (None, *after)}
        if rows * sum(map(cost.row_bytes, crossing)) <= limit:
            break
    return after


def _minimum_cut(graph: ir.Graph, dependent: set[ir.Value], dearness: float) -> set[ir.Node]:
    """Return the sink side: a node there costs its work, a value that crosses to it costs its bytes (once)."""
    network = networkx.DiGraph()
    network.add_nodes_from(("prefix", "unet"))
    for node in graph:
        if any(value in dependent for value in node.inputs):
            network.add_edge(node, "unet")  # no capacity: infinite
            continue
        if any(value is not None and value.is_graph_input() for value in node.inputs):
            network.add_edge("prefix", node)  # the remaining graph has neither noise nor timestep
        else:
            network.add_edge("prefix", node, capacity=cost.cost(node))
        for value in node.inputs:
            if value is not None and (producer := value.producer()) is not None:
                network.add_edge(node, producer)  # a prefix holds all that it is computed from
        for value in node.outputs:
            if _cacheable(value):
                # Read where it is cached, written and read again as the rows asked for.
                network.add_edge(node, value, capacity=3 * cost.FLOP_PER_BYTE * dearness * cost.row_bytes(value))
            else:
                network.add_edge(node, value)
            for consumer in value.consumers():
                network.add_edge(value, consumer)
    try:
        _, (_, sink) = networkx.minimum_cut(network, "prefix", "unet")
    except networkx.NetworkXUnbounded as error:
        raise ExportError(
            "This UNet mixes the prompt with something of the timestep or of the noise that is not one value for each "
            "row of the batch: memedge cannot cache it, and so cannot export it."
        ) from error
    return {node for node in graph if node in sink}


def _cacheable(value: ir.Value) -> bool:
    """Return whether it has a row for each row of the batch, all of one known shape."""
    shape = value.shape
    floating = value.dtype is not None and value.dtype.is_floating_point()
    if not floating or not shape:
        return False
    return str(shape[0]) == ROWS and all(isinstance(d, int) for d in shape[1:])


def _feed(graph: ir.Graph, cached: Sequence[ir.Value], after: set[ir.Node], rows: int) -> None:
    """Replace each cached value, for the nodes of the remaining graph, by the rows asked for of a new input."""
    row = ir.Value(name="row", shape=ir.Shape([ROWS]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(row)
    for value in cached:
        stored = ir.Value(name=value.name, shape=ir.Shape([rows, *value.shape[1:]]), type=value.type)  # type: ignore[index]
        value.name = f"{value.name}.computed"
        graph.inputs.append(stored)
        taken = add(graph, "Gather", [stored, row], f"{stored.name}.rows", value, behind=stored, axis=0)
        for node, index in value.uses():
            if node in after:
                node.replace_input_with(index, taken)
