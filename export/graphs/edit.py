"""Editing a graph: nodes and constants that are added, values that are replaced, graphs that move into others."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def add(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    like: ir.Value | None = None,
    *,
    before: ir.Node | None = None,
    behind: ir.Value | None = None,
    shape: Sequence[Any] | ir.Shape | None = None,
    dtype: ir.DataType | None = None,
    **attributes: Any,
) -> ir.Value:
    """Add a node of ONNX's own operators, with one output, to a graph; return that output.

    Args:
        graph: what it is added to: at its end, unless `before` or `behind` says where.
        op_type: the operator.
        inputs: its inputs; None is one that is left out.
        name: the output's.
        like: the output has this value's type and shape. Default: the first input's.
        before: the node that it is added before.
        behind: it is added right behind what makes this value; of an input, at the graph's beginning.
        shape: the output's, in place of that of `like`.
        dtype: the output's, in place of that of `like`.
        attributes: the operator's.
    """
    like = inputs[0] if like is None else like
    assert like is not None
    output = ir.Value(
        name=name,
        shape=like.shape if shape is None else ir.Shape(shape),
        type=like.type if dtype is None else ir.TensorType(dtype),
    )
    node = ir.node(op_type, inputs, attributes, outputs=[output])
    if behind is not None and (maker := behind.producer()) is not None:
        graph.insert_after(maker, node)
    elif behind is not None:
        graph.insert_before(graph[0], node)
    elif before is not None:
        graph.insert_before(before, node)
    else:
        graph.append(node)
    return output


def cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """Add a Cast right behind what makes the value; return its output."""
    return add(graph, "Cast", [value], name, behind=value, dtype=dtype, to=dtype)


def constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Return an initializer of the graph with this name, made of the array if there is none yet."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.asarray(array, order="C"), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
    return graph.initializers[name]


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
