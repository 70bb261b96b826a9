"""int8 on differences from the empty prompt: what a prompt changes is small, and is what scores are made of.

Quantised as they are, a UNet's activations take steps as large as the guidance vector Δ = ε_c − ε_0 of a clean prompt:
in the embedded model Δ was wrong by 80 % of itself. So convolutions, which are linear, run on x − x_0, where x_0 is
their input for the empty prompt on the same row:

    conv(x) = y_0 + conv₈(x − x_0),  y_0 = conv(x_0)

The scale of x − x_0 is that of the call, the scale of the result a multiple of it, calibrated on prompts. x_0 and y_0
are tables in the graph, a row for every (timestep, draw), in 8 bits: their own rounding is the same for all prompts and
drops out of Δ. Linear layers have the scale of the call (ONNX Runtime's DynamicQuantizeMatMul). What stays float32:
1 × 1 convolutions, for which reading the tables outweighs the gain; the last convolution, half a percent of the work;
norms, activation functions, attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from memedge.engine.directory import Tensors
from memedge.export.graphs import files
from memedge.export.graphs.edit import add, constant
from memedge.export.precision.scratch_session import open_session

# Of weights: two products with uint8 fit the 16-bit sums of CPUs without VNNI, so that all CPUs compute the same.
LARGEST = 64
MICROSOFT = "com.microsoft"


@dataclass
class Observed:
    """A convolution's float32 activations.

    Attributes:
        source: its input for the empty prompt, [2n, C, H, W].
        result: its output for the empty prompt, [2n, C, H, W].
        gain: the largest change of the output, in steps of the quantised change of the input; 0 if nothing changes.
    """

    source: npt.NDArray[np.float32]
    result: npt.NDArray[np.float32]
    gain: float = 0.0


def quantise(path: Path, states: npt.NDArray[np.float32], cached: Tensors) -> None:
    """Replace the UNet at `path` (float32, split, weights in a second file) by an int8 one with the same inputs.

    Args:
        path: of the graph; its folder is used for temporary files.
        states: float32 [1 + K, L, D], of the empty prompt and of prompts to calibrate on.
        cached: the graph's cached inputs, [2n, …].
    """
    observed = _observe(path, states, cached)
    model = ir.load(path)
    model.opset_imports.setdefault(MICROSOFT, 1)
    _convolutions(model.graph, observed)
    _linear_layers(model.graph)
    RemoveUnusedNodesPass()(model)
    files.overwrite(model, path)


def _targets(graph: ir.Graph) -> list[ir.Node]:
    """Return the convolutions to quantise, if the prompt changes them: all that are larger than 1 × 1 but the last."""
    nodes = [node for node in graph if node.op_type == "Conv"][:-1]
    return [node for node in nodes if (w := _weight(node)) is not None and set(w.shape.numpy()[2:]) != {1}]


def _weight(node: ir.Node) -> ir.TensorProtocol | None:
    value = node.inputs[1]
    return None if value is None else ir.convenience.get_const_tensor(value)


def _ends(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    source = node.inputs[0]
    assert source is not None
    return source, node.outputs[0]


def _observe(path: Path, states: npt.NDArray[np.float32], cached: Tensors) -> dict[str | None, Observed]:
    """Return what the convolutions to quantise see, by the names of their outputs."""
    model = ir.load(path)
    ends = [_ends(node) for node in _targets(model.graph)]
    values = list(dict.fromkeys(value for pair in ends for value in pair))
    model.graph.outputs.extend(values)
    session = open_session(model, path)
    names = [value.name for value in values]
    rows = len(next(iter(cached.values())))
    empty = [_run(session, names, states[0], row, cached) for row in range(rows)]
    observed = {
        y.name: Observed(np.concatenate([e[x.name] for e in empty]), np.concatenate([e[y.name] for e in empty]))
        for x, y in ends
    }
    for state in states[1:]:
        for row in range(rows):
            arrays = _run(session, names, state, row, cached)
            for x, y in ends:
                found = observed[y.name]
                step = _step(arrays[x.name][0] - found.source[row])
                if step > 0:
                    change = float(np.abs(arrays[y.name][0] - found.result[row]).max())
                    found.gain = max(found.gain, change / step)
    return observed


def _run(
    session: Any, names: Sequence[str | None], state: npt.NDArray[np.float32], row: int, cached: Tensors
) -> dict[str | None, npt.NDArray[np.float32]]:
    feeds = {"states": state[None], "prompt": np.zeros(1, np.int64), "row": np.array([row]), **cached}
    return dict(zip(names, session.run(names, feeds), strict=True))


def _step(values: npt.NDArray[np.float32]) -> float:
    """Return the scale that DynamicQuantizeLinear gives the values."""
    return (max(0.0, float(values.max())) - min(0.0, float(values.min()))) / 255


def _convolutions(graph: ir.Graph, observed: dict[str | None, Observed]) -> None:
    row = next(value for value in graph.inputs if value.name == "row")
    centre = constant(graph, "int8.centre", np.array(128, np.uint8))
    inputs: dict[ir.Value, Sequence[ir.Value]] = {}  # of convolutions that share theirs
    # Taken before anything is replaced: a convolution may read another's output.
    for node, (x, y) in [(node, _ends(node)) for node in _targets(graph)]:
        found = observed[y.name]
        if found.gain == 0:
            continue
        if x not in inputs:
            source, _ = _ends(node)  # x, or what replaced it
            empty = _table(graph, node, row, f"{x.name}.in.empty", found.source, source)
            change = add(graph, "Sub", [source, empty], f"{x.name}.in.change", before=node)
            inputs[x] = _outputs(graph, node, ir.node("DynamicQuantizeLinear", [change], num_outputs=3), change)
        quantised, step, zero = inputs[x]
        weight = _quantised_weight(graph, node, f"{y.name}.weight", axis=0)
        ratio = constant(graph, f"{y.name}.ratio", np.array(found.gain / 127, np.float32))
        target = add(graph, "Mul", [step, ratio], f"{y.name}.out.step", before=node), centre
        operands = [quantised, step, zero, *weight, *target]
        name = f"{y.name}.out.uint8"
        product = add(
            graph, "QLinearConv", operands, name, centre, before=node, shape=y.shape, **dict[str, Any](node.attributes)
        )
        change = add(graph, "DequantizeLinear", [product, *target], f"{y.name}.out.change", y, before=node)
        empty = _table(graph, node, row, f"{y.name}.out.empty", found.result, y)
        y.replace_all_uses_with(add(graph, "Add", [change, empty], f"{y.name}.int8", y, before=node))


def _linear_layers(graph: ir.Graph) -> None:
    for node in list(graph):
        weight = _weight(node) if node.op_type in ("Gemm", "MatMul") else None
        if weight is None or len(weight.shape) != 2 or node.attributes:
            continue
        y = node.outputs[0]
        quantised, scale, _ = _quantised_weight(graph, node, f"{y.name}.weight", axis=1)
        inputs = [node.inputs[0], quantised, scale, None, *node.inputs[2:]]
        product = ir.node("DynamicQuantizeMatMul", inputs, domain=MICROSOFT)
        y.replace_all_uses_with(_outputs(graph, node, product, y)[0])


def _outputs(graph: ir.Graph, before: ir.Node, node: ir.Node, like: ir.Value) -> Sequence[ir.Value]:
    """Insert the node and name its outputs after `like`."""
    for number, value in enumerate(node.outputs):
        value.name = f"{like.name}.int8.{number}"
    graph.insert_before(before, node)
    return node.outputs


def _quantised_weight(graph: ir.Graph, node: ir.Node, name: str, axis: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return the node's weight as int8 with a scale, and 0 as zero point, for every index of `axis`."""
    tensor = _weight(node)
    assert tensor is not None
    array = tensor.numpy()
    others = tuple(i for i in range(array.ndim) if i != axis)
    scale = np.abs(array).max(axis=others, keepdims=True) / LARGEST
    scale[scale == 0] = 1
    return (
        constant(graph, f"{name}.int8", np.round(array / scale).astype(np.int8)),
        constant(graph, f"{name}.scale", scale.ravel()),
        constant(graph, f"{name}.zero", np.zeros(scale.size, np.int8)),
    )


def _table(
    graph: ir.Graph, before: ir.Node, row: ir.Value, name: str, array: npt.NDArray[np.float32], like: ir.Value
) -> ir.Value:
    """Return the rows asked for of the array [2n, …], kept in 8 bits."""
    lowest = min(0.0, float(array.min()))
    step = np.float32(_step(array) or 1)
    zero = np.array(round(-lowest / float(step)), np.uint8)
    table = constant(graph, f"{name}.uint8", np.clip(np.round(array / step) + zero, 0, 255).astype(np.uint8))
    rows = add(graph, "Gather", [table, row], f"{name}.rows", before=before, shape=like.shape, axis=0)
    scale = constant(graph, f"{name}.scale", np.array(step)), constant(graph, f"{name}.zero", zero)
    return add(graph, "DequantizeLinear", [rows, *scale], name, like, before=before)
