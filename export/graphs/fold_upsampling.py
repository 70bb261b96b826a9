"""A 3 × 3 convolution after nearest-neighbour upsampling, without the work on copies.

Of the nine pixels under a kernel on an upsampled image, only four differ, and which depends on the output pixel's
parity alone. So each of the four parities is a 2 × 2 convolution of the small image, whose weights are sums of the
3 × 3 ones: the same result for 4/9 of the multiplications, and 5 % of SD 1.4's UNet.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from memedge.export.graphs.edit import add, constant, replace

# Row or column weights of the two source pixels, for even and odd output pixels, from the three of the kernel.
TAPS = (np.array([[1, 0, 0], [0, 1, 1]]), np.array([[1, 1, 0], [0, 0, 1]]))


def fold(model: ir.Model) -> None:
    """Rewrite each Conv 3 × 3 of a Resize by 2 (nearest) as four Conv 2 × 2 and a DepthToSpace."""
    for node in list(model.graph):
        if node.op_type == "Conv" and _is_plain_3x3(node) and (source := _upsampled(node.inputs[0])) is not None:
            _rewrite(model.graph, node, source)
    RemoveUnusedNodesPass()(model)


def _is_plain_3x3(node: ir.Node) -> bool:
    attributes = node.attributes
    return (
        node.inputs[1] is not None
        and ir.convenience.get_const_tensor(node.inputs[1]) is not None
        and list(node.inputs[1].shape or ())[2:] == [3, 3]
        and list(attributes.get_ints("pads", ())) == [1, 1, 1, 1]
        and list(attributes.get_ints("strides", (1, 1))) == [1, 1]
        and list(attributes.get_ints("dilations", (1, 1))) == [1, 1]
        and attributes.get_int("group", 1) == 1
    )


def _upsampled(value: ir.Value | None) -> ir.Value | None:
    """Return what the value is the nearest-neighbour enlargement of, by 2 in both directions, if it is one."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Resize" or len(node.inputs) < 3:
        return None
    scales = ir.convenience.get_const_tensor(node.inputs[2]) if node.inputs[2] is not None else None
    attributes = node.attributes
    plain = (
        attributes.get_string("mode", "nearest") == "nearest"
        and attributes.get_string("nearest_mode", "round_prefer_floor") == "floor"
        and attributes.get_string("coordinate_transformation_mode", "half_pixel") == "asymmetric"
    )
    return node.inputs[0] if plain and scales is not None and scales.numpy().tolist() == [1, 1, 2, 2] else None


def _rewrite(graph: ir.Graph, conv: ir.Node, source: ir.Value) -> None:
    output, weight = conv.outputs[0], ir.convenience.get_const_tensor(conv.inputs[1])  # type: ignore[arg-type]
    assert weight is not None and output.shape is not None and source.shape is not None
    kernel = weight.numpy()
    phases = []
    small = ir.Shape([output.shape[0], output.shape[1], *source.shape[2:]])
    for row in (0, 1):
        for column in (0, 1):
            name = f"{output.name}.phase{row}{column}"
            # Sums in float64: the four weights then carry one rounding, like those they are made of.
            taps = np.einsum("ai,ocij,bj->ocab", TAPS[row], kernel.astype(np.float64), TAPS[column])
            inputs = [source, constant(graph, f"{name}.weight", taps.astype(kernel.dtype)), *conv.inputs[2:]]
            pads = [1 - row, 1 - column, row, column]
            phases.append(
                add(graph, "Conv", inputs, name, output, before=conv, shape=small, pads=pads, kernel_shape=[2, 2])
            )
    wide = [small[0], 4 * int(small[1]), *small[2:]]  # type: ignore[arg-type]
    joined = add(graph, "Concat", phases, f"{output.name}.phases", output, before=conv, shape=wide, axis=1)
    name = f"{output.name}.spread"
    replace(output, add(graph, "DepthToSpace", [joined], name, output, before=conv, blocksize=2, mode="DCR"))
