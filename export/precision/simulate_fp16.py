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
from onnx_ir.passes.common import RemoveUnusedNodesPass

from memedge.engine.directory import TEXT_ENCODER, UNET, Tensors
from memedge.export import parity
from memedge.export.graphs.edit import HALF, SINGLE, add, cast, replace
from memedge.export.graphs.expand_attention import expand
from memedge.export.precision import scratch_session
from memedge.export.precision.fp16 import LAYOUT


def epsilon(folder: Path, cached: Tensors, ids: npt.NDArray[np.int64], draws: int) -> npt.NDArray[np.float32]:
    """Return ε, [B, 2, n, C, H, W], by the fp16 graphs in a folder, for ids [B, L]."""
    return parity.epsilon(predictor(open_session(folder / UNET), cached), states(folder, ids), draws)


def states(folder: Path, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the prompt embeddings [B, L, D] by the fp16 text encoder in a folder, for ids [B, L]."""
    found: npt.NDArray[np.float32] = open_session(folder / TEXT_ENCODER).run(["states"], {"ids": ids})[0]
    return found


def predictor(unet: Any, cached: Tensors) -> parity.Predict:
    """Return what predicts one row by a session on a UNet."""
    first = np.zeros(1, dtype=np.int64)

    def predict(state: npt.NDArray[np.float32], row: int) -> npt.NDArray[np.float32]:
        feeds = {"states": state[None], "prompt": first, "row": first + row, **cached}
        prediction: npt.NDArray[np.float32] = unet.run(["prediction"], feeds)[0][0]
        return prediction

    return predict


def open_session(path: Path) -> Any:
    """Return an ONNX Runtime session that computes what a GPU would of the mixed graph at `path`."""
    return open_model(ir.load(path), path)


def open_model(model: ir.Model, path: Path) -> Any:
    """Return such a session of a mixed graph that was made of the graph at `path`."""
    rewrite(model)
    # Optimised, pairs of Casts might be taken for nothing; and weights would be widened all at once, not one by one.
    return scratch_session.open_session(model, path, optimised=False)


def rewrite(model: ir.Model) -> None:
    """Let a mixed graph compute in float32, and round what was fp16 by pairs of Casts."""
    expand(model)  # as GPUs without a fused kernel take attention: logits are stored in fp16 too
    graph = model.graph
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
                single = add(graph, "Cast", [weight], name, before=node, dtype=SINGLE, to=SINGLE)
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
