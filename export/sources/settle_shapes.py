"""Settling a graph that somebody else exported: every shape known but for the rows, and no arithmetic on shapes.

Exporters that trace with dynamic axes write the sizes of tensors as arithmetic: Shape, Gather, Concat, Reshape. Here
the graph is walked with a few numbers of rows and prompts, by ONNX's own shape inference and nothing else: weights are
not read. What is computed from sizes alone is then known, and what is the same for all those numbers is a constant.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)

from memedge.engine.errors import ExportError
from memedge.export.graphs.edit import constant
from memedge.export.sources.weights import reason

# Numbers of rows and of prompts to walk a graph with. Distinct primes, and no sizes that models have, so that a size
# tells what it stems from.
WALKS = ({"rows": 1009, "prompts": 1511}, {"rows": 1013, "prompts": 1523}, {"rows": 1019, "prompts": 1531})
# Elements of the largest array to compute with: a causal mask is one, a weight is not to be read.
LARGEST = 1 << 15

Known = dict[ir.Value, npt.NDArray[Any]]
Types = dict[ir.Value, onnx.TypeProto]


def tidy(model: ir.Model) -> None:
    """Let all constants be initializers, read by their users directly, and remove what the exporter notes to people."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    IdentityEliminationPass()(model)
    ClearMetadataAndDocStringPass()(model)
    RemoveUnusedNodesPass()(model)


def settle(model: ir.Model, name: str) -> None:
    """Give every value of a graph its type and shape, and replace what is computed from constant sizes by constants.

    Args:
        model: a tidy one, whose inputs have static shapes, but for dimensions called as in `WALKS`.
        name: for people, in errors.

    Raises:
        ExportError: the shape of a value cannot be told, or contradicts another.
    """
    walks = [_walk(model, sizes, name) for sizes in WALKS]
    for node in model.graph:
        for value in node.outputs:
            if value.name:
                value.type, value.shape = _common(value, [types for types, _ in walks])
    known = [data for _, data in walks]
    for node in list(model.graph):
        _fix_inputs(model.graph, node, known)
    RemoveUnusedNodesPass()(model)
    _drop_idle(model)


def _walk(model: ir.Model, sizes: Mapping[str, int], name: str) -> tuple[Types, Known]:
    """Return the type and shape of every value, and the values that sizes and constants alone make."""
    graph, opset = model.graph, model.opset_imports[""]
    imports = [onnx.helper.make_opsetid("", opset)]
    types: Types = {}
    known: Known = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        assert value.shape is not None and value.dtype is not None
        shape = [d if isinstance(d, int) else sizes[str(d)] for d in value.shape]
        types[value] = _type(value.dtype.value, shape)
        if (tensor := value.const_value) is not None and tensor.size <= LARGEST:
            known[value] = tensor.numpy()
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        outputs = [value for value in node.outputs if value.name]
        proto = ir.to_proto(node)
        data = {str(v.name): onnx.numpy_helper.from_array(known[v], v.name) for v in inputs if v in known}
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
            found = onnx.shape_inference.infer_node_outputs(
                schema, proto, {str(v.name): types[v] for v in inputs}, data, opset_imports=imports
            )
        except (onnx.shape_inference.InferenceError, onnx.defs.SchemaError, RuntimeError) as error:
            raise ExportError(
                f"{name} is not a graph that memedge can read: {reason(error)} in {node.name!r}."
            ) from error
        for value in outputs:
            types[value] = found[str(value.name)]
            if _dimensions(types[value]) is None:
                raise ExportError(
                    f"In {name}, the shape of {value.name!r} ({node.op_type}) depends on more than sizes."
                )
        if node.op_type == "Shape":
            known[outputs[0]] = np.array(_dimensions(types[inputs[0]]), np.int64)[_part(node)]
        elif all(v in known for v in inputs) and all(
            math.prod(_dimensions(types[v]) or ()) <= LARGEST for v in outputs
        ):
            results = ReferenceEvaluator(proto).run(None, {str(v.name): known[v] for v in inputs})
            known.update(zip(outputs, map(np.asarray, results), strict=True))
    return types, known


def _type(dtype: int, shape: list[int]) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(dtype, shape)


def _part(shape: ir.Node) -> slice:
    """Return which dimensions a Shape node gives."""
    end = shape.attributes.get("end")
    return slice(shape.attributes.get_int("start", 0), None if end is None else end.as_int())


