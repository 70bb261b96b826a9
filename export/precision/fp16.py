"""A float32 graph → one that computes in fp16 wherever that is safe, and in float32 where it is not.

TensorRT 11 takes precision from the graph alone, so the graph says for each operator what it computes in. Products and
what is between them run in fp16; norms and softmax, and whatever exceeds fp16's largest number, 65504, or might for
other prompts, stay float32, with a Cast wherever the two meet. Inputs and outputs stay as they are, but for the cached
inputs, which are stored in fp16: half of what a GPU reads per prompt.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from memedge.engine.directory import Tensors
from memedge.engine.errors import ExportError
from memedge.export.graphs import files
from memedge.export.graphs.edit import HALF, SINGLE, cast
from memedge.export.precision.ranges import Ranges

FLOATS = {HALF, SINGLE}
LARGEST = 65504.0
# How much larger than with the probes' prompts a value may become with others. In the embedded model, 40 prompts, some
# of them memorized, took values up to 4.4 times as far as the probes did (the median value 1.07 times, logits 2.3).
MARGIN = 8.0
# Operators that move values and compute nothing; Resize, as UNets enlarge: by nearest neighbours.
LAYOUT = {
    "Concat",
    "DepthToSpace",
    "Expand",
    "Gather",
    "Identity",
    "Reshape",
    "Resize",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
ACTIVATION = {"Erf", "Gelu", "Mul", "Relu", "Sigmoid", "Tanh"}
ARITHMETIC = {"Add", "Conv", "Div", "Gemm", "MatMul", "MultiHeadAttention", "Sub"}
# Operators that may run in fp16; all others stay float32.
NARROW = LAYOUT | ACTIVATION | ARITHMETIC


def convert(source: Path, path: Path, ranges: Ranges, kept: Collection[str] = ()) -> None:
    """Write the float32 graph at `source` to `path` as a mixed one, with a second file of weights if it has one.

    Nodes whose first output has a name in `kept` stay float32 too.
    """
    model = ir.load(source)
    narrow(model, wide(model.graph, ranges) | {node for node in model.graph if node.outputs[0].name in kept})
    files.save(model, path, external_data=source.with_name(f"{source.name}.data").exists())


def narrow_outputs(path: Path) -> None:
    """Let the graph at `path`, which computes in float32, give its outputs in fp16: what `convert`'s UNet caches."""
    model = ir.load(path)
    graph = model.graph
    for index in range(len(graph.outputs)):
        _cast_output(graph, index, HALF)
    files.overwrite(model, path)


def cached_in_half(cached: Tensors) -> Tensors:
    """Return the cached inputs, rounded to fp16.

    Raises:
        ExportError: one of them exceeds fp16: engines store all of them in one type.
    """
    for array in cached.values():
        largest = float(np.abs(array).max())
        if not largest <= LARGEST:
            raise ExportError(
                f"A value that is the same for all prompts reaches {largest:.3g}, more than fp16's largest number, "
                f"{LARGEST:g}: nothing was written; export in fp32."
            )
    return {name: array.astype(np.float16) for name, array in cached.items()}


def wide(graph: ir.Graph, ranges: Ranges) -> set[ir.Node]:
    """Return the nodes that stay float32: fragile ones, and those that read or make what may exceed fp16."""
    found = {node for node in graph if node.op_type not in NARROW}
    for node in graph:
        if node.op_type == "InstanceNormalization":
            found |= _group_norm(node)
    found |= _of_timestep(graph) | _last_layer(graph)
    large = {name for name, largest in ranges.values.items() if not largest * MARGIN <= LARGEST}
    logits = {name for name, largest in ranges.logits.items() if not largest * MARGIN <= LARGEST}
    weights = {v for v in graph.initializers.values() if v.dtype in FLOATS and not _magnitude(v) <= LARGEST}
    for node in graph:
        values = (*node.inputs, *node.outputs)
        if node.outputs[0].name in logits or any(v is not None and (v.name in large or v in weights) for v in values):
            found.add(node)
    return found


