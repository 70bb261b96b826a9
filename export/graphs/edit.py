"""Adding to a graph: constants, and nodes with named and typed outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Return an initializer of the graph with this name, made of the array if there is none yet."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.asarray(array, order="C"), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
    return graph.initializers[name]


def insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    like: ir.Value,
    *,
    shape: ir.Shape | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Value:
    """Insert a node before another; return its output, of the type of `like` and of the shape given, or of `like`'s."""
    output = ir.Value(name=name, shape=like.shape if shape is None else shape, type=like.type)
    graph.insert_before(before, ir.node(op_type, inputs, attributes, outputs=[output], domain=""))
    return output


def follow(
    graph: ir.Graph,
    value: ir.Value,
    op_type: str,
    name: str,
    *others: ir.Value,
    dtype: ir.DataType | None = None,
    shape: ir.Shape | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Value:
    """Insert a node of the value, and of others, right behind what makes the value; return its output.

    The output is of the type and of the shape given, or of the value's.
    """
    output = ir.Value(
        name=name,
        shape=value.shape if shape is None else shape,
        type=value.type if dtype is None else ir.TensorType(dtype),
    )
    node = ir.node(op_type, [value, *others], attributes, outputs=[output], domain="")
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return output


def cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """Insert a Cast right behind what makes the value; return its output."""
    return follow(graph, value, "Cast", name, dtype=dtype, attributes={"to": dtype})


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let everything use another value; as the graph's output it takes over the name."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.replaced"
        new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def move(source: ir.Graph, target: ir.Graph, prefix: str, before: ir.Node | None = None) -> None:
    """Move all nodes and weights of a graph, named with a prefix, into another: before a node of it, or to its end."""
    nodes, weights = list(source), list(source.initializers.values())
    source.outputs.clear()
    source.remove(nodes)
    source.initializers.clear()
    for value in (*weights, *(value for node in nodes for value in node.outputs)):
        value.name = f"{prefix}.{value.name}"
    for node in nodes:
        node.name = f"{prefix}.{node.name}"
    for weight in weights:
        target.register_initializer(weight)
    if before is None:
        target.extend(nodes)
    else:
        target.insert_before(before, nodes)
