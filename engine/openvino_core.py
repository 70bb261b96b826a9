"""OpenVINO's core: one for the life of the process, which knows the operators of ours that OpenVINO does not.

On processors with AMX, a core's CPU plugin gives the thread that loads it a stack for signals, and at its end puts back
the one before. Of several cores that end in another order than the reverse of their beginning, as a server's do when it
reloads its engine, that one is freed memory, and the next signal that Python handles, such as SIGTERM, ends the process
(OpenVINO 2026.4). A core that never ends leaves the stack where it is.
"""

from typing import Any

import numpy as np
import openvino
from openvino import opset13 as ops
from openvino.frontend.onnx import ConversionExtension


def _attention(node: Any) -> list[Any]:
    """Return `com.microsoft::MultiHeadAttention` of q, k, v [R, S, heads · d] in OpenVINO's operators."""
    heads = node.get_attribute("num_heads")
    order = ops.constant(np.array([0, 2, 1, 3]))
    apart = ops.constant(np.array([0, 0, heads, -1]))
    q, k, v = (ops.transpose(ops.reshape(node.get_input(i), apart, True), order) for i in range(3))
    result = ops.transpose(ops.scaled_dot_product_attention(q, k, v), order)
    return [ops.reshape(result, ops.constant(np.array([0, 0, -1])), True).output(0)]


CORE = openvino.Core()
CORE.add_extension(ConversionExtension("MultiHeadAttention", "com.microsoft", _attention))
