"""Each rule of differentiation against torch's autograd, and what has no rule."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch.nn import functional as F

from memedge.export.graphs.differentiate import differentiate
from memedge.export.graphs.edit import constant
from memedge.export.graphs.terms import NotDifferentiableError

RNG = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node_graph(
    op_type: str, x: np.ndarray, others: list[np.ndarray], place: int, output: tuple, outputs: int, attributes: dict
) -> tuple[ir.Model, list[ir.Value]]:
    """A graph of one node, its first dimension dynamic where it can be; the input `place` is x, others constants."""
    first = [] if op_type in ("Add", "MatMul") else ["rows"]  # their constants have rows too
    source = ir.Value(name="x", shape=ir.Shape([*first, *x.shape[len(first) :]]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([source], [], nodes=[], opset_imports={"": 20}, name="test")
    inputs = [constant(graph, f"c{i}", array) for i, array in enumerate(others)]
    inputs.insert(place, source)
    found = [
        ir.Value(
            name=f"y{i}",
            shape=ir.Shape([*first, *output[len(first) :]]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        for i in range(outputs)
    ]
    graph.append(ir.node(op_type, inputs, attributes, outputs=found))
    return ir.Model(graph, ir_version=10), found


def derivative(model: ir.Model, output: ir.Value, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Differentiate the model's graph, and let ONNX Runtime compute it."""
    graph = model.graph
    given = ir.Value(name="given", shape=output.shape, type=output.type)
    graph.inputs.append(given)
    found = differentiate(graph, output, given, graph.inputs[0], {})
    graph.outputs.append(found)
    content = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "given": gradient})[0]


