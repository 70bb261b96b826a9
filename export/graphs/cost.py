"""What a node costs: arithmetic where it multiplies matrices, memory traffic elsewhere; per row of a batch."""

import math

import onnx_ir as ir

# What reading one byte costs, in floating-point operations: a CPU core does some 100 GFLOP/s and reads some 10 GB/s.
FLOP_PER_BYTE = 10
VIEWS = {"Reshape", "Unsqueeze", "Squeeze", "Shape", "Flatten", "Identity"}  # move nothing
PRODUCTS = {"Conv", "MatMul", "Gemm", "MultiHeadAttention"}


def size(value: ir.Value) -> int:
    """Return the elements of one row of a value: dynamic dimensions count once, "8*rows" eight times."""
    return math.prod(map(_per_row, value.shape)) if value.shape is not None else 0


def _per_row(dimension: int | ir.SymbolicDim) -> int:
    factor = str(dimension).partition("*")[0]
    return int(factor) if factor.isdecimal() else 1


def row_bytes(value: ir.Value) -> int:
    return int(size(value) * value.dtype.itemsize) if value.dtype is not None else 0


def flops(node: ir.Node) -> int:
    """Return twice the multiply-adds of convolutions, matrix products and attention; 0 for everything else."""
    if node.op_type not in PRODUCTS:
        return 0
    output, first, second = size(node.outputs[0]), node.inputs[0], node.inputs[1]
    assert first is not None and second is not None
    if node.op_type == "Conv":
        return 2 * output * size(second) // _length(second, 0)  # the weight is [out, in / groups, …]
    if node.op_type == "MultiHeadAttention":
        return 4 * output * _length(second, 1)  # q · kᵀ and its product with v, over the keys' length
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1
    return 2 * output * _length(first, 0 if transposed else -1)


def _length(value: ir.Value, axis: int) -> int:
    length = value.shape[axis] if value.shape is not None else None
    assert isinstance(length, int), f"{value.name} has no known length along axis {axis}"
    return length


def cost(node: ir.Node) -> float:
    """Return what running the node takes, in floating-point operations."""
    if node.op_type in VIEWS:
        return 0.0
    moved = sum(row_bytes(value) for value in (*node.inputs, *node.outputs) if value is not None)
    return flops(node) + FLOP_PER_BYTE * moved