def narrow(model: ir.Model, wide: Collection[ir.Node]) -> None:
    """Let all nodes but `wide` compute in fp16: their weights, values, and Casts wherever they meet float32."""
    graph = model.graph
    nodes = list(graph)
    for stored in graph.inputs:
        if str(stored.name).startswith("cached."):
            stored.type = ir.TensorType(HALF)
    for node in nodes:
        for output in node.outputs:
            if output.dtype in FLOATS and node not in wide:
                output.type = ir.TensorType(HALF)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in nodes:
        wanted = SINGLE if node in wide else HALF
        inputs = node.inputs[:1] if node.op_type == "Resize" else node.inputs  # its scales are float32 always
        for index, value in enumerate(inputs):
            if value is None or value.dtype not in FLOATS or value.dtype == wanted:
                continue
            if (value, wanted) not in casts:
                weight = value.is_initializer()
                casts[value, wanted] = (
                    _weight_in_half(graph, value) if weight else cast(graph, value, wanted, f"{value.name}.{wanted}")
                )
            node.replace_input_with(index, casts[value, wanted])
    for index, result in enumerate(graph.outputs):
        if result.dtype == HALF:
            _cast_output(graph, index, SINGLE)
    RemoveUnusedNodesPass()(model)


def _cast_output(graph: ir.Graph, index: int, dtype: ir.DataType) -> None:
    """Let the graph give one of its outputs, which is of the other type, in `dtype`, under the same name."""
    result = graph.outputs[index]
    name, result.name = str(result.name), f"{result.name}.{'half' if dtype == SINGLE else 'single'}"
    graph.outputs[index] = cast(graph, result, dtype, name)


def _group_norm(node: ir.Node) -> set[ir.Node]:
    """Return the nodes of the group norm that an InstanceNormalization is the heart of: two Reshapes, Mul and Add."""
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    found = {before} if before is not None and before.op_type == "Reshape" else set()
    for op_type in ("Reshape", "Mul", "Add"):
        users = node.outputs[0].consumers()
        if len(users) != 1 or users[0].op_type != op_type:
            break
        node = users[0]
        found.add(node)
    return found


def _of_timestep(graph: ir.Graph) -> set[ir.Node]:
    """Return what is left of the time embedding: vectors that no prompt changes. Their work is next to none."""
    dependent = {value for value in graph.inputs if value.name == "states"}
    if not dependent:
        return set()
    found = set()
    for node in graph:
        if any(value in dependent for value in node.inputs):
            dependent.update(node.outputs)
        elif all(value.shape is not None and len(value.shape) <= 2 for value in node.outputs):
            found.add(node)
    return found


def _last_layer(graph: ir.Graph) -> set[ir.Node]:
    """Return the last convolution and the activation function before it, half a percent of the work of SD 1.4's UNet.

    Nothing after it evens its rounding out. Measured on the embedded model, 40 prompts, by `simulate`: with it in fp16,
    norms are wrong by up to 6.7e-3 (median 1.2e-3), with the convolution alone in float32 by up to 5.4e-3 (9.6e-4),
    with both by up to 1.4e-3 (6.3e-4).
    """
    found: set[ir.Node] = set()
    ahead = [node for node in graph if node.op_type == "Conv"][-1:]
    while ahead:
        node = ahead.pop()
        found.add(node)
        makers = (value.producer() for value in node.inputs if value is not None)
        ahead.extend(maker for maker in makers if maker is not None and maker.op_type in ACTIVATION)
    return found


def _magnitude(weight: ir.Value) -> float:
    assert weight.const_value is not None
    array = weight.const_value.numpy()
    return max(float(array.max()), -float(array.min())) if array.size else 0.0


def _weight_in_half(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """Return the weight as an fp16 initializer, which is computed when it is written: one at a time is in memory."""
    tensor, name = weight.const_value, f"{weight.name}.half"
    assert tensor is not None
    shape = ir.Shape(tensor.numpy().shape)
    lazy = ir.LazyTensor(lambda: ir.tensor(tensor.numpy().astype(np.float16)), dtype=HALF, shape=shape, name=name)
    value = ir.Value(name=name, const_value=lazy, shape=shape, type=ir.TensorType(HALF))
    graph.register_initializer(value)
    return value
