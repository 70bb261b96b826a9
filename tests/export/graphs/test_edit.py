"""Nodes are added where, and with outputs as, they are asked for."""

import numpy as np
import onnx_ir as ir
import pytest

from memedge.export.graphs.edit import HALF, SINGLE, add, cast, constant


@pytest.fixture
def graph() -> ir.Graph:
    """Exp of an input x [rows, 3], and Neg of that."""
    x = ir.Value(name="x", shape=ir.Shape(["rows", 3]), type=ir.TensorType(SINGLE))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20})
    add(graph, "Neg", [add(graph, "Exp", [x], "exp")], "neg")
    return graph


def order(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


def test_places(graph):
    x, (exp, neg) = graph.inputs[0], list(graph)
    add(graph, "Sin", [x], "sin")
    add(graph, "Cos", [x], "cos", before=neg)
    add(graph, "Abs", [exp.outputs[0]], "abs", behind=exp.outputs[0])
    add(graph, "Tan", [x], "tan", behind=x)
    assert order(graph) == ["Tan", "Exp", "Abs", "Cos", "Neg", "Sin"]


def test_outputs(graph):
    x, neg = graph.inputs[0], list(graph)[1].outputs[0]
    same = add(graph, "Abs", [x], "same")
    assert (same.name, same.dtype, same.shape) == ("same", SINGLE, x.shape)
    half = cast(graph, neg, HALF, "half")
    assert (half.dtype, half.shape) == (HALF, x.shape)
    assert list(graph)[2].attributes["to"].as_int() == HALF  # right behind Neg
    index = constant(graph, "index", np.array([1]))
    taken = add(graph, "Gather", [index, index], "taken", like=x, shape=[1, None], axis=0)
    assert (taken.dtype, list(taken.shape)) == (SINGLE, [1, None])
    assert add(graph, "Shape", [x], "size", shape=[2], dtype=ir.DataType.INT64).dtype == ir.DataType.INT64


def test_constants_are_made_once(graph):
    one = constant(graph, "one", np.ones(2, np.float32))
    assert constant(graph, "one", np.zeros(2, np.float32)) is one
    assert (one.dtype, list(one.shape), one.const_value.numpy().tolist()) == (SINGLE, [2], [1, 1])
