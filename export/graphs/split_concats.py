"""Concatenated with something the prompt cannot change: the half that cannot change is taken apart.

A UNet's up blocks concatenate skip connections, some of which do not depend on the prompt, and then normalise in
groups, activate and convolve. All of that acts on either half alone, up to the sum that ends a convolution:
conv(concat(a, b)) = conv(a) + conv(b). So b's share can be computed once (docs/methods.md §5).
"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import onnx_ir as ir

from memedge.export.graphs.edit import add, constant, replace

Halves = tuple[ir.Value, ir.Value]
UNARY = {"Sigmoid", "Tanh", "Relu", "Gelu", "Erf", "Cast"}
BINARY = {"Mul", "Add", "Sub", "Div"}


def separate(graph: ir.Graph, dependent: Collection[ir.Value]) -> None:
    """Rewrite the graph so that independent halves of concatenations stay apart as far as they can."""
    halves: dict[ir.Value, Halves] = {}
    for node in list(graph):
        found = _concatenation(node, dependent) or _apply(graph, node, halves)
        if found:
            halves[node.outputs[0]] = found


def _concatenation(node: ir.Node, dependent: Collection[ir.Value]) -> Halves | None:
    """Return the inputs of a Concat over channels of which exactly one depends on the prompt."""
    if node.op_type != "Concat" or node.attributes.get_int("axis", 1) != 1 or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    if first is None or second is None or len(first.shape or ()) != 4:
        return None
    return (first, second) if (first in dependent) != (second in dependent) else None


def _apply(graph: ir.Graph, node: ir.Node, halves: dict[ir.Value, Halves]) -> Halves | None:
    """Return the halves of the node's output, made of halves of its inputs; a Conv's are summed at once."""
    data = next((value for value in node.inputs if value in halves), None)
    if data is None:
        return None
    first = int(halves[data][0].shape[1])  # type: ignore[index, arg-type]  # _concatenation saw a 4-D shape
    total = int(data.shape[1])  # type: ignore[index, arg-type]

    def part(value: ir.Value | None, half: int) -> ir.Value | None:
        """Return a half of an input, or None where it has none."""
        if value in halves:
            return halves[value][half]
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
        if value is None or tensor is None:
            return None
        array = tensor.numpy()
        axis = _channel_axis(node, array, total)
        if axis is None:
            return value if array.size == 1 else None
        sliced = np.split(array, [first], axis=axis)[half]
        return constant(graph, f"{value.name}.half{half}", sliced)

    rule = _RULES.get(node.op_type)
    return rule(graph, node, part, (first, total)) if rule else None


Part = Callable[[ir.Value | None, int], ir.Value | None]


def _same(graph: ir.Graph, node: ir.Node, part: Part, _channels: tuple[int, int]) -> Halves | None:
    """An operator that acts on each channel alone runs on each half."""
    inputs = [[part(value, half) for value in node.inputs] for half in (0, 1)]
    if any(value is None for values in inputs for value in values):
        return None
    outputs = []
    for half, values in enumerate(inputs):
        outputs.append(_emit(graph, node, values, half, _with_channels(node.outputs[0], values)))
    return outputs[0], outputs[1]


def _conv(graph: ir.Graph, node: ir.Node, part: Part, _channels: tuple[int, int]) -> None:
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or ir.convenience.get_const_tensor(weight) is None or node.attributes.get_int("group", 1) != 1:
        return
    products = []
    for half in (0, 1):
        values = [part(node.inputs[0], half), part(weight, half), *([bias] if bias is not None and half == 0 else [])]
        products.append(_emit(graph, node, values, half))
    output = node.outputs[0]
    replace(output, add(graph, "Add", products, f"{output.name}.sum", output, before=node))


def _reshape(graph: ir.Graph, node: ir.Node, part: Part, channels: tuple[int, int]) -> Halves | None:
    """[R, C, H, W] ↔ [R, G, C/G · H · W], where no group lies across the border of the halves."""
    first, total = channels
    if node.outputs[0].shape is None or len(node.outputs[0].shape) not in (3, 4):
        return None
    groups = node.outputs[0].shape[1]
    if not isinstance(groups, int) or first * groups % total:
        return None
    border = first * groups // total
    outputs = []
    for half, width in enumerate((border, groups - border)):
        data = part(node.inputs[0], half)
        shape = ir.Shape([node.outputs[0].shape[0], width, *node.outputs[0].shape[2:]])
        target = np.array([-1, *(int(d) for d in shape[1:])], dtype=np.int64)  # type: ignore[arg-type]
        values = [data, constant(graph, f"{node.outputs[0].name}.shape{half}", target)]
        outputs.append(_emit(graph, node, values, half, shape))
    return outputs[0], outputs[1]


_RULES = {"Conv": _conv, "Reshape": _reshape, **dict.fromkeys(UNARY | BINARY | {"InstanceNormalization"}, _same)}


def _channel_axis(node: ir.Node, array: np.ndarray, total: int) -> int | None:
    """Return the axis of a constant operand that runs along the channels: of a weight, a scale, or a broadcast."""
    axis = 1 if node.op_type == "Conv" else 0 if node.op_type == "InstanceNormalization" else array.ndim - 3
    return axis if 0 <= axis < array.ndim and array.shape[axis] == total else None


def _with_channels(like: ir.Value, inputs: list[ir.Value | None]) -> ir.Shape | None:
    """Return `like`'s shape with the channels of its widest input."""
    channels = max(int(v.shape[1]) for v in inputs if v is not None and v.shape is not None and len(v.shape) > 2)  # type: ignore[arg-type]
    return None if like.shape is None else ir.Shape([like.shape[0], channels, *like.shape[2:]])


def _emit(
    graph: ir.Graph, node: ir.Node, inputs: list[ir.Value | None], half: int, shape: ir.Shape | None = None
) -> ir.Value:
    """Insert a copy of the node on other inputs, before it."""
    output = node.outputs[0]
    name = f"{output.name}.half{half}"
    return add(graph, node.op_type, inputs, name, output, before=node, shape=shape, **dict[str, Any](node.attributes))
