"""Running a graph that is neither an engine's nor to be kept: to look at its values, or to round them."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime


def open_session(model: ir.Model, path: Path, *, optimised: bool = True) -> Any:
    """Return an ONNX Runtime session on a model that was made of the graph at `path`.

    Weights in a second file stay where they are: a graph that names them lies beside `path` for a moment.
    """
    temporary = path.with_name("temporary.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Nodes in the graph's order. By default ONNX Runtime leaves those that nothing waits for to the end, and keeps what
    # they read in memory till then.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ir.save(model, temporary)
        return onnxruntime.InferenceSession(temporary, options, providers=["CPUExecutionProvider"])
    finally:
        temporary.unlink(missing_ok=True)