# operator, x, the other inputs, the place of x among them, attributes, the same in torch
RULES = {
    "add": ("Add", values(3, 4), [values(4)], 0, {}, lambda x, b: x + b),
    "add, repeated": ("Add", values(3, 1, 4), [values(3, 5, 4)], 1, {}, lambda x, b: x + b),
    "add, fewer dimensions": ("Add", values(1, 4), [values(2, 3, 4)], 0, {}, lambda x, b: x + b),
    "sub": ("Sub", values(3, 4), [values(4)], 0, {}, lambda x, b: x - b),
    "sub, second": ("Sub", values(3, 4), [values(3, 4)], 1, {}, lambda x, b: b - x),
    "mul": ("Mul", values(3, 4, 1), [values(3, 4, 5)], 0, {}, lambda x, b: x * b),
    "div": ("Div", values(3, 4), [values(4) + 3], 0, {}, lambda x, b: x / b),
    "div, second": ("Div", values(3, 4) + 3, [values(3, 4)], 1, {}, lambda x, b: b / x),
    "div, second, repeated": ("Div", values(3, 1) + 3, [values(3, 4)], 1, {}, lambda x, b: b / x),
    "pow": ("Pow", values(3, 4), [np.array(2, np.float32)], 0, {}, lambda x, _: x**2),
    "pow, cubic": ("Pow", values(3, 4), [np.array(3, np.float32)], 0, {}, lambda x, _: x**3),
    "sqrt": ("Sqrt", values(3, 4) ** 2 + 1, [], 0, {}, torch.sqrt),
    "reciprocal": ("Reciprocal", values(3, 4) + 4, [], 0, {}, torch.reciprocal),
    "mean": ("ReduceMean", values(3, 4, 5), [np.array([-1])], 0, {"keepdims": 1}, lambda x, _: x.mean(-1, True)),
    "tanh": ("Tanh", values(3, 4), [], 0, {}, torch.tanh),
    "gelu, tanh": ("Gelu", values(3, 4), [], 0, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    "sigmoid": ("Sigmoid", values(3, 4), [], 0, {}, torch.sigmoid),
    "gelu": ("Gelu", values(3, 4), [], 0, {}, F.gelu),
    "softmax": ("Softmax", values(3, 4, 5), [], 0, {"axis": -1}, lambda x: x.softmax(-1)),
    "layer norm": (
        "LayerNormalization",
        values(3, 4, 5),
        [values(5), values(5)],
        0,
        {"axis": -1, "epsilon": 1e-3},
        lambda x, w, b: F.layer_norm(x, (5,), w, b, 1e-3),
    ),
    "instance norm": (
        "InstanceNormalization",
        values(2, 3, 7),
        [values(3), values(3)],
        0,
        {"epsilon": 1e-3},
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=1e-3),
    ),
    "conv 3 × 3": (
        "Conv",
        values(2, 3, 6, 5),
        [values(4, 3, 3, 3), values(4)],
        0,
        {"pads": [1, 1, 1, 1]},
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
    ),
    "conv, strides that leave a row out": (
        "Conv",
        values(2, 3, 6, 7),
        [values(4, 3, 3, 3)],
        0,
        {"pads": [1, 1, 1, 1], "strides": [2, 2]},
        lambda x, w: F.conv2d(x, w, stride=2, padding=1),
    ),
    "conv, one-sided padding": (
        "Conv",
        values(2, 3, 4, 4),
        [values(4, 3, 2, 2)],
        0,
        {"pads": [1, 0, 0, 1]},
        lambda x, w: F.conv2d(F.pad(x, (0, 1, 1, 0)), w),
    ),
    "conv, groups and dilation": (
        "Conv",
        values(2, 4, 7, 7),
        [values(6, 2, 3, 3)],
        0,
        {"group": 2, "dilations": [2, 2]},
        lambda x, w: F.conv2d(x, w, groups=2, dilation=2),
    ),
    "matmul by weights": ("MatMul", values(2, 3, 4), [values(4, 5)], 0, {}, torch.matmul),
    "matmul, rows": ("MatMul", values(3, 4), [values(4, 5)], 0, {}, torch.matmul),
    "matmul, batch": ("MatMul", values(2, 3, 4), [values(2, 4, 5)], 0, {}, torch.matmul),
    "matmul, batch, second": ("MatMul", values(2, 4, 5), [values(2, 3, 4)], 1, {}, lambda x, a: a @ x),
    "gemm": ("Gemm", values(3, 4), [values(4, 5), values(5)], 0, {}, lambda x, w, b: x @ w + b),
    "gemm, turned": ("Gemm", values(3, 4), [values(5, 4)], 0, {"transB": 1}, lambda x, w: x @ w.T),
    "reshape": ("Reshape", values(2, 3, 4), [np.array([0, 12])], 0, {}, lambda x, _: x.reshape(2, 12)),
    "unsqueeze": ("Unsqueeze", values(2, 3), [np.array([2])], 0, {}, lambda x, _: x[:, :, None]),
    "transpose": ("Transpose", values(2, 3, 4), [], 0, {"perm": [0, 2, 1]}, lambda x: x.transpose(1, 2)),
    "concat": ("Concat", values(2, 3), [values(2, 4)], 1, {"axis": 1}, lambda x, a: torch.cat([a, x], 1)),
    "slice": (
        "Slice",
        values(2, 7, 3),
        [np.array([-6]), np.array([1000]), np.array([1])],
        0,
        {},
        lambda x, *_: x[:, 1:],
    ),
    "one of an axis": ("Gather", values(2, 5, 3), [np.array(-2)], 0, {"axis": 1}, lambda x, _: x[:, 3]),
    "depth to space": (
        "DepthToSpace",
        values(2, 8, 3, 3),
        [],
        0,
        {"blocksize": 2},
        lambda x: x.reshape(2, 2, 2, 2, 3, 3).permute(0, 3, 4, 1, 5, 2).reshape(2, 2, 6, 6),
    ),
    "identity": ("Identity", values(2, 3), [], 0, {}, lambda x: x * 1),
    "cast": ("Cast", values(2, 3), [], 0, {"to": 1}, lambda x: x * 1),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_rule(rule):
    op_type, x, others, place, attributes, function = rule
    leaf = torch.tensor(x, requires_grad=True)
    expected = function(leaf, *map(torch.from_numpy, others))
    model, (output,) = node_graph(op_type, x, others, place, tuple(expected.shape), 1, attributes)
    gradient = values(*expected.shape)
    expected.backward(torch.from_numpy(gradient))
    assert leaf.grad is not None
    found = derivative(model, output, x, gradient)
    assert found.shape == x.shape
    np.testing.assert_allclose(found, leaf.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_split():
    x, gradient = values(3, 4), values(3, 4)
    model, outputs = node_graph("Split", x, [], 0, (3, 2), 2, {"axis": 1, "num_outputs": 2})
    joined = ir.Value(name="joined", shape=ir.Shape(["rows", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.append(ir.node("Concat", outputs[::-1], {"axis": 1}, outputs=[joined]))
    np.testing.assert_array_equal(derivative(model, joined, x, gradient), np.roll(gradient, 2, axis=1))


def test_a_value_used_several_times():
    """x · σ(x) + x: three ways from one source to one output."""
    x, gradient = values(3, 4), values(3, 4)
    model, (sigmoid,) = node_graph("Sigmoid", x, [], 0, x.shape, 1, {})
    product, total = (ir.Value(name=name, shape=sigmoid.shape, type=sigmoid.type) for name in ("product", "total"))
    model.graph.append(ir.node("Mul", [model.graph.inputs[0], sigmoid], outputs=[product]))
    model.graph.append(ir.node("Add", [product, model.graph.inputs[0]], outputs=[total]))
    leaf = torch.tensor(x, requires_grad=True)
    (F.silu(leaf) + leaf).backward(torch.from_numpy(gradient))
    assert leaf.grad is not None
    np.testing.assert_allclose(derivative(model, total, x, gradient), leaf.grad.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("op_type", "x", "others", "attributes", "words"),
    [
        ("Hardmax", values(2, 3), [], {}, "no rule for ai.onnx::Hardmax"),
        ("Softmax", values(2, 3, 4), [], {"axis": 1}, "an axis other than the last"),
        ("DepthToSpace", values(2, 4, 3, 3), [], {"blocksize": 2, "mode": "CRD"}, "columns first"),
        ("Conv", values(2, 3, 6, 6), [values(4, 3, 3, 3)], {"auto_pad": "SAME_UPPER"}, "automatic padding"),
        ("Slice", values(2, 6), [*map(np.array, ([0], [6], [1], [2]))], {}, "steps"),
        ("Gather", values(2, 5), [np.array([0, 1])], {"axis": 1}, "several places"),
        ("Gather", values(2, 5), [np.array([0, 1])], {}, "an index that is not known"),
    ],
)
def test_no_rule(op_type, x, others, attributes, words):
    model, (output,) = node_graph(op_type, x, others, 0, x.shape, 1, attributes)
    with pytest.raises(NotDifferentiableError, match=words):
        derivative(model, output, x, x)


def test_what_does_not_depend_on_the_source():
    model, (output,) = node_graph("Identity", values(2, 3), [], 0, (2, 3), 1, {})
    other = ir.Value(name="other", shape=output.shape, type=output.type)
    model.graph.inputs.append(other)
    with pytest.raises(NotDifferentiableError, match="does not depend on other"):
        differentiate(model.graph, output, output, other, {})
