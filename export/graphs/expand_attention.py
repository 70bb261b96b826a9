"""Fused attention in standard operators, for TensorRT.

TensorRT-RTX reads ONNX Runtime's `com.microsoft::MultiHeadAttention`, TensorRT is not known to, and both fuse attention
themselves where they find a product, a softmax and a product over [R, heads, S, d]. They want q scaled before the first
product, which also keeps float16 logits small (NVIDIA's TensorRT documentation, "Fused Attention"). All is of the
node's own type, so that nothing stands between the products. In fp16 TensorRT-RTX 1.7 makes one kernel of each of the
31 attentions of SD 1.4's size, for SM75 and SM89; in fp32, of none of the embedded model's.
"""

import numpy as np
import onnx_ir as ir

from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import IntegrityError
from memedge.export.graphs.edit import add, constant, replace

MICROSOFT = "com.microsoft"
LOW = -10000  # what ONNX Runtime's node adds where a key is masked, unless it is told another number


def read_expanded(directory: EngineDirectory, name: str) -> bytes:
    """Return the content of an engine's ONNX file with its attention in standard operators.

    Weights in files beside it stay there, named as they were: nothing of their size is read or copied.

    Raises:
        IntegrityError: it is refused (engine/graphs.py), or holds attention that no export of ours writes.
    """
    path = directory.graph(name)  # TensorRT opens whatever a graph names
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's errors are of its own making
        raise IntegrityError(f"{path} is not an ONNX file ({type(error).__name__}): export the engine again.") from None
    if not any(node.domain == MICROSOFT for node in model.graph):
        return path.read_bytes()
    try:
        expand(model)
    except ValueError as error:
        raise IntegrityError(f"{path} holds attention that is not memedge's ({error}): export it again.") from None
    content: bytes = ir.serde.serialize_model(model).SerializeToString()
    return content


def expand(model: ir.Model) -> None:
    """Replace every `com.microsoft::MultiHeadAttention` of q, k, v [R, S, heads · d], in place.

    Its mask of keys, int32 [R, S], if it has one, is 1 at those that are there; -10000 is added to the others' logits.

    Raises:
        ValueError: one has another mask, a bias, a scale of its own, or widths that are not known.
    """
    graph = model.graph
    for node in list(graph):
        if (node.domain, node.op_type) == (MICROSOFT, "MultiHeadAttention"):
            replace(node.outputs[0], _expanded(graph, node))
            graph.remove(node, safe=True)
    if not any(node.domain == MICROSOFT for node in graph):
        model.opset_imports.pop(MICROSOFT, None)


def _expanded(graph: ir.Graph, node: ir.Node) -> ir.Value:
    inputs = [*node.inputs, *[None] * (5 - len(node.inputs))]
    (q, k, v), mask = inputs[:3], inputs[4]
    if any(value is not None for value in (inputs[3], *inputs[5:])) or set(node.attributes) != {"num_heads"}:
        raise ValueError(f"{node.name} has more than queries, keys, values, heads and a mask")
    if q is None or k is None or v is None:
        raise ValueError(f"{node.name} lacks queries, keys or values")
    heads = node.attributes["num_heads"].as_int()
    width = _width(q) // heads
    name, dtype = node.outputs[0].name, q.dtype
    if dtype is None or _width(k) != _width(q):
        raise ValueError(f"{node.name} multiplies queries and keys of unknown types or different widths")
    scale = constant(graph, f"attention.scale.{width}.{dtype.name}", np.array(width**-0.5, dtype.numpy()))
    scaled = add(graph, "Mul", [q, scale], f"{name}.q.scaled", before=node)
    queries = _apart(graph, node, scaled, heads, f"{name}.q", [0, 2, 1, 3])
    keys = _apart(graph, node, k, heads, f"{name}.k", [0, 2, 3, 1])
    values = _apart(graph, node, v, heads, f"{name}.v", [0, 2, 1, 3])
    square = [*queries.shape[:3], keys.shape[3]]  # type: ignore[index]
    logits = add(graph, "MatMul", [queries, keys], f"{name}.logits", before=node, shape=square)
    if mask is not None:
        hidden = _hidden(graph, node, mask, dtype)
        logits = add(graph, "Add", [logits, hidden], f"{name}.masked", before=node, shape=square)
    shares = add(graph, "Softmax", [logits], f"{name}.softmax", before=node, axis=-1)
    rows, tokens, d = q.shape[0], q.shape[1], _width(v) // heads  # type: ignore[index]
    result = add(graph, "MatMul", [shares, values], f"{name}.heads", before=node, shape=[rows, heads, tokens, d])
    shape, perm = [rows, tokens, heads, d], [0, 2, 1, 3]
    result = add(graph, "Transpose", [result], f"{name}.tokens", before=node, shape=shape, perm=perm)
    together = constant(graph, f"attention.together.{_width(v)}", np.array([0, 0, _width(v)]))
    return add(graph, "Reshape", [result, together], f"{name}.together", node.outputs[0], before=node)


def _hidden(graph: ir.Graph, node: ir.Node, mask: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return what is added to logits, [R, 1, 1, S]: 0 at keys that are there; made once for all attentions."""
    name = f"{mask.name}.{dtype.name}"
    found = next((value for other in graph for value in other.outputs if value.name == f"{name}.hidden"), None)
    if found is not None:
        return found
    if mask.shape is None or len(mask.shape) != 2:
        raise ValueError(f"{node.name} has a mask that is not one of keys")
    there = add(graph, "Cast", [mask], f"{name}.there", before=node, dtype=dtype, to=dtype)
    one = constant(graph, f"attention.one.{dtype.name}", np.array(1, dtype.numpy()))
    low = constant(graph, f"attention.low.{dtype.name}", np.array(LOW, dtype.numpy()))
    missing = add(graph, "Sub", [one, there], f"{name}.missing", there, before=node)
    lowered = add(graph, "Mul", [missing, low], f"{name}.lowered", there, before=node)
    axes = constant(graph, "attention.mask.axes", np.array([1, 2]))
    shape = [mask.shape[0], 1, 1, mask.shape[1]]
    return add(graph, "Unsqueeze", [lowered, axes], f"{name}.hidden", before=node, shape=shape)


def _apart(graph: ir.Graph, node: ir.Node, value: ir.Value, heads: int, name: str, order: list[int]) -> ir.Value:
    """Return [R, S, heads · d] as [R, S, heads, d], transposed to `order`."""
    width = _width(value) // heads
    # Zeros keep what is there: no shape has to be computed while the network runs.
    target = constant(graph, f"attention.apart.{heads}.{width}", np.array([0, 0, heads, width]))
    shape = [*value.shape[:2], heads, width]  # type: ignore[index]
    reshaped = add(graph, "Reshape", [value, target], f"{name}.reshaped", before=node, shape=shape)
    turned = [shape[axis] for axis in order]
    return add(graph, "Transpose", [reshaped], name, before=node, shape=turned, perm=order)


def _width(value: ir.Value) -> int:
    width = value.shape[2] if value.shape is not None and len(value.shape) == 3 else None
    if not isinstance(width, int):
        raise ValueError(f"the width of {value.name} is not known")
    return width