def _dimensions(found: onnx.TypeProto) -> list[int] | None:
    """Return an inferred shape, None if it is not known in full."""
    tensor = found.tensor_type
    if not tensor.HasField("shape") or not all(d.HasField("dim_value") for d in tensor.shape.dim):
        return None
    return [d.dim_value for d in tensor.shape.dim]


def _common(value: ir.Value, types: list[Types]) -> tuple[ir.TensorType, ir.Shape]:
    """Return what all walks have in common: constant dimensions, and those that are rows or prompts or multiples."""
    shapes = [_dimensions(found[value]) or [] for found in types]
    dims = [_dimension(seen) for seen in zip(*shapes, strict=True)]
    return ir.TensorType(ir.DataType(types[0][value].tensor_type.elem_type)), ir.Shape(dims)


def _dimension(seen: tuple[int, ...]) -> int | str | None:
    if len(set(seen)) == 1:
        return seen[0]
    for axis in WALKS[0]:
        factors = {divmod(size, sizes[axis]) for size, sizes in zip(seen, WALKS, strict=True)}
        if len(factors) == 1 and (factor := factors.pop())[1] == 0:
            return axis if factor[0] == 1 else f"{factor[0]}*{axis}"
    return None


def _fix_inputs(graph: ir.Graph, node: ir.Node, known: list[Known]) -> None:
    """Replace inputs of a node that are made of sizes, where those are constant; and the target shapes of Reshapes."""
    for index, value in enumerate(node.inputs):
        if value is None or value.is_initializer() or not all(value in data for data in known):
            continue
        arrays = [data[value] for data in known]
        if all(np.array_equal(arrays[0], array) for array in arrays[1:]):
            node.replace_input_with(index, constant(graph, f"{value.name}.constant", arrays[0]))
        elif node.op_type == "Reshape" and index == 1:
            output = node.outputs[0]
            assert output.shape is not None
            target = [d if isinstance(d, int) else -1 for d in output.shape]
            if target.count(-1) == 1 and 0 not in target:
                node.replace_input_with(1, constant(graph, f"{output.name}.target", np.array(target, np.int64)))


def _drop_idle(model: ir.Model) -> None:
    """Remove nodes that change nothing: slices of everything, casts to the same type, divisions by 1, broadcasts.

    A broadcast changes nothing if its readers broadcast by themselves.
    """
    for idle in (_takes_all, _is_cast_to_same, _divides_by_one, _is_broadcast):  # what is removed first hides the next
        for node in list(model.graph):
            if not node.outputs[0].is_graph_output() and idle(node):
                assert node.inputs[0] is not None
                node.outputs[0].replace_all_uses_with(node.inputs[0])
        RemoveUnusedNodesPass()(model)


def _takes_all(node: ir.Node) -> bool:
    if node.op_type != "Slice" or node.inputs[0] is None:
        return False
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    tensor = None if steps is None else ir.convenience.get_const_tensor(steps)
    forwards = steps is None or (tensor is not None and bool((tensor.numpy() > 0).all()))
    return forwards and _equal(node.inputs[0].shape, node.outputs[0].shape)


def _is_cast_to_same(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype == node.outputs[0].dtype


def _divides_by_one(node: ir.Node) -> bool:
    if node.op_type != "Div" or node.inputs[0] is None or node.inputs[1] is None:
        return False
    divisor = ir.convenience.get_const_tensor(node.inputs[1])
    one = divisor is not None and divisor.size == 1 and divisor.numpy().item() == 1
    return one and _equal(node.inputs[0].shape, node.outputs[0].shape)


def _is_broadcast(node: ir.Node) -> bool:
    """Return whether all that reads an Expand, of a causal mask, adds it to what is as large, or multiplies by that."""
    if node.op_type != "Expand":
        return False
    for reader, index in node.outputs[0].uses():
        if reader.op_type not in ("Add", "Sub", "Mul", "Div"):
            return False
        other = reader.inputs[1 - index]
        if other is None or other is node.outputs[0] or not _equal(other.shape, reader.outputs[0].shape):
            return False
    return True


def _equal(first: ir.Shape | None, second: ir.Shape | None) -> bool:
    """Return whether two shapes are known and the same."""
    return (
        first is not None
        and second is not None
        and first == second
        and not any(map(first.is_unknown_dim, range(len(first))))
    )
