"""A text encoder that is left out: a graph that gives the empty prompt's states, whatever the ids.

ε_0 can be computed with it on any provider; prompts can't be read (engine/engine.py refuses them).
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from memedge.export.graphs.edit import add, constant
from memedge.export.sources.trace import OPSET


def graph_of(empty: npt.NDArray[np.float32], ids: int) -> ir.Model:
    """Return the graph ids int64 [prompts, ids] → states float32 [prompts, K, D], given the states [K, D]."""
    given = ir.Value(name="ids", shape=ir.Shape(["prompts", ids]), type=ir.TensorType(ir.DataType.INT64))
    graph = ir.Graph([given], [], nodes=[], opset_imports={"": OPSET}, name="empty_states")
    prompts = add(graph, "Shape", [given], "prompts", shape=[1], start=0, end=1)
    sizes = constant(graph, "sizes", np.array(empty.shape, np.int64))
    shape = add(graph, "Concat", [prompts, sizes], "shape", shape=[3], axis=0)
    states = constant(graph, "empty", empty[None])
    graph.outputs.append(add(graph, "Expand", [states, shape], "states", shape=["prompts", *empty.shape]))
    return ir.Model(graph, ir_version=10)
