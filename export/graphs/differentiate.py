"""Reverse-mode differentiation of a graph: behind the nodes that compute an output come those of its gradient.

Every operator that a prompt's way through a UNet meets has a rule here: from the gradient of a loss with respect to the
node's output to that with respect to its inputs. Only what depends on the source is differentiated, and never weights,
so that what is added costs about as much as the graph itself. torch can trace autograd into a graph too, but it takes
minutes, and makes of every rule torch's own operators, in copies of all weights.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from memedge.export.graphs.terms import Axes, NotDifferentiableError, Terms, dtype_of, shape_of


def differentiate(
    graph: ir.Graph, output: ir.Value, gradient: ir.Value, source: ir.Value, selections: Mapping[ir.Value, ir.Value]
) -> ir.Value:
    """Add nodes behind a graph's own that compute the product of a gradient and the Jacobian; return it.

    Args:
        graph: sorted; every value that depends on the source has a known shape but for the first dimension.
        output: depends on the source.
        gradient: of some loss with respect to the output, of its shape.
        source: what to differentiate with respect to.
        selections: for each graph input that indexes rows, int64 [R], its one-hot matrix, float32 [K, R], by which the
            gradients of rows that were taken several times are added up.

    Raises:
        NotDifferentiableError: an operator without a rule.
    """
    return _Tape(graph, source, selections).backward(output, gradient)


class _Tape(Terms):
    """The nodes on the way from the source, and the gradients found so far."""

    def __init__(self, graph: ir.Graph, source: ir.Value, selections: Mapping[ir.Value, ir.Value]):
        super().__init__(graph, "gradient")
        self.selections = selections
        self._source = source
        self._dependent = {source}
        self._nodes = list(graph)
        for node in self._nodes:
            if any(value in self._dependent for value in node.inputs):
                # A shape depends on no value of what it is the shape of.
                self._dependent.update(v for v in node.outputs if v.dtype is None or v.dtype.is_floating_point())
        self._gradients: dict[ir.Value, ir.Value] = {}

    def backward(self, output: ir.Value, gradient: ir.Value) -> ir.Value:
        self._gradients[output] = gradient
        for node in reversed(self._nodes):
            if not any(value in self._gradients for value in node.outputs):
                continue
            rule = _RULES.get(node.op_type) if node.domain == "" else None
            if rule is None:
                raise NotDifferentiableError(f"no rule for {node.domain or 'ai.onnx'}::{node.op_type} ({node.name})")
            for index, value in enumerate(node.inputs):
                if value in self._dependent:
                    self._accumulate(value, rule(self, node, index))
        if self._source not in self._gradients:
            raise NotDifferentiableError(f"{output.name} does not depend on {self._source.name}")
        return self._gradients[self._source]

    def of(self, value: ir.Value) -> ir.Value:
        """Return the gradient of an output."""
        if value not in self._gradients:
            raise NotDifferentiableError(f"only some outputs of the node that makes {value.name} are used")
        return self._gradients[value]

    def _accumulate(self, value: ir.Value, term: ir.Value) -> None:
        known = self._gradients.get(value)
        self._gradients[value] = term if known is None else self.node("Add", [known, term])


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _constant(value: ir.Value | None) -> npt.NDArray[Any]:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise NotDifferentiableError(f"{value.name if value is not None else 'an input'} is no constant")
    return tensor.numpy()


def _plain(node: ir.Node, allowed: bool, what: str) -> None:
    if not allowed:
        raise NotDifferentiableError(f"{node.op_type} with {what} ({node.name})")


def _add(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    return tape.summed_to(tape.of(node.outputs[0]), _input(node, index))


def _sub(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    term = tape.of(node.outputs[0])
    return tape.summed_to(tape.node("Neg", [term]) if index else term, _input(node, index))


def _mul(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    term = tape.node("Mul", [tape.of(node.outputs[0]), node.inputs[1 - index]])
    return tape.summed_to(term, _input(node, index))


def _div(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    y, divisor = node.outputs[0], _input(node, 1)
    term = tape.node("Div", [tape.of(y), divisor], shape_of(y))
    if index == 0:
        return tape.summed_to(term, _input(node, 0))
    return tape.summed_to(tape.node("Neg", [tape.node("Mul", [term, y])]), divisor)


def _sigmoid(tape: _Tape, node: ir.Node, _index: int) -> ir.Value:
    y = node.outputs[0]
    slope = tape.node("Mul", [y, tape.node("Sub", [tape.scalar(1, y), y], shape_of(y))])
    return tape.node("Mul", [tape.of(y), slope])


def _tanh(tape: _Tape, node: ir.Node, _index: int) -> ir.Value:
    y = node.outputs[0]
    slope = tape.node("Sub", [tape.scalar(1, y), tape.node("Mul", [y, y])], shape_of(y))
    return tape.node("Mul", [tape.of(y), slope])


def _pow(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    exponent = _constant(node.inputs[1])
    _plain(node, index == 0 and exponent.ndim == 0, "an exponent that is no number")
    x = _input(node, 0)
    power = x if exponent == 2 else tape.node("Pow", [x, tape.scalar(float(exponent) - 1, x)])
    slope = tape.node("Mul", [power, tape.scalar(float(exponent), x)])
    return tape.node("Mul", [tape.of(node.outputs[0]), slope])


def _sqrt(tape: _Tape, node: ir.Node, _index: int) -> ir.Value:
    y = node.outputs[0]
    return tape.node("Div", [tape.node("Mul", [tape.of(y), tape.scalar(0.5, y)]), y])


def _reciprocal(tape: _Tape, node: ir.Node, _index: int) -> ir.Value:
    y = node.outputs[0]
    return tape.node("Neg", [tape.node("Mul", [tape.of(y), tape.node("Mul", [y, y])])])


def _reduce_mean(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    """The gradient, shared out among what the mean was taken of."""
    _plain(node, index == 0 and len(node.inputs) > 1 and node.attributes.get_int("keepdims", 1) == 1, "axes that go")
    x, y = _input(node, 0), node.outputs[0]
    sizes = [shape_of(x)[int(axis)] for axis in _constant(node.inputs[1])]
    _plain(node, all(isinstance(size, int) for size in sizes), "an axis of unknown size")
    shared = tape.node("Mul", [tape.of(y), tape.scalar(1 / math.prod(sizes), y)])
    return tape.repeated(shared, shape_of(x))


def _gelu(tape: _Tape, node: ir.Node, _index: int) -> ir.Value:
    """Gelu(x) = x Φ(x), so its slope is Φ(x) + x φ(x) with the normal distribution Φ and its density φ.

    Approximated, Φ(x) = (1 + tanh u) / 2 with u = √(2/π) (x + .044715 x³), and its slope (1 − tanh² u) u′ / 2.
    """
    x = _input(node, 0)
    if node.attributes.get_string("approximate", "none") == "tanh":
        return _gelu_tanh(tape, node, x)
    erf = tape.node("Erf", [tape.node("Mul", [x, tape.scalar(math.sqrt(0.5), x)])])
    share = tape.node("Mul", [tape.node("Add", [erf, tape.scalar(1, x)]), tape.scalar(0.5, x)])
    power = tape.node("Mul", [tape.node("Mul", [x, x]), tape.scalar(-0.5, x)])
    density = tape.node("Mul", [tape.node("Exp", [power]), tape.scalar(1 / math.sqrt(2 * math.pi), x)])
    slope = tape.node("Add", [share, tape.node("Mul", [x, density])])
    return tape.node("Mul", [tape.of(node.outputs[0]), slope])


def _gelu_tanh(tape: _Tape, node: ir.Node, x: ir.Value) -> ir.Value:
    factor, cubic = math.sqrt(2 / math.pi), 0.044715
    square = tape.node("Mul", [x, x])

    def polynomial(coefficient: float) -> ir.Value:
        """Return √(2/π) (1 + coefficient · x²)."""
        rest = tape.node("Mul", [square, tape.scalar(factor * coefficient, x)])
        return tape.node("Add", [rest, tape.scalar(factor, x)])

    tanh = tape.node("Tanh", [tape.node("Mul", [x, polynomial(cubic)])])
    share = tape.node("Mul", [tape.node("Add", [tanh, tape.scalar(1, x)]), tape.scalar(0.5, x)])
    rest = tape.node("Sub", [tape.scalar(1, x), tape.node("Mul", [tanh, tanh])], shape_of(x))
    density = tape.node("Mul", [tape.node("Mul", [rest, polynomial(3 * cubic)]), tape.scalar(0.5, x)])
    slope = tape.node("Add", [share, tape.node("Mul", [x, density])])
    return tape.node("Mul", [tape.of(node.outputs[0]), slope])


def _softmax(tape: _Tape, node: ir.Node, _index: int) -> ir.Value:
    y = node.outputs[0]
    term, last = tape.of(y), len(shape_of(y)) - 1
    _plain(node, node.attributes.get_int("axis", -1) in (-1, last), "an axis other than the last")
    weighted = tape.node("Mul", [term, y])
    mean = tape.node("Mul", [y, tape.reduced("ReduceSum", weighted, [last])])
    return tape.node("Sub", [weighted, mean])


def _normalised(tape: _Tape, node: ir.Node, axes: Axes, scale: ir.Value) -> ir.Value:
    """Return the gradient of x in scale · x̂ with x̂ = (x − mean) / √(variance + ε), both over some axes.

    With h = scale · gradient it is (h − mean(h) − x̂ · mean(h · x̂)) / √(variance + ε).
    """
    x, epsilon = _input(node, 0), node.attributes.get_float("epsilon", 1e-5)
    centred = tape.node("Sub", [x, tape.reduced("ReduceMean", x, axes)])
    variance = tape.reduced("ReduceMean", tape.node("Mul", [centred, centred]), axes)
    root = tape.node("Sqrt", [tape.node("Add", [variance, tape.scalar(epsilon, x)])])
    unit = tape.node("Div", [centred, root])
    h = tape.node("Mul", [tape.of(node.outputs[0]), scale])
    along = tape.node("Mul", [unit, tape.reduced("ReduceMean", tape.node("Mul", [h, unit]), axes)])
    rest = tape.node("Sub", [tape.node("Sub", [h, tape.reduced("ReduceMean", h, axes)]), along])
    return tape.node("Div", [rest, root])


def _layer_normalization(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    last = len(shape_of(_input(node, 0))) - 1
    _plain(node, index == 0 and node.attributes.get_int("axis", -1) in (-1, last), "other than its last axis")
    return _normalised(tape, node, [last], _input(node, 1))


def _instance_normalization(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    rank = len(shape_of(_input(node, 0)))
    _plain(node, index == 0, "a scale that depends on the source")
    scale = tape.reshaped(_input(node, 1), [-1, *[1] * (rank - 2)])
    return _normalised(tape, node, range(2, rank), scale)


def _conv(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    x, weight = _input(node, 0), _input(node, 1)
    _plain(
        node, index == 0 and len(shape_of(x)) == 4, "weights that depend on the source, or other than two dimensions"
    )
    attributes = node.attributes
    _plain(node, attributes.get_string("auto_pad", "NOTSET") == "NOTSET", "automatic padding")
    strides = list(attributes.get_ints("strides", (1, 1)))
    dilations = list(attributes.get_ints("dilations", (1, 1)))
    pads = list(attributes.get_ints("pads", (0, 0, 0, 0)))
    kernel = [int(size) for size in shape_of(weight)[2:]]
    term = tape.of(node.outputs[0])
    # The rows and columns behind the last one that a kernel began at, which the output does not tell.
    missing = [
        int(shape_of(x)[2 + i])
        - ((int(shape_of(term)[2 + i]) - 1) * strides[i] + dilations[i] * (kernel[i] - 1) + 1 - pads[i] - pads[2 + i])
        for i in (0, 1)
    ]
    return tape.node(
        "ConvTranspose",
        [term, weight],
        shape_of(x),
        strides=strides,
        dilations=dilations,
        pads=pads,
        group=attributes.get_int("group", 1),
        kernel_shape=kernel,
        output_padding=missing,
    )


def _matmul(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    a, b = _input(node, 0), _input(node, 1)
    term = tape.of(node.outputs[0])
    if index == 0 and len(shape_of(b)) == 2:
        return _times_transposed(tape, term, b, shape_of(a))
    _plain(node, len(shape_of(a)) == len(shape_of(b)) and shape_of(a)[:-2] == shape_of(b)[:-2], "broadcasting")
    if index == 0:
        return tape.node("MatMul", [term, tape.swapped(b)], shape_of(a))
    return tape.node("MatMul", [tape.swapped(a), term], shape_of(b))


def _gemm(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    attributes = node.attributes
    _plain(node, index == 0 and not attributes.get_int("transA", 0), "weights that depend on the source")
    _plain(node, attributes.get_float("alpha", 1.0) == 1, "a factor")
    turned = attributes.get_int("transB", 0)
    return tape.node("Gemm", [tape.of(node.outputs[0]), node.inputs[1]], shape_of(_input(node, 0)), transB=1 - turned)


def _times_transposed(tape: _Tape, term: ir.Value, weight: ir.Value, shape: Sequence[Any]) -> ir.Value:
    """Return term [..., N] · weightᵀ, weight [K, N], in a shape: as Gemm, which needs no turned copy of the weight."""
    rows, columns = shape_of(weight)
    if len(shape) == 2:
        return tape.node("Gemm", [term, weight], shape, transB=1)
    flat = tape.reshaped(term, [None, int(columns)])
    return tape.reshaped(tape.node("Gemm", [flat, weight], [None, rows], transB=1), shape)


def _reshape(tape: _Tape, node: ir.Node, _index: int) -> ir.Value:
    return tape.reshaped(tape.of(node.outputs[0]), shape_of(_input(node, 0)))


def _transpose(tape: _Tape, node: ir.Node, _index: int) -> ir.Value:
    term = tape.of(node.outputs[0])
    perm = node.attributes.get_ints("perm", tuple(reversed(range(len(shape_of(term))))))
    return tape.transposed(term, [int(axis) for axis in np.argsort(perm)])


def _concat(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    term = tape.of(node.outputs[0])
    axis = node.attributes.get_int("axis", 0) % len(shape_of(term))
    start = sum(int(shape_of(_input(node, i))[axis]) for i in range(index))
    shape = shape_of(_input(node, index))
    borders = [tape.numbers([number]) for number in (start, start + int(shape[axis]), axis)]
    return tape.node("Slice", [term, *borders], shape)


def _slice(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    _plain(node, index == 0 and len(node.inputs) >= 4, "borders that depend on the source")
    starts, axes = _constant(node.inputs[1]), _constant(node.inputs[3])
    steps = _constant(node.inputs[4]) if len(node.inputs) > 4 else np.array([1])
    shape = shape_of(_input(node, 0))
    _plain(node, len(axes) == 1 and list(steps) == [1], "several axes, or steps")
    axis = int(axes[0]) % len(shape)
    size = shape[axis]
    _plain(node, isinstance(size, int), "an axis of unknown size")
    start = int(starts[0])
    before = min(max(start + size if start < 0 else start, 0), size)
    return tape.padded(tape.of(node.outputs[0]), axis, before, shape)


def _split(tape: _Tape, node: ir.Node, _index: int) -> ir.Value:
    x = _input(node, 0)
    axis = node.attributes.get_int("axis", 0) % len(shape_of(x))
    terms = [tape.of(output) for output in node.outputs]
    return tape.node("Concat", terms, shape_of(x), axis=axis)


def _depth_to_space(tape: _Tape, node: ir.Node, _index: int) -> ir.Value:
    _plain(node, node.attributes.get_string("mode", "DCR") == "DCR", "columns first")
    block = node.attributes.get_int("blocksize", 1)
    return tape.node("SpaceToDepth", [tape.of(node.outputs[0])], shape_of(_input(node, 0)), blocksize=block)


def _gather(tape: _Tape, node: ir.Node, index: int) -> ir.Value:
    data, rows = _input(node, 0), _input(node, 1)
    axis = node.attributes.get_int("axis", 0) % len(shape_of(data))
    _plain(node, index == 0, "an index that depends on the source")
    if axis == 0:
        return _rows_taken(tape, node, data, rows)
    number = _constant(rows)
    _plain(node, number.ndim == 0, "several places of an axis other than the first")
    shape, size = shape_of(data), int(shape_of(data)[axis])
    apart = tape.reshaped(tape.of(node.outputs[0]), [*shape[:axis], 1, *shape[axis + 1 :]])
    return tape.padded(apart, axis, int(number) % size, shape)


def _rows_taken(tape: _Tape, node: ir.Node, data: ir.Value, rows: ir.Value) -> ir.Value:
    """Add up the rows that were taken from the same place: a product with the index's one-hot matrix."""
    while rows not in tape.selections and (maker := rows.producer()) is not None and maker.op_type == "Reshape":
        rows = _input(maker, 0)
    _plain(node, rows in tape.selections, f"an index that is not known, {rows.name}")
    shape = shape_of(data)
    width = math.prod(int(size) for size in shape[1:])
    chosen = tape.selections[rows]
    term = tape.reshaped(tape.of(node.outputs[0]), [None, width])
    if term.dtype != chosen.dtype:
        chosen = tape.node("Cast", [chosen], dtype=dtype_of(term), to=dtype_of(term))
    summed = tape.node("MatMul", [chosen, term], [None, width])
    return tape.reshaped(summed, [None, *shape[1:]])


def _cast(tape: _Tape, node: ir.Node, _index: int) -> ir.Value:
    dtype = dtype_of(_input(node, 0))
    return tape.node("Cast", [tape.of(node.outputs[0])], dtype=dtype, to=dtype)


def _identity(tape: _Tape, node: ir.Node, _index: int) -> ir.Value:
    return tape.of(node.outputs[0])


_RULES: dict[str, Callable[[_Tape, ir.Node, int], ir.Value]] = {
    "Add": _add,
    "Cast": _cast,
    "Concat": _concat,
    "Conv": _conv,
    "DepthToSpace": _depth_to_space,
    "Div": _div,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Identity": _identity,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "MatMul": _matmul,
    "Mul": _mul,
    "Pow": _pow,
    "Reciprocal": _reciprocal,
    "ReduceMean": _reduce_mean,
    "Reshape": _reshape,
    "Sigmoid": _sigmoid,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _sqrt,
    "Sub": _sub,
    "Tanh": _tanh,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
