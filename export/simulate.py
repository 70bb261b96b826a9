"""What a GPU makes of a mixed fp16 graph, computed on a CPU.

ONNX Runtime's CPU provider has no fp16 kernels for most operators: it runs whole regions of a graph in float32, so that
its results are closer to float32 than a GPU's, and what would overflow does not. Here every operator computes in
float32, as tensor cores add up, and then rounds its result to fp16, as they store it: beyond 65504 to infinity.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedNodesPass

from memedge.engine.directory import TEXT_ENCODER, UNET, Tensors
from memedge.export import parity
from memedge.export.build import cast, constant, insert, replace
from memedge.export.half import HALF, LAYOUT, SINGLE
from memedge.export.ranges import heads, scale


def epsilon(folder: Path, cached: Tensors, ids: npt.NDArray[np.int64], draws: int) -> npt.NDArray[np.float32]:
    """Return ε, [B, 2, n, C, H, W], by the fp16 graphs in a folder, for ids [B, L]."""
    states = open_session(folder / TEXT_ENCODER).run(["states"], {"ids": ids})[0]
    unet = open_session(folder / UNET)
    first = np.zeros(1, dtype=np.int64)

    def predict(state: npt.NDArray[np.float32], row: int) -> npt.NDArray[np.float32]:
        feeds = {"states": state[None], "prompt": first, "row": first + row, **cached}
        prediction: npt.NDArray[np.float32] = unet.run(["prediction"], feeds)[0][0]
        return prediction

    return parity.epsilon(predict, states, draws)


def open_session(path: Path) -> Any:
    """Return an ONNX Runtime session that computes what a GPU would of the mixed graph at `path`."""
    model = ir.load(path)
    rewrite(model)
    temporary = path.with_name("simulated.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Optimised, pairs of Casts might be taken for nothing; and weights would be widened all at once, not one by one.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # that of the graph
    try:
        ir.save(model, temporary)  # weights in a second file stay where they are
        return onnxruntime.InferenceSession(temporary, options, providers=["CPUExecutionProvider"])
    finally:
        temporary.unlink(missing_ok=True)


def rewrite(model: ir.Model) -> None:
    """Let a mixed graph compute in float32, and round what was fp16 by pairs of Casts."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "MultiHeadAttention" and node.outputs[0].dtype == HALF:
            _open(graph, node)
    nodes = list(graph)
    widening = [node for node in nodes if node.op_type == "Cast" and node.inputs[0].dtype == HALF]  # type: ignore[union-attr]
    for stored in graph.inputs:
        if stored.dtype == HALF:
            _then(graph, stored, SINGLE)
    for node in nodes:
        for value in (value for value in node.outputs if value.dtype == HALF):
            if node.op_type == "Cast":
                _then(graph, value, SINGLE)
                continue
            value.type = ir.TensorType(SINGLE)
            if node.op_type not in LAYOUT:
                _then(graph, value, HALF, SINGLE)
        for index, weight in enumerate(node.inputs):
            if weight is not None and weight.is_initializer() and weight.dtype == HALF:
                name = f"{node.outputs[0].name}.weight{index}"
                to = {"to": SINGLE}
                single = insert(graph, node, "Cast", [weight], name, node.outputs[0], shape=weight.shape, attributes=to)
                node.replace_input_with(index, single)
    for node in widening:
        replace(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]
    RemoveUnusedNodesPass()(model)


def _then(graph: ir.Graph, value: ir.Value, *types: ir.DataType) -> None:
    """Let all that reads the value read it cast to one type after the other."""
    users, last = value.uses(), value
    for dtype in types:
        last = cast(graph, last, dtype, f"{last.name}.{dtype}")
    for node, index in users:
        node.replace_input_with(index, last)


def _open(graph: ir.Graph, node: ir.Node) -> None:
    """Take an attention apart, as GPUs without a fused kernel for it do: logits are stored in fp16 too."""
    output, count = node.outputs[0], heads(node)
    assert output.shape is not None
    factor = constant(graph, f"{output.name}.scale", np.array(scale(node), np.float16))
    apart = constant(graph, f"{output.name}.apart", np.array([0, 0, count, -1]))
    together = constant(graph, f"{output.name}.together", np.array([0, 0, -1]))
    four = ir.Shape([None] * 4)

    def add(op_type: str, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return insert(graph, node, op_type, inputs, f"{output.name}.{name}", output, shape=four, attributes=attributes)

    def split(name: str, index: int, *perm: int) -> ir.Value:
        value = node.inputs[index]
        assert value is not None
        return add("Transpose", f"{name}.heads", add("Reshape", f"{name}.apart", value, apart), perm=perm)

    query, key, value = split("q", 0, 0, 2, 1, 3), split("k", 1, 0, 2, 3, 1), split("v", 2, 0, 2, 1, 3)
    logits = add("MatMul", "logits", add("Mul", "q.scaled", query, factor), key)
    shares = add("Softmax", "shares", logits, axis=-1)
    rows = add("Transpose", "rows", add("MatMul", "products", shares, value), perm=(0, 2, 1, 3))
    replace(output, insert(graph, node, "Reshape", [rows, together], f"{output.name}.opened", output))
    graph.remove(node, safe=True)
