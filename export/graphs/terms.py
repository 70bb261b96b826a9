"""What derivatives are made of: terms at the end of a graph, with numbered names and known shapes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from memedge.export.graphs.edit import add, constant

Axes = Sequence[int]


class NotDifferentiableError(Exception):
    """The graph has an operator, or a use of one, without a rule; or a shape that is not known."""


class Terms:
    """Adds nodes to the end of a graph; their outputs are called `prefix` and a number."""

    def __init__(self, graph: ir.Graph, prefix: str):
        self.graph = graph
        self._prefix = prefix
        self._count = 0

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[Any] | None = None,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node; its output is like its first input, but for the shape and type given."""
        self._count += 1
        name = f"{self._prefix}.{self._count}"
        return add(self.graph, op_type, inputs, name, shape=shape, dtype=dtype, **attributes)

    def numbers(self, values: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> ir.Value:
        """Return a constant, the same for the same values."""
        array = np.asarray(values, dtype)
        name = f"constant.{array.dtype}.{'x'.join(map(str, array.shape))}.{'_'.join(map(str, array.ravel().tolist()))}"
        return constant(self.graph, name, array)

    def scalar(self, number: float, like: ir.Value) -> ir.Value:
        """Return a number of a value's type."""
        return self.numbers(number, dtype_of(like).numpy())

    def reduced(self, op_type: str, value: ir.Value, axes: Axes) -> ir.Value:
        """Return the sum or the mean over axes, which stay with size 1."""
        shape = [1 if axis in axes else size for axis, size in enumerate(shape_of(value))]
        return self.node(op_type, [value, self.numbers(list(axes))], shape, keepdims=1)

    def reshaped(self, value: ir.Value, shape: Sequence[Any]) -> ir.Value:
        """Return the value in a shape of which at most one dimension is not known."""
        target = [size if isinstance(size, int) else -1 for size in shape]
        if target.count(-1) > 1:
            raise NotDifferentiableError(f"the shape of {value.name}, {shape}, is not known")
        return self.node("Reshape", [value, self.numbers(target)], shape)

    def transposed(self, value: ir.Value, perm: Axes) -> ir.Value:
        shape = shape_of(value)
        return self.node("Transpose", [value], [shape[axis] for axis in perm], perm=list(perm))

    def swapped(self, value: ir.Value) -> ir.Value:
        """Return the value with its last two axes exchanged."""
        rank = len(shape_of(value))
        return self.transposed(value, [*range(rank - 2), rank - 1, rank - 2])

    def padded(self, value: ir.Value, axis: int, before: int, shape: Sequence[Any]) -> ir.Value:
        """Return the value with zeros before and after it on one axis, in the shape given."""
        rank, after = len(shape), int(shape[axis]) - before - int(shape_of(value)[axis])
        pads = [before if i == axis else after if i == rank + axis else 0 for i in range(2 * rank)]
        return self.node("Pad", [value, self.numbers(pads)], shape)

    def repeated(self, value: ir.Value, shape: Sequence[Any]) -> ir.Value:
        """Return the value repeated along axes of size 1, in a shape of as many axes."""
        # Expand takes the larger of both sizes, so 1 stands for the rows, which are not known.
        target = [size if isinstance(size, int) else 1 for size in shape]
        return self.node("Expand", [value, self.numbers(target)], shape)

    def summed_to(self, value: ir.Value, target: ir.Value) -> ir.Value:
        """Return the value summed over what an elementwise operator repeated the target along."""
        have, want = shape_of(value), shape_of(target)
        leading = len(have) - len(want)
        repeated = [
            axis for axis, size in enumerate(have) if axis < leading or (want[axis - leading] == 1 and size != 1)
        ]
        if repeated:
            value = self.reduced("ReduceSum", value, repeated)
        return self.reshaped(value, want) if leading else value


def shape_of(value: ir.Value) -> tuple[Any, ...]:
    if value.shape is None:
        raise NotDifferentiableError(f"the shape of {value.name} is not known")
    return tuple(value.shape)


def dtype_of(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise NotDifferentiableError(f"the type of {value.name} is not known")
    return value.dtype
